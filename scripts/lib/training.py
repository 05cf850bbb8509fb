"""One training run: load the base as the method says, attach the adapter, let the Trainer work."""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.adapted_model import build_model, check_packable
from lib.base_model import check_device, limit_memory
from lib.checkpoints import newest_checkpoint, step_of
from lib.console import say
from lib.dataset import DataError, read_examples
from lib.loading import explain_loading
from lib.samples import Sample, SampleSummary, check_learnable, encode_examples, pack_samples, summarize_samples
from lib.train_settings import Train

if TYPE_CHECKING:
    from peft import PeftModel

    from lib.adapter_trainer import AdapterTrainer


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes beside its output."""

    base: Path
    run: Path  # its checkpoints
    tensorboard: Path | None


@dataclass(frozen=True)
class TrainedAdapter:
    """What a run leaves behind."""

    model: PeftModel
    four_bit: dict[str, Any] | None  # how its base was held, see lib.four_bit
    history: dict[str, Any]


def fix_threads(threads: int) -> None:
    """
    Use exactly this many threads for arithmetic; to be called before torch is imported.

    Snakemake exports OMP_NUM_THREADS and its kin by its own count, and a CPU adapter's bytes depend on it.
    """
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
        os.environ[variable] = str(threads)
    # One of four full runs of the demo gave other bytes, on a loaded machine. The cause was not found, nor is it shown
    # that this helps: it is what MKL's manual asks for where results are to be the same from run to run.
    os.environ |= {"OMP_DYNAMIC": "FALSE", "MKL_DYNAMIC": "FALSE", "MKL_CBWR": "AUTO"}
    # Beside another busy process, threads that spin while they wait take the core from the one waited for:
    # on 2 busy cores a step was seen at 2.8 s with this and at 6.0 s without, though under unlike load.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # For `deterministic` on a GPU; cuBLAS reads it when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    torch.set_num_threads(threads)


def train_lora(*, places: Places, settings: Train, gpus: Sequence[float]) -> TrainedAdapter:
    """
    Train an adapter, from the newest checkpoint of the same run if there is one.

    Args:
        places: where the base is, and where checkpoints go.
        settings: of the run, resolved.
        gpus: memory of each planned GPU in GiB; the process takes no more of a card.

    Returns:
        The model with its trained adapter, and the run's history.

    Raises:
        DataError: the data cannot be used with this base's chat template.
        BaseModelError, AdapterError: the device is not there, or the base or adapter is not as asked.
        TrainingError, OutOfMemoryError: the run cannot go on.
        KeyboardInterrupt: it was stopped, with a checkpoint.
    """
    import torch
    from transformers import set_seed

    _quieten_transformers()
    check_device(settings)
    train, held_out = prepare_samples(places.base, settings)
    set_seed(settings.seed)
    torch.use_deterministic_algorithms(settings.deterministic)
    if settings.device == "cuda":
        limit_memory(gpus)
    with ExitStack() as cleanup:
        model = build_model(places.base, settings, gpus=gpus, cleanup=cleanup)
        if settings.packing:
            check_packable(model)
        trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        say(f"training {trainable:,} weights by {settings.method} in {settings.precision} on {settings.device}")
        trainer = _run(model, train, held_out, settings, places)
    return TrainedAdapter(model, model.get_base_model().four_bit, _history(trainer, settings, train))


def _quieten_transformers() -> None:
    """Its own bars are noise where there is no terminal, and its deprecation notices are for us, not for users."""
    from logging import ERROR, getLogger

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    # A line for each kind of int8 layer, that its inputs are cast.
    getLogger("bitsandbytes").setLevel(ERROR)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def prepare_samples(base: Path, settings: Train) -> tuple[list[Sample], list[Sample]]:
    """
    Read, render and encode the data; says how much of it was cut.

    Returns:
        Samples to train on, and held-out ones (none if the settings name no held-out data).
    """
    from transformers import AutoTokenizer

    with explain_loading("tokenizer", base):
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)

    def encode(path: Path) -> list[Sample]:
        examples = read_examples(path)
        samples = encode_examples(tokenizer, examples, max_length=settings.max_length)
        check_learnable(samples, examples, path, max_length=settings.max_length)
        _say_counts(path, summarize_samples(samples), settings.max_length)
        return samples

    train = encode(Path(settings.data))
    held_out = encode(Path(settings.eval_data)) if settings.eval_data else []
    if settings.eval_fraction:
        train, held_out = _hold_out(train, settings)
    if settings.packing:
        packed = pack_samples(train, max_length=settings.max_length)
        say(f"{len(train)} samples packed into {len(packed)} rows")
        train = packed
    return train, held_out


def _say_counts(path: Path, counts: SampleSummary, max_length: int) -> None:
    say(f"{path.name}: {counts.samples} samples, {counts.tokens} tokens, {counts.learned_tokens} of them learned")
    if counts.cut_samples:
        say(f"{counts.cut_samples} samples are longer than max_length {max_length}: {counts.cut_tokens} tokens are cut")


def _hold_out(samples: list[Sample], settings: Train) -> tuple[list[Sample], list[Sample]]:
    """
    Draw the held-out share by the seed, at least one sample and not all.

    Raises:
        DataError: there is but one sample.
    """
    import random

    if len(samples) < 2:
        raise DataError(f"{settings.data}: eval_fraction has to leave samples to train on, and there is but one")
    count = min(max(1, round(len(samples) * settings.eval_fraction)), len(samples) - 1)
    chosen = set(random.Random(settings.seed).sample(range(len(samples)), count))
    say(f"{count} of {len(samples)} samples are held out")
    return [each for i, each in enumerate(samples) if i not in chosen], [samples[i] for i in sorted(chosen)]


def _run(
    model: PeftModel, train: list[Sample], held_out: list[Sample], settings: Train, places: Places
) -> AdapterTrainer:
    """Train, evaluate and choose the weights that are kept."""
    from lib.adapter_trainer import AdapterTrainer
    from lib.training_watch import StopOnSignal, Watcher

    checkpoint = newest_checkpoint(places.run)
    if checkpoint:
        say(f"going on from the checkpoint at step {step_of(checkpoint)}")
    watcher, stop = Watcher(tensorboard=places.tensorboard), StopOnSignal()
    trainer = AdapterTrainer(
        settings=settings,
        pad=model.config.pad_token_id or 0,
        model=model,
        args=trainer_arguments(settings, places.run, evaluates=bool(held_out)),
        train_dataset=train,
        eval_dataset=held_out or None,
        callbacks=[watcher, stop],
    )
    watcher.trainer = trainer
    try:
        with stop:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < trainer.state.max_steps:
            say(f"stopped after step {trainer.state.global_step}; the same command goes on from there")
            raise KeyboardInterrupt
        if held_out and not trainer.is_evaluated():
            trainer.evaluate()
    finally:
        watcher.close()
    if trainer.best:
        trainer.take_best()
    return trainer


def trainer_arguments(settings: Train, run: Path, *, evaluates: bool) -> Any:
    """transformers' TrainingArguments for a run whose checkpoints lie in `run`."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(run),
        use_cpu=settings.device == "cpu",
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps if settings.max_steps > 0 else -1,
        # All samples of an update at once: AdapterTrainer splits them.
        per_device_train_batch_size=settings.per_device_train_batch_size * settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        eval_strategy="steps" if evaluates and settings.eval_steps else "no",
        eval_steps=settings.eval_steps or None,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # One model on all cards; with more than one in sight the Trainer would copy it to each.
    _ = arguments.device
    arguments._n_gpu = 1
    return arguments


def _history(trainer: AdapterTrainer, settings: Train, train: list[Sample]) -> dict[str, Any]:
    """The run as numbers, for reports/{model}.training.json; figures of its steps survive a restart."""
    from lib.training_watch import SCALARS, peak_memory

    wanted = ("step", "epoch", "grad_norm", "tokens", "seconds", *SCALARS)
    log = trainer.state.log_history
    steps = [{key: entry[key] for key in wanted if key in entry} for entry in log if "loss" in entry]
    return {
        "method": settings.method,
        "method_reason": settings.method_reason,
        "device": settings.device,
        "seconds": sum(step["seconds"] for step in steps),
        "tokens": sum(step["tokens"] for step in steps),
        "samples": asdict(summarize_samples(train)),
        "peak_gpu_gb": peak_memory(),
        "peak_ram_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "kept": "best" if trainer.best else "last",
        "kept_step": trainer.best[1] if trainer.best else trainer.state.global_step,
        "steps": steps,
        "evaluations": [{"step": entry["step"], "loss": entry["eval_loss"]} for entry in log if "eval_loss" in entry],
    }
