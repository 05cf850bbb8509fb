"""What steps of heatmap models need: weights as transformers counts them, and memory that grows where it has to."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lib import heatmap_estimate as estimate
from lib.estimate import Needs
from lib.heatmap_spec import FPN, VIT, HeatmapModel
from lib.spec import resolve_project

# Published sizes of well-known models, as their config.json has them.
VIT_S = {
    "model_type": "vit", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
    "intermediate_size": 1536, "patch_size": 16, "image_size": 224,
}  # fmt: skip
DINOV2_S = {
    "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4,
    "patch_size": 14, "image_size": 518,
}  # fmt: skip
CONVNEXT_B = {"model_type": "convnext", "depths": [3, 3, 27, 3], "hidden_sizes": [128, 256, 512, 1024]}
SMALL = {"model_type": "convnext", "depths": [1, 2], "hidden_sizes": [16, 32], "num_stages": 2}
STEPS: dict[str, Callable[[HeatmapModel], Needs]] = {
    "fetch": estimate.fetch_needs,
    "make": estimate.make_clips_needs,
    "check": estimate.check_clips_needs,
    "train": estimate.train_needs,
    "merge": estimate.merge_needs,
    "export": estimate.export_needs,
    "evaluate": estimate.evaluate_needs,
}


def model(
    shape: dict[str, Any] | None = None,
    *,
    gpus: tuple[float, ...] = (24,),
    heatmap: dict[str, Any] | None = None,
    **train: Any,
) -> HeatmapModel:
    shape = VIT_S if shape is None else shape
    kind = FPN if "depths" in shape else VIT
    section = {
        "kind": "heatmap",
        "base": {"random": shape},
        "clips": {"synthetic": {}},
        "heatmap": {"model": kind, **(heatmap or {})},
        "adapter": {"train": train},
    }
    return resolve_project({"hardware": {"gpus": list(gpus)}, "models": {"t": section}}).heatmaps["t"]


@pytest.mark.parametrize(
    "shape", [VIT_S, DINOV2_S, CONVNEXT_B, SMALL], ids=["ViT-S", "DINOv2-S", "ConvNeXt-B", "small"]
)
def test_a_backbone_is_counted_as_transformers_does(shape: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        real = AutoModel.from_config(AutoConfig.for_model(**shape))
    counted = estimate.backbone_of(model(shape))
    linear = [module for name, module in real.named_modules() if isinstance(module, torch.nn.Linear)]
    linear = [module for module in linear if module is not getattr(getattr(real, "pooler", None), "dense", None)]
    assert counted.linear == sum(module.weight.numel() for module in linear)
    assert counted.widths == sum(module.in_features + module.out_features for module in linear)
    assert counted.parameters == pytest.approx(sum(each.numel() for each in real.parameters()), rel=0.02)


@pytest.mark.parametrize(
    ("shape", "heatmap"),
    [
        (VIT_S, {}),
        (VIT_S, {"channels": [48, 32], "factors": [2, 3], "squeeze_excite": True, "frames": 3}),
        (SMALL, {"fpn_channels": 32}),
        (SMALL, {"fpn_channels": 32, "fusion": "concat"}),
    ],
)
def test_decoder_and_head_are_counted_as_they_are_built(shape: dict[str, Any], heatmap: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModel

    from lib import heatmap_model

    asked = model(shape, heatmap=heatmap)
    built = heatmap_model.HeatmapModel(AutoModel.from_config(AutoConfig.for_model(**shape)), asked.heatmap)
    trained = sum(each.numel() for name, each in built.named_parameters() if not name.startswith("backbone."))
    assert estimate.decoder_parameters(asked) == trained


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", [VIT_S, CONVNEXT_B], ids=["ViT", "ConvNeXt"])
@pytest.mark.parametrize("gpus", [(), (24,)])
def test_all_numbers_are_whole_and_positive(step: str, shape: dict[str, Any], gpus: tuple[float, ...]) -> None:
    needs = STEPS[step](model(shape, gpus=gpus))
    assert {key: value for key, value in dataclasses.asdict(needs).items() if type(value) is not int} == {}
    assert min(needs.mem_mb, needs.disk_mb, needs.runtime) > 0
    assert (needs.gpu > 0) == (needs.gpu_mem_mb > 0) == bool(gpus and step in ("train", "evaluate"))


def test_what_is_trained_and_quantized_counts() -> None:
    large = {
        **VIT_S,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    sizes = {
        method: estimate.train_needs(model(large, method=method, per_device_train_batch_size=1)).gpu_mem_mb
        for method in ("full", "lora", "int8", "qlora")
    }
    assert sizes["full"] > 2 * max(sizes["lora"], sizes["int8"]) and min(sizes.values()) == sizes["qlora"]
    # 16 bytes of each of 304 M trained weights at least.
    assert sizes["full"] > 16 * 0.3e9 / 1e6
    frozen = model(large, method="int8", lora={"enabled": False}, per_device_train_batch_size=1)
    assert estimate.train_needs(frozen).gpu_mem_mb < sizes["int8"]


@pytest.mark.parametrize(
    ("settings", "grows"),
    [
        ({"per_device_train_batch_size": 64}, True),
        ({"precision": "fp32"}, True),
        ({"gradient_checkpointing": True}, False),
        ({"heatmap": {"input_size": [1024, 576]}}, True),
        ({"heatmap": {"channels": [256, 128, 128]}}, True),
    ],
)
def test_settings_that_take_memory(settings: dict[str, Any], grows: bool) -> None:
    usual, changed = (estimate.train_needs(model(**given)).gpu_mem_mb for given in ({}, settings))
    assert (changed > usual) == grows and changed != usual


def test_a_backbone_that_is_there_takes_no_disk(tmp_path: Path) -> None:
    random = model()
    there = dataclasses.replace(random, base=dataclasses.replace(random.base, path=str(tmp_path), random=None))
    assert estimate.fetch_needs(there).disk_mb == 1 < estimate.fetch_needs(random).disk_mb


def test_weights_in_memory_are_told_by_format() -> None:
    asked = model(CONVNEXT_B)
    sizes = [estimate.held_bytes(asked, kind) for kind in ("fp32", "fp16", "int8", "4-bit")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 4 * estimate.parameters(asked)


def test_planning_imports_nothing_heavy() -> None:
    code = "import sys; import lib.heatmap_estimate; print([n for n in ('torch', 'PIL', 'numpy') if n in sys.modules])"
    scripts = Path(__file__).resolve().parents[1] / "scripts"
    done = subprocess.run([sys.executable, "-c", code], cwd=scripts, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
