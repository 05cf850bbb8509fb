"""Folders of heatmap models: what is written is loaded again, and what is none says so in a line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_heatmap import BACKBONES, make_model, write_model

from lib.errors import ModelmillError
from lib.heatmap_folder import CONFIG, MERGED, load_heatmap, normalize, read_heatmap_config
from lib.heatmap_model import HeatmapError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "merged", frames=2, norm="bn", squeeze_excite=True)


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_model_computes_the_same_when_loaded(kind: str, tmp_path: Path) -> None:
    model, loaded = make_model(kind), load_heatmap(write_model(tmp_path / "m", kind))
    plan = loaded.config.input
    frames = torch.rand(1, 3, plan.height, plan.width)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(frames), model(frames), rtol=0, atol=0)
    assert not loaded.model.training


def test_the_same_model_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_model(tmp_path / "elsewhere", frames=2, norm="bn", squeeze_excite=True)
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
        assert str(folder.parent).encode() not in path.read_bytes()
        assert path.stat().st_mode & 0o777 == 0o644


def test_weights_are_converted(folder: Path) -> None:
    model = load_heatmap(folder, dtype=torch.bfloat16).model
    floating = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    assert floating == {torch.bfloat16}


def test_frames_are_normalised_as_the_processor_would(folder: Path) -> None:
    """ImageNet's figures by hand, for each frame's three colours."""
    config = read_heatmap_config(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 4, 5), dtype=np.uint8)
    expected = np.empty(pixels.shape)
    for channel in range(6):
        mean, std = (0.485, 0.456, 0.406)[channel % 3], (0.229, 0.224, 0.225)[channel % 3]
        expected[:, channel] = (pixels[:, channel] / 255.0 - mean) / std
    np.testing.assert_allclose(normalize(torch.from_numpy(pixels), config).numpy(), expected, atol=1e-6)


def broken(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "broken"
    copy.mkdir()
    for name in (CONFIG, MERGED):
        (copy / name).write_bytes((folder / name).read_bytes())
    return copy


def test_wrong_tensors_are_listed(folder: Path, tmp_path: Path) -> None:
    place = broken(folder, tmp_path)
    tensors = load_file(place / MERGED)
    tensors["odd"] = tensors.pop("head.bias")
    tensors["head.weight"] = tensors["head.weight"][:, :3].clone()
    save_file(tensors, place / MERGED)
    with pytest.raises(HeatmapError) as told:
        load_heatmap(place)
    assert str(told.value).splitlines() == [
        f"{place / MERGED} does not fit its config:",
        "  head.bias: missing",
        "  head.weight: (1, 3, 1, 1), expected (1, 8, 1, 1)",
        "  odd: unknown",
    ]


CONFIGS = {
    "a language model's": ({"model_type": "llama"}, "has no 'heatmap'; it is of a model of type llama"),
    "not one of ours": ({}, "has no 'heatmap'; it is not one of ours"),
    "a list": ([], "its config.json cannot be used"),
    "a text": ("model", "its config.json cannot be used"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_no_heatmap_model(kind: str, tmp_path: Path) -> None:
    content, said = CONFIGS[kind]
    (tmp_path / CONFIG).write_text(json.dumps(content))
    with pytest.raises(HeatmapError, match=said) as told:
        load_heatmap(tmp_path)
    assert len(str(told.value).splitlines()) == 1 and str(tmp_path) in str(told.value)


def test_no_folder_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(HeatmapError, match=r"is no heatmap model: no config.json can be read there \(No such file"):
        load_heatmap(tmp_path / "absent")
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(HeatmapError, match="is no valid JSON"):
        load_heatmap(tmp_path)


def test_damaged_weights_and_unknown_backbones(folder: Path, tmp_path: Path) -> None:
    place = broken(folder, tmp_path)
    content = (place / MERGED).read_bytes()
    (place / MERGED).write_bytes(content[: len(content) // 2])
    with pytest.raises(HeatmapError, match=f"{MERGED} is damaged"):
        load_heatmap(place)
    (place / MERGED).unlink()
    with pytest.raises(HeatmapError, match=f"has no {MERGED}"):
        load_heatmap(place)
    config = json.loads((place / CONFIG).read_text())
    config["backbone"]["model_type"] = "resnet_of_tomorrow"
    (place / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelmillError, match="transformers makes no backbone of it"):
        load_heatmap(place)
