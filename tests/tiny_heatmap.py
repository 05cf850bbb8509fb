"""Merged heatmap models of random weights, made in a moment: every kind of backbone, a few kB each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from lib.heatmap_folder import (
    CONFIG,
    MERGED,
    HeatmapConfig,
    describe_backbone,
    model_tensors,
    save_weights,
    write_heatmap_config,
)
from lib.heatmap_model import FPN, VIT, HeatmapModel, plan_input
from lib.heatmap_settings import Heatmap
from lib.manifest import describe_files, write_folder_manifest

_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {"model_type": "vit", **_VIT, "intermediate_size": 64, "image_size": 32, "patch_size": 16},
    "dinov2": {"model_type": "dinov2", **_VIT, "mlp_ratio": 2, "image_size": 42, "patch_size": 14},
    "dinov2_with_registers": {
        "model_type": "dinov2_with_registers", **_VIT, "mlp_ratio": 2, "image_size": 42, "patch_size": 14,
    },
    "dinov3_vit": {
        "model_type": "dinov3_vit", **_VIT, "intermediate_size": 64, "image_size": 32, "patch_size": 16,
        "num_register_tokens": 4,
    },
    "convnext": {"model_type": "convnext", **_CONVNEXT},
    "convnextv2": {"model_type": "convnextv2", **_CONVNEXT},
    "dinov3_convnext": {"model_type": "dinov3_convnext", **_CONVNEXT},
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "input_size": (64, 48),
    "heatmap_size": (32, 24),
    "sigma": 2.0,
    "frames": 1,
    "channels": (16, 8),
    "factors": (2, 2),
    "norm": "gn",
    "squeeze_excite": False,
    "fpn_channels": 16,
    "fusion": "sum",
}


def make_settings(backbone: str, **changes: Any) -> Heatmap:
    return Heatmap(**{"model": FPN if "convnext" in backbone else VIT, **SETTINGS, **changes})


def make_backbone(kind: str, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return AutoModel.from_config(AutoConfig.for_model(**BACKBONES[kind])).eval()


def make_model(kind: str, *, seed: int = 0, **changes: Any) -> HeatmapModel:
    """A model whose answers differ from place to place, unlike those of an untrained head."""
    model = HeatmapModel(make_backbone(kind, seed=seed), make_settings(kind, **changes))
    nn.init.normal_(model.head.weight)
    return model.eval()


def write_model(folder: Path, kind: str = "vit", *, seed: int = 0, **changes: Any) -> Path:
    """Write a merged model with its manifest."""
    folder.mkdir(parents=True)
    write_into(folder, make_model(kind, seed=seed, **changes))
    return folder


def write_into(folder: Path, model: HeatmapModel) -> None:
    """Write a model's files and manifest into a folder."""
    config = HeatmapConfig(
        heatmap=model.settings,
        input=plan_input(model.config, {}, model.settings.input_size),
        backbone=describe_backbone(model.config),
    )
    write_heatmap_config(folder, config)
    save_weights(model_tensors(model), folder / MERGED)
    files = describe_files(folder, [CONFIG, MERGED], threads=1)
    write_folder_manifest(folder, artifact="merged", files=files, origin={"kind": "random"})
