"""Which files make up a checkpoint: weights, index, config, tokenizer, licence."""

from __future__ import annotations

from pathlib import Path

from lib.errors import ModelmillError
from lib.jsonfile import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What belongs to a checkpoint beside its weights; nothing in it is ever executed.
SIDE_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*")
PICKLED = ("*.bin", "*.pth", "*.pt", "*.ckpt")


class CheckpointError(ModelmillError):
    """A checkpoint is incomplete, damaged or of a form that is not read."""


def weight_files(folder: Path) -> list[str]:
    """
    Names of a checkpoint's safetensors files, in order.

    Raises:
        CheckpointError: none there, or shards that the index names are missing.
    """
    if (folder / INDEX).is_file():
        names = sorted(set(weight_map(folder).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder}: shards named in {INDEX} are missing: {', '.join(missing)}")
        return names
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if pickled := sorted(path.name for pattern in PICKLED for path in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} has its weights only as pickled files ({', '.join(pickled[:3])}), which can run code when read; "
            "convert them to safetensors, or take a revision that has them"
        )
    raise CheckpointError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX} is there")


def checkpoint_files(folder: Path) -> list[str]:
    """Names of all files that make up a checkpoint: weights, index, config, tokenizer, licence."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json")
    sides = {path.name for pattern in SIDE_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted({*sides, *weight_files(folder)} - {"MANIFEST.json"})


def weight_map(folder: Path) -> dict[str, str]:
    """Which shard holds each tensor, as the index says."""
    try:
        return read_json(folder / INDEX)["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: {error}") from error
