"""Folders of heatmap models: what training leaves, and the merged model that loads without peft and bitsandbytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lib.backbone_names import pinned_name
from lib.errors import first_line
from lib.heatmap_model import HeatmapError, HeatmapModel
from lib.heatmap_settings import Heatmap, InputPlan
from lib.jsonfile import read_json, write_json
from lib.typed import build, plain

CONFIG = "config.json"
TRAINED = "heatmap.safetensors"  # of a training: everything that is trained but LoRA factors
MERGED = "model.safetensors"
# Of the backbone's config: what says nothing about its computation, and may hold a path of the machine it is from.
UNUSED = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "quantization_config")


@dataclass(frozen=True)
class HeatmapConfig:
    """What a folder's config.json says: the model, its backbone's config of transformers, and its input."""

    heatmap: Heatmap
    input: InputPlan
    backbone: Mapping[str, Any]


@dataclass(frozen=True)
class LoadedHeatmap:
    """A merged model, ready to compute."""

    model: HeatmapModel
    config: HeatmapConfig


def describe_backbone(config: Any) -> dict[str, Any]:
    """A backbone's config of transformers, without what depends on where it was read from."""
    described = config.to_diff_dict()
    return {key: value for key, value in described.items() if key not in UNUSED} | {"model_type": config.model_type}


def write_heatmap_config(folder: Path, config: HeatmapConfig) -> None:
    """Write config.json."""
    write_json(folder / CONFIG, plain(config))


def read_heatmap_config(folder: Path) -> HeatmapConfig:
    """
    Raises:
        HeatmapError: the folder is no heatmap model's.
    """
    try:
        said = read_json(folder / CONFIG)
        return HeatmapConfig(
            heatmap=build(Heatmap, said["heatmap"]),
            input=build(InputPlan, said["input"]),
            backbone=said["backbone"],
        )
    except OSError as error:
        raise HeatmapError(f"{folder} is no heatmap model: no {CONFIG} can be read there ({error.strerror})") from error
    except ValueError as error:
        raise HeatmapError(f"{folder} is no heatmap model: {error}") from error
    except KeyError as error:
        kind = f"it is of a model of type {said['model_type']}" if "model_type" in said else "it is not one of ours"
        raise HeatmapError(f"{folder} is no heatmap model: its {CONFIG} has no {error}; {kind}") from error
    except (TypeError, AttributeError) as error:
        raise HeatmapError(f"{folder} is no heatmap model: its {CONFIG} cannot be used ({error})") from error


def model_tensors(model: HeatmapModel) -> dict[str, Tensor]:
    """A model's weights and BatchNorm's statistics, by the names that files have."""
    # How many batches a BatchNorm saw decides about nothing, since it has a momentum.
    return {
        pinned_name(name): tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def save_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors, the same bytes for the same ones."""
    named = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    save_file(named, path, metadata={"format": "pt"})
    os.chmod(path, 0o644)  # safetensors makes it readable to the owner alone


def load_heatmap(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedHeatmap:
    """
    Load a merged model.

    Args:
        folder: with config.json and model.safetensors.
        dtype: of its weights; those of the file are converted.

    Raises:
        HeatmapError: there is no such model; or listing tensors that are missing, too many or of another shape.
    """
    from transformers import AutoConfig, AutoModel

    config = read_heatmap_config(folder)
    try:
        # Not of this folder: only the config of transformers is given, and nothing is fetched.
        backbone = AutoModel.from_config(AutoConfig.for_model(**config.backbone))
    except (ValueError, TypeError) as error:
        raise HeatmapError(f"{folder / CONFIG}: transformers makes no backbone of it ({first_line(error)})") from error
    model = HeatmapModel(backbone, config.heatmap)
    try:
        tensors = load_file(folder / MERGED)
    except FileNotFoundError as error:
        raise HeatmapError(f"{folder} has no {MERGED}: it is no merged heatmap model") from error
    except SafetensorError as error:
        raise HeatmapError(f"{folder / MERGED} is damaged: {first_line(error)}") from error
    put_weights(model, tensors, where=folder / MERGED)
    return LoadedHeatmap(model.to(device=device, dtype=dtype).eval(), config)


def put_weights(model: HeatmapModel, tensors: Mapping[str, Tensor], *, where: Path) -> None:
    """
    Fill a model from a file that has to hold all of it.

    Raises:
        HeatmapError: see `load_heatmap`.
    """
    expected = model_tensors(model)
    wrong = [f"  {name}: missing" for name in expected.keys() - tensors.keys()]
    wrong += [f"  {name}: unknown" for name in tensors.keys() - expected.keys()]
    wrong += [
        f"  {name}: {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if wrong:
        raise HeatmapError("\n".join([f"{where} does not fit its config:", *sorted(wrong)]))
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])


def normalize(pixels: Tensor, config: HeatmapConfig) -> Tensor:
    """
    The model's input of frames.

    Args:
        pixels: (batch, 3 · frames, height, width), uint8.

    Returns:
        The same shape, float32, each colour less its mean, by its deviation.
    """
    repeated = config.heatmap.frames
    mean, std = (
        torch.tensor(values * repeated, device=pixels.device).reshape(1, -1, 1, 1)
        for values in (config.input.mean, config.input.std)
    )
    return pixels.float().div_(255).sub_(mean).div_(std)
