"""One run of a trainer: its arguments, going on from a checkpoint, being stopped, and its record."""

from __future__ import annotations

import os
import resource
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.checkpoints import newest_checkpoint, step_of
from lib.console import say
from lib.heatmap_settings import PREFETCHED, TrainHeatmap
from lib.train_settings import Train

if TYPE_CHECKING:
    from lib.split_trainer import SplitTrainer


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes beside its output."""

    base: Path
    run: Path  # its checkpoints
    tensorboard: Path | None


def add_run_options(parser: ArgumentParser) -> None:
    """The options of a run that are no settings of it."""
    parser.add_argument("--gpus", default="", metavar="GIB,GIB", help="memory of each planned GPU")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="folder of checkpoints (beside the output)")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="folder of TensorBoard's event files")
    parser.add_argument("--history", type=Path, metavar="FILE", help="JSON file of the run's figures")


def checkpoints_of(arguments: Namespace) -> Path:
    """Where a run's checkpoints go: as its options say, or beside the output."""
    return arguments.checkpoints or arguments.output.with_name(f".{arguments.output.name}.checkpoints")


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


def quieten_transformers() -> None:
    """Its own bars are noise where there is no terminal, and its deprecation notices are for us, not for users."""
    from logging import ERROR, getLogger

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    # A line for each kind of int8 layer, that its inputs are cast.
    getLogger("bitsandbytes").setLevel(ERROR)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def run_trainer(make: Callable[..., SplitTrainer], places: Places) -> SplitTrainer:
    """
    Train from the newest checkpoint of the same run if there is one, evaluate, and choose the weights that are kept.

    Args:
        make: the trainer, given the Trainer's callbacks.

    Raises:
        KeyboardInterrupt: it was stopped, with a checkpoint.
    """
    from lib.training_watch import StopOnSignal, Watcher

    checkpoint = newest_checkpoint(places.run)
    if checkpoint:
        say(f"going on from the checkpoint at step {step_of(checkpoint)}")
    watcher, stop = Watcher(tensorboard=places.tensorboard), StopOnSignal()
    trainer = make(callbacks=[watcher, stop])
    watcher.trainer = trainer
    try:
        with stop:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < trainer.state.max_steps:
            say(f"stopped after step {trainer.state.global_step}; the same command goes on from there")
            raise KeyboardInterrupt
        if trainer.eval_dataset and not trainer.is_evaluated():
            trainer.evaluate()
    finally:
        watcher.close()
    if trainer.best:
        trainer.take_best()
    return trainer


def trainer_arguments(settings: Train | TrainHeatmap, run: Path, *, evaluates: bool, workers: int = 0) -> Any:
    """
    transformers' TrainingArguments.

    Args:
        run: where the checkpoints lie.
        evaluates: there are held-out samples.
        workers: processes that read samples; none reads them between the updates.
    """
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
        dataloader_num_workers=workers,
        # Started anew for each epoch, they left a GPU waiting at every epoch's end.
        dataloader_persistent_workers=workers > 0,
        dataloader_prefetch_factor=PREFETCHED if workers else None,
    )
    # One model on all cards; with more than one in sight the Trainer would copy it to each.
    _ = arguments.device
    arguments._n_gpu = 1
    return arguments


def history_of(trainer: SplitTrainer, settings: Train | TrainHeatmap) -> dict[str, Any]:
    """The run as numbers, for reports/{model}.training.json; figures of its steps survive a restart."""
    from lib.training_watch import peak_memory, scalars_of

    unit = trainer.unit
    wanted = ("step", "epoch", "grad_norm", unit, "seconds", *scalars_of(unit))
    log = trainer.state.log_history
    steps = [{key: entry[key] for key in wanted if key in entry} for entry in log if "loss" in entry]
    return {
        "method": settings.method,
        "device": settings.device,
        "unit": unit,
        "seconds": sum(step["seconds"] for step in steps),
        unit: sum(step[unit] for step in steps),
        "peak_gpu_gb": peak_memory(),
        "peak_ram_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "kept": "best" if trainer.best else "last",
        "kept_step": trainer.best[1] if trainer.best else trainer.state.global_step,
        "steps": steps,
        "evaluations": [{"step": entry["step"], "loss": entry["eval_loss"]} for entry in log if "eval_loss" in entry],
    }
