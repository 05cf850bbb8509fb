"""Estimates held against the runs of docs/measurements.md: never below the measured peak, at most a quarter above."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from lib import estimate, heatmap_estimate
from lib.sizes import CUDA_BYTES
from lib.spec import Hardware, Model, Shape, resolve_project

MEASUREMENTS = (ROOT / "docs/measurements.md").read_text(encoding="utf-8")
# Of DeepSeek-R1-Distill-Qwen's sizes and of SmolLM2-135M: hidden, layers, intermediate, heads, key-value heads,
# vocabulary, tied.
SHAPES = {
    "0.1B": (576, 30, 1536, 9, 3, 49152, True),
    "0.5B": (896, 24, 4864, 14, 2, 152064, True),
    "1.5B": (1536, 28, 8960, 12, 2, 152064, True),
    "7B": (3584, 28, 18944, 28, 4, 152064, False),
    "32B": (5120, 64, 27648, 40, 8, 152064, False),
}
KEYS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
KEYS += ("vocab_size", "tie_word_embeddings")

# The backbones of the heatmap models there, with the kind of model that they are in.
HEATMAPS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT-S/16": (
        "vit_heatmap",
        {
            "model_type": "vit", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
            "intermediate_size": 1536, "patch_size": 16, "image_size": [288, 512],
        },
    ),
    "ConvNeXt-B": (
        "convnext_fpn_heatmap",
        {"model_type": "convnext", "hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3]},
    ),
}  # fmt: skip


def table(heading: str) -> list[dict[str, str]]:
    """The rows of the table under a heading, by column."""
    section = MEASUREMENTS.partition(f"\n{heading}\n")[2].partition("\n#")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    header, _, *rows = lines
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """The shipped 32B with another shape and these training settings."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    for model in (each for each in config["models"].values() if "kind" not in each):
        model.pop("smoke", None), model.pop("rag", None)
        model["quality"] = {"text": str(ROOT / "README.md"), "types": ["q8_0", "q4_k_m"]}
        model["adapter"]["train"]["data"] = str(ROOT / "data/demo.jsonl")
    shipped = resolve_project(config).models["deepseek32b"]

    def model(size: str, **settings: Any) -> Model:
        shape = Shape(
            **dict(zip(KEYS, SHAPES[size], strict=True)), head_dim=None, num_experts=None, moe_intermediate_size=None
        )
        assert shipped.adapter is not None and shipped.adapter.train is not None
        train = replace(shipped.adapter.train, **settings)
        return replace(shipped, base=replace(shipped.base, shape=shape), adapter=replace(shipped.adapter, train=train))

    return model


def trained(make: Callable[..., Model], row: dict[str, str]) -> tuple[float, float | None]:
    """The estimate of a run's peak where its weights are, and of its RAM if that is on a GPU, in GB."""
    model = make(
        row["shape"],
        method=row["method"],
        precision=row["precision"],
        max_length=int(row["tokens"]),
        per_device_train_batch_size=int(row["batch"]),
        gradient_checkpointing=row["checkpointing"] == "yes",
        device="cpu" if row["cards"] == "CPU" else "cuda",
    )
    assert model.adapter is not None and model.adapter.train is not None
    shape, train = estimate.shape_of(model), model.adapter.train
    if row["cards"] == "CPU":
        return estimate.PYTHON_BYTES / 1e9 + estimate.training_bytes(shape, train) / 1e9, None
    cards = int(row["cards"])
    bytes_each = estimate.training_bytes(shape, train, cards=cards)
    return bytes_each / 1e9, estimate.training_ram(shape, train, cards=cards) / 1e9


def built(make: Callable[..., Model], row: dict[str, str]) -> float:
    """The estimate of a step's RAM in GB."""
    model, threads = make(row["shape"]), int(row["threads"])
    model = replace(model, merge=replace(model.merge, device="cuda" if row["on"] == "GPU" else "cpu"))
    needs = {
        "merge_adapter": lambda: estimate.merge_needs(model, threads),
        "build_direct": lambda: estimate.direct_needs(model, ["q4_k_m"], threads),
        "convert_gguf": lambda: estimate.convert_needs(model),
        "quantize_gguf": lambda: estimate.quantize_needs(model, "q4_k_m"),
    }[row["step"]]()
    return needs.mem_mb / 1000


def judged(make: Callable[..., Model], row: dict[str, str]) -> float:
    """The estimate of what judging takes of the card, or of RAM on the CPU, in GB."""
    device = {"GPU": "cuda", "CPU": "cpu"}[row["on"]]
    model = make(row["shape"], method="qlora", device=device, precision="fp32" if device == "cpu" else "bf16")
    assert model.quality is not None
    model = replace(model, quality=replace(model.quality, device=device))
    step = {"measure_types": estimate.measure_needs, "compare_merges": estimate.compare_merges_needs}[row["step"]]
    needs = step(model, Hardware(gpus=(80.0,), ram=64.0, disk=100.0))
    return (needs.gpu_mem_mb or needs.mem_mb) / 1000


