"""One training run: load the base as the method says, attach the adapter, let the Trainer work."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.adapted_model import build_model, check_packable
from lib.base_model import check_device, limit_memory
from lib.console import say
from lib.samples import Sample, pack_samples, summarize_samples
from lib.train_settings import Train
from lib.training_data import read_training_data
from lib.training_run import Places, history_of, quieten_transformers, run_trainer, trainer_arguments

if TYPE_CHECKING:
    from peft import PeftModel

    from lib.split_trainer import SplitTrainer


@dataclass(frozen=True)
class TrainedAdapter:
    """What a run leaves behind."""

    model: PeftModel
    four_bit: dict[str, Any] | None  # how its base was held, see lib.four_bit
    history: dict[str, Any]


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
    quieten_transformers()  # before the imports, which bring bitsandbytes along
    import torch
    from transformers import set_seed

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
    about = {"method_reason": settings.method_reason, "samples": asdict(summarize_samples(train))}
    return TrainedAdapter(model, model.get_base_model().four_bit, {**history_of(trainer, settings), **about})


def prepare_samples(base: Path, settings: Train) -> tuple[list[Sample], list[Sample]]:
    """
    Read, render and encode the data, and pack them if the settings say so.

    Returns:
        Samples to train on, and held-out ones (none if the settings name no held-out data).
    """
    train, held_out = read_training_data(
        base=base,
        data=Path(settings.data),
        eval_data=Path(settings.eval_data) if settings.eval_data else None,
        eval_fraction=settings.eval_fraction,
        max_length=settings.max_length,
        seed=settings.seed,
    )
    if settings.packing:
        packed = pack_samples(train, max_length=settings.max_length)
        say(f"{len(train)} samples packed into {len(packed)} rows")
        train = packed
    return train, held_out


def _run(
    model: PeftModel, train: list[Sample], held_out: list[Sample], settings: Train, places: Places
) -> SplitTrainer[Sample]:
    from lib.adapter_trainer import AdapterTrainer

    make = partial(
        AdapterTrainer,
        settings=settings,
        pad=model.config.pad_token_id or 0,
        model=model,
        args=trainer_arguments(settings, places.run, evaluates=bool(held_out)),
        train_dataset=train,
        eval_dataset=held_out or None,
    )
    return run_trainer(make, places)
