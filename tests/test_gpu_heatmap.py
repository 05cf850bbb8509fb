"""Heatmap models on a real GPU: every method, what does not fit, memory offloaded, evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import heatmap_runs as runs
import merge_heatmap
import pytest
import torch

from lib.heatmap_folder import load_heatmap
from lib.micro_batch import release_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine"),
]
METHODS = ("full", "lora", "int8", "qlora")
PLAIN = {"lora": {"lora_dropout": 0.0}, "flip": 0.0}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_clips(tmp_path_factory.mktemp("clips") / "set")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    return {kind: runs.write_base(place / kind, kind) for kind in runs.BACKBONES}


def losses(output: Path) -> list[float]:
    return [step["loss"] for step in json.loads(Path(f"{output}.json").read_text())["steps"]]


@pytest.mark.parametrize("kind", runs.BACKBONES)
@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_the_cpu(
    bases: dict[str, Path], clips: Path, tmp_path: Path, method: str, kind: str
) -> None:
    asked = {"kind": kind, "method": method, "max_steps": 3, **PLAIN}
    runs.train(bases[kind], clips, tmp_path / "cpu", **asked)
    runs.train(bases[kind], clips, tmp_path / "gpu", **asked, device="cuda")
    allowed = {"int8": 0.05, "qlora": 0.02}.get(method, 0.01)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=allowed)
    assert json.loads(Path(tmp_path / "gpu.json").read_text())["peak_gpu_gb"][0] > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_16_bits_learn_as_well(
    bases: dict[str, Path], clips: Path, tmp_path: Path, method: str, precision: str
) -> None:
    runs.train(
        bases["vit"], clips, tmp_path / "a", method=method, device="cuda", precision=precision, max_steps=20, **PLAIN
    )
    found = losses(tmp_path / "a")
    assert sum(found[-5:]) < sum(found[:5])


@pytest.mark.parametrize("method", METHODS)
def test_memory_that_runs_out_splits_the_update(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Held to so little memory that not all frames of an update fit at a time."""
    # Of its own size: transformers' ViT takes its positions to another one only from a square.
    monkeypatch.setitem(runs.BACKBONES, "vit", {**runs.VIT, "image_size": [384, 768]})
    base = runs.write_base(tmp_path / "base")
    wide = {"shape": {"input_size": [768, 384]}, "method": method, "device": "cuda", "max_steps": 2}
    asked = {**wide, "per_device_train_batch_size": 12, **PLAIN}
    runs.train(base, clips, tmp_path / "free", **asked)
    peak = json.loads(Path(tmp_path / "free.json").read_text())["peak_gpu_gb"][0]
    release_memory()
    torch.cuda.reset_peak_memory_stats()
    whole = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(0.7 * peak * 1e9 / whole)
        runs.train(base, clips, tmp_path / "held", **asked)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    record = json.loads(Path(tmp_path / "held.json").read_text())
    assert record["steps"][-1]["micro_batch_size"] < 12
    assert losses(tmp_path / "held") == pytest.approx(losses(tmp_path / "free"), rel=0.02)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("method", METHODS[1:])
def test_weights_that_are_streamed_give_the_same_losses(
    bases: dict[str, Path], clips: Path, tmp_path: Path, method: str, place: str
) -> None:
    asked = {"method": method, "device": "cuda", "gradient_checkpointing": True, **PLAIN}
    offload = {f"use_{place}_offload": True, "offload_folder": str(tmp_path), "max_memory": {"0": "0MB"}}
    runs.train(bases["vit"], clips, tmp_path / "plain", **asked)
    runs.train(bases["vit"], clips, tmp_path / "streamed", **asked, offload=offload)
    assert losses(tmp_path / "streamed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


def test_what_was_trained_there_is_merged_and_computes_there(
    bases: dict[str, Path], clips: Path, tmp_path: Path
) -> None:
    runs.train(bases["convnext"], clips, tmp_path / "a", kind="convnext", method="qlora", device="cuda")
    merge_heatmap.merge_heatmap(
        base=bases["convnext"],
        base_manifest=None,
        adapter=tmp_path / "a",
        dtype="float32",
        output=tmp_path / "merged",
        threads=2,
    )
    frames = torch.rand(2, 3, 48, 96)
    with torch.no_grad():
        on_cpu = load_heatmap(tmp_path / "merged").model(frames)
        on_gpu = load_heatmap(tmp_path / "merged", device="cuda").model(frames.cuda()).cpu()
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)
