"""Which files make up a checkpoint: weights, index, config, tokenizer, licence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lib.errors import ModelmillError
from lib.jsonfile import read_json
from lib.manifest import NAME as MANIFEST

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Names that models give the matrix of their tokens' embeddings.
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
LICENSE = re.compile(r"licen[cs]e(\.txt|\.md)?", re.IGNORECASE)
# What belongs to a checkpoint beside its weights, in any case of letters.
SIDE_FILES = (
    "*.json",
    "*.jinja",
    "license*",
    "licence*",
    "notice*",
    "tokenizer.model*",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "vocab.txt",
    "merges.txt",
)
# Never taken, whatever else it is called: weights of another form, and what runs code when it is loaded.
NEVER = (
    ".safetensors",
    ".bin",
    ".pth",
    ".pt",
    ".ckpt",
    ".pkl",
    ".h5",
    ".msgpack",
    ".py",
    ".sh",
    ".so",
    ".onnx",
    ".gguf",
)
# Weights in a form that can run code, by the names that people give them.
PICKLED = ("*model*.bin", "consolidated*.pth", "*model*.pt", "*.ckpt")


class CheckpointError(ModelmillError):
    """A checkpoint is incomplete, damaged or of a form that is not read."""


def weight_files(folder: Path) -> list[str]:
    """
    Names of a checkpoint's safetensors files, in order.

    Raises:
        CheckpointError: none there, or shards that the index names are missing.
    """
    if (folder / INDEX).is_file() and (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds both {WEIGHTS} and {INDEX}: remove the one that is not meant")
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
    sides = {path.name for path in folder.iterdir() if path.is_file() and is_side_file(path.name)}
    return sorted({*sides, *weight_files(folder)})


def copy_side_files(base: Path, folder: Path, *, config: dict[str, Any], dtype: str) -> list[str]:
    """
    Copy tokenizer, licence and the like byte for byte, and write the config of a checkpoint in another dtype.

    Args:
        base: the checkpoint that they are of.
        config: its config.json, with what else was changed; takes the dtype as well.

    Returns:
        The names of the files, config.json among them.
    """
    sides = sorted(set(checkpoint_files(base)) - set(weight_files(base)) - {INDEX})
    for name in sides:
        shutil.copyfile(base / name, folder / name)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config.update(dict.fromkeys(keys, dtype))
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return sides


def is_side_file(name: str) -> bool:
    """Whether a file of that name belongs to a checkpoint beside its weights; our own manifest does not."""
    lowered = name.lower()
    wanted = any(fnmatchcase(lowered, pattern) for pattern in SIDE_FILES)
    return wanted and not lowered.endswith(NEVER) and name != MANIFEST


def is_embedding(tensor: str) -> bool:
    """Whether a tensor of that name holds the tokens' embeddings."""
    return any(f".{tensor}".endswith(f".{name}.weight") for name in EMBEDDINGS)


def weight_map(folder: Path) -> dict[str, str]:
    """Which shard holds each tensor, as the index says."""
    try:
        found = read_json(folder / INDEX)["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError(f"{folder / INDEX} is damaged: its weight_map does not map tensors to files")
    return found


def license_of(folder: Path) -> str | None:
    """The text of a checkpoint's licence; None if it brings none."""
    found = sorted(path for path in folder.iterdir() if LICENSE.fullmatch(path.name) and path.is_file())
    return found[0].read_text(encoding="utf-8", errors="replace") if found else None


def rename_experts(published: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in which the number of experts has the one name that `shape` has for it."""
    counts = [published[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if published.get(key)]
    return {**published, "num_experts": counts[0] if counts else None}