TRAINED = table("### Memory of training")
BUILT = table("### Memory of the steps after it")
JUDGED = table("### Memory of judging files")
HEATMAPS_TRAINED = table("### Memory of training heatmap models")


def test_the_tables_hold_every_method_size_and_step() -> None:
    assert {row["method"] for row in TRAINED} == {"lora", "int8", "qlora"}
    assert {row["shape"] for row in TRAINED} == set(SHAPES) == {row["shape"] for row in BUILT} | {"7B"}
    assert {row["step"] for row in BUILT} == {"merge_adapter", "convert_gguf", "quantize_gguf", "build_direct"}
    assert len(TRAINED) >= 50 and len(BUILT) >= 20
    assert {(row["step"], row["on"]) for row in JUDGED} == set(
        product(("measure_types", "compare_merges"), ("GPU", "CPU"))
    )
    assert {row["backbone"] for row in HEATMAPS_TRAINED} == set(HEATMAPS) and len(HEATMAPS_TRAINED) == 24


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: "-".join(list(row.values())[:7]))
def test_training(row: dict[str, str], make: Callable[..., Model]) -> None:
    peak, memory = trained(make, row)
    assert float(row["peak, GB"]) <= peak <= 1.25 * float(row["peak, GB"])
    assert row["estimate, GB"] == f"{peak:.2f}"
    if memory is not None:
        assert float(row["RAM, GB"]) <= memory <= 1.25 * float(row["RAM, GB"])
        assert row["estimate of RAM, GB"] == f"{memory:.2f}"


def heatmap_peak(row: dict[str, str]) -> float:
    """The estimate of what a heatmap model's training takes of its card, in GB."""
    kind, shape = HEATMAPS[row["backbone"]]
    train = {
        "method": row["method"],
        "precision": row["precision"],
        "per_device_train_batch_size": int(row["batch"]),
        "gradient_checkpointing": row["checkpointing"] == "yes",
    }
    model = {"kind": "heatmap", "base": {"random": shape}, "clips": {"synthetic": {}}, "heatmap": {"model": kind}}
    config = {"hardware": {"gpus": [24]}, "models": {"t": {**model, "adapter": {"train": train}}}}
    return heatmap_estimate.training_bytes(resolve_project(config).heatmaps["t"]) / 1e9


@pytest.mark.parametrize("row", HEATMAPS_TRAINED, ids=lambda row: "-".join(list(row.values())[:5]))
def test_training_of_heatmap_models(row: dict[str, str]) -> None:
    peak = heatmap_peak(row)
    assert float(row["peak, GB"]) <= peak <= 1.25 * float(row["peak, GB"])
    assert row["estimate, GB"] == f"{peak:.2f}"


@pytest.mark.parametrize("row", BUILT, ids=lambda row: "-".join(list(row.values())[:4]))
def test_the_steps_after_it(row: dict[str, str], make: Callable[..., Model]) -> None:
    memory = built(make, row)
    assert float(row["peak, GB"]) <= memory <= 1.25 * float(row["peak, GB"])
    assert row["estimate, GB"] == f"{memory:.2f}"


@pytest.mark.parametrize("row", JUDGED, ids=lambda row: "-".join(list(row.values())[:3]))
def test_judging(row: dict[str, str], make: Callable[..., Model]) -> None:
    memory = judged(make, row)
    assert float(row["peak, GB"]) <= memory <= 1.25 * float(row["peak, GB"])
    assert row["estimate, GB"] == f"{memory:.2f}"


def test_what_a_card_is_asked_for_is_the_estimate_and_cudas_own(make: Callable[..., Model]) -> None:
    """On as many cards as it takes; more than there are is not cut, so that the plan does not fit."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    del config["models"]["demo"]
    config["models"]["deepseek32b"]["adapter"]["train"]["data"] = str(ROOT / "data/demo.jsonl")
    hardware = resolve_project(config).hardware
    model = make("32B")
    assert model.adapter is not None and model.adapter.train is not None
    needs = estimate.train_needs(model, hardware)
    each = estimate.training_bytes(estimate.shape_of(model), model.adapter.train, cards=2)
    assert needs.gpu == 2 and needs.gpu_mem_mb == pytest.approx((each + CUDA_BYTES) / 1e6, abs=1)
    plain = estimate.train_needs(make("32B", method="lora", precision="bf16"), hardware)
    assert plain.gpu == 2 and plain.gpu_mem_mb > 24 * 1074


def test_no_table_is_without_its_machine() -> None:
    assert re.search(r"H200 × 2, 2026-11-23", MEASUREMENTS.partition("## What steps need")[2])
    assert Path(ROOT / "benchmarks/bench_memory.py").is_file()
