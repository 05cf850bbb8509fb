"""Heatmap models in miniature: backbones, clips, settings and whole runs."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fetch_base
import make_clips
import train_heatmap

from lib.clips import read_clips
from lib.config import definition, with_defaults
from lib.heatmap_build import BuiltHeatmap, build_heatmap
from lib.heatmap_settings import ClipUse, Heatmap, TrainHeatmap
from lib.train_method import resolve_heatmap_method
from lib.typed import build

VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16}
VIT |= {"intermediate_size": 64, "image_size": [48, 96]}
DINOV2 = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DINOV2 |= {"mlp_ratio": 2, "patch_size": 14, "image_size": 56}
CONVNEXT = {"model_type": "convnext", "depths": [1, 2, 1], "hidden_sizes": [16, 24, 32], "num_stages": 3}
BACKBONES = {"vit": VIT, "dinov2": DINOV2, "convnext": CONVNEXT}
KINDS = {"vit": "vit_heatmap", "dinov2": "vit_heatmap", "convnext": "convnext_fpn_heatmap"}
USE = ClipUse(eval_games=("game2",), invisible="empty", occluded="mask")


def heatmap(kind: str = "vit", **changes: Any) -> Heatmap:
    small = {"input_size": [96, 48], "heatmap_size": [48, 24], "channels": [16, 16], "factors": [2, 2]}
    section = {"model": KINDS[kind], "fpn_channels": 16, **small, **changes}
    return build(Heatmap, with_defaults(section, definition("heatmap")))


def settings(method: str = "full", **changes: Any) -> TrainHeatmap:
    """Of a run of four updates on the CPU; nested sections are given as mappings."""
    short = {"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 0, "eval_steps": 0, "learning_rate": 1e-3}
    section = {"method": method, "device": "cpu", "precision": "fp32", **short, **changes}
    filled = with_defaults(section, definition("train_heatmap"))
    resolve_heatmap_method(filled, gpus=[])
    return build(TrainHeatmap, filled)


def write_base(folder: Path, kind: str = "vit") -> Path:
    fetch_base.make_random(config=BACKBONES[kind], seed=0, output=folder, threads=1)
    return folder


def write_clips(folder: Path) -> Path:
    """Two games of one clip of twelve frames each."""
    make_clips.make_clips(output=folder, games=2, clips=1, frames=12, size=(192, 96), seed=1)
    return folder


def build_model(base: Path, *, kind: str = "vit", cleanup: ExitStack, **changes: Any) -> BuiltHeatmap:
    """A model as it is before training; `changes` are of `settings`."""
    return build_heatmap(base, heatmap(kind), settings(**changes), gpus=[], cleanup=cleanup)


def train(
    base: Path, clips: Path, output: Path, *, kind: str = "vit", shape: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """A whole run; its record lies in `{output}.json`, its checkpoints in `{output}.checkpoints`."""
    return train_heatmap.train_heatmap(
        base=base,
        base_manifest=None,
        clips=clips,
        clips_identity=None,
        heatmap=heatmap(kind, **(shape or {})),
        use=USE,
        train=settings(**changes),
        gpus=[],
        checkpoints=Path(f"{output}.checkpoints"),
        tensorboard=None,
        history=Path(f"{output}.json"),
        output=output,
    )


def frames_of(clips: Path) -> list[Path]:
    return [frame.path for clip in read_clips(clips) for frame in clip.frames]
