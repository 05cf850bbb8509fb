"""One training run of a heatmap model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any

from lib.cli import usable_cores
from lib.clips import Clip
from lib.console import say
from lib.frames import MomentReader, list_moments, split_games
from lib.heatmap_build import BuiltHeatmap, build_heatmap
from lib.heatmap_settings import PREFETCHED, READERS, ClipUse, Heatmap, TrainHeatmap
from lib.training_run import Places, history_of, quieten_transformers, run_trainer, trainer_arguments

if TYPE_CHECKING:
    from lib.heatmap_folder import HeatmapConfig

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class TrainedHeatmap:
    """What a run leaves behind."""

    built: BuiltHeatmap
    history: dict[str, Any]


def train_heatmap_model(
    *,
    places: Places,
    clips: Sequence[Clip],
    heatmap: Heatmap,
    use: ClipUse,
    train: TrainHeatmap,
    gpus: Sequence[float],
) -> TrainedHeatmap:
    """
    Train a model, from the newest checkpoint of the same run if there is one.

    Args:
        places: where the backbone is, and where checkpoints go.
        clips: of all games.
        gpus: memory of each planned GPU in GiB; the process takes no more of a card.

    Raises:
        ClipError: a game is held out that is not there, or a frame cannot be read.
        BaseModelError, AdapterError, HeatmapError: the device is not there, or the model is not as asked.
        TrainingError, OutOfMemoryError: the run cannot go on.
        KeyboardInterrupt: it was stopped, with a checkpoint.
    """
    quieten_transformers()  # before the imports, which bring bitsandbytes along
    import torch
    from transformers import set_seed

    from lib.base_model import check_device, limit_memory

    check_device(train)
    set_seed(train.seed)
    torch.use_deterministic_algorithms(train.deterministic)
    if train.device == "cuda":
        limit_memory(gpus)
    with ExitStack() as cleanup:
        built = build_heatmap(places.base, heatmap, train, gpus=gpus, cleanup=cleanup)
        trainable = sum(weight.numel() for weight in built.model.parameters() if weight.requires_grad)
        say(f"training {trainable:,} weights by {train.method} in {train.precision} on {train.device}")
        learned, held_out = _read(clips, built, heatmap, use)
        trainer = _run(built, learned, held_out, train, places)
    return TrainedHeatmap(built, history_of(trainer, train))


def _read(
    clips: Sequence[Clip], built: BuiltHeatmap, heatmap: Heatmap, use: ClipUse
) -> tuple[MomentReader, MomentReader]:
    """The frames to train on, and those held out."""
    seen = {"frames": heatmap.frames, "invisible": use.invisible, "occluded": use.occluded}
    size = (built.config.input.width, built.config.input.height)
    games = split_games(clips, use.eval_games)
    learned, held_out = (
        MomentReader(
            list_moments(clips, games=names, **seen),
            size=size,
            heatmap_size=heatmap.heatmap_size,
            occluded=use.occluded,
        )
        for names in games
    )
    say(f"{len(learned)} frames of {len(games[0])} games to train on, {len(held_out)} of {len(games[1])} held out")
    return learned, held_out


def _readers(train: TrainHeatmap, config: HeatmapConfig) -> int:
    """How many processes read frames: as many as asked for, or as cores and shared memory (64 MB in Docker) are for."""
    if train.dataloader_num_workers is not None:
        return train.dataloader_num_workers
    frame = 3 * config.heatmap.frames * config.input.width * config.input.height
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps * frame
    shared = disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    # Of each all that it has read beforehand lies there, and what it reads for an evaluation.
    return min(READERS, usable_cores() - 1, shared // (2 * PREFETCHED * batch))


def _run(
    built: BuiltHeatmap, learned: MomentReader, held_out: MomentReader, train: TrainHeatmap, places: Places
) -> Any:
    from lib.heatmap_trainer import HeatmapTrainer

    workers = _readers(train, built.config)
    make = partial(
        HeatmapTrainer,
        settings=train,
        config=built.config,
        model=built.model,
        args=trainer_arguments(train, places.run, evaluates=bool(len(held_out)), workers=workers),
        train_dataset=learned,
        eval_dataset=held_out if len(held_out) else None,
    )
    return run_trainer(make, places)
