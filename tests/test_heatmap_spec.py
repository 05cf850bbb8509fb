"""Heatmap models of config.yaml resolved: defaults, files, options of scripts, and what goes to which family."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import SHAPE
from transformers import AutoConfig

from lib.config import ConfigError, definition
from lib.heatmap_settings import ClipUse, Evaluation, Heatmap, TrainHeatmap
from lib.heatmap_spec import HeatmapModel
from lib.options import add_settings, as_options, settings_from
from lib.spec import Project, resolve_project
from lib.typed import build, plain

VIT = {"model_type": "vit", "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 8}
CONVNEXT = {"model_type": "convnext", "depths": [1, 2], "hidden_sizes": [8, 16]}
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a backbone and clips that configs name."""
    monkeypatch.chdir(tmp_path)
    for name in ("game1/Clip1", "game1/Clip2", "game2/Clip1"):
        Path("tennis", name).mkdir(parents=True)
        Path("tennis", name, "Label.csv").write_text("file name,visibility,x-coordinate,y-coordinate,status\n")
    Path("own").mkdir()
    Path("own/config.json").write_text(json.dumps({**VIT, "image_size": 64, "qkv_bias": True}))
    Path("talks.jsonl").write_text("{}\n")
    return tmp_path


def project(*, hardware: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **model: Any) -> Project:
    """The project with a heatmap model `t`, on a random ViT and drawn clips unless said otherwise."""
    model = {
        "kind": "heatmap",
        "base": {"random": VIT},
        "clips": {"synthetic": {}},
        "heatmap": {"model": "vit_heatmap"},
        "adapter": {"train": train or {}},
        **model,
    }
    return resolve_project({"hardware": hardware or {}, "models": {"t": model}})


def resolve(**settings: Any) -> HeatmapModel:
    return project(**settings).heatmaps["t"]


def problems(**settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        resolve(**settings)
    return [line.strip() for line in str(refused.value).splitlines()[1:]]


def test_each_family_has_its_models() -> None:
    language = {"base": {"hub": "maker/model", "revision": "main", "shape": SHAPE}}
    heatmap = {
        "kind": "heatmap",
        "base": {"random": CONVNEXT, "seed": 3},
        "clips": {"path": "tennis"},
        "heatmap": {"model": "convnext_fpn_heatmap"},
        "adapter": {"train": {}},
    }
    found = resolve_project({"models": {"m": language, "t": heatmap, "n": {**language, "kind": "language"}}})
    assert (list(found.models), list(found.heatmaps), found.names) == (["m", "n"], ["t"], ["m", "n", "t"])
    assert found.heatmaps["t"].base.seed == 3
    assert list(found.heatmaps["t"].base.shape["hidden_sizes"]) == [8, 16]


def test_the_documents_advice_is_the_default() -> None:
    """Batch sizes, rates, epochs and warm-up of the source's tables; QLoRA's 5 of 30 epochs."""
    advice = {"full": (16, 5e-4, 20, 3 / 20), "int8": (8, 3e-4, 20, 2 / 20), "qlora": (4, 1e-4, 30, 5 / 30)}
    advice["lora"] = advice["int8"]
    assert definition("train_heatmap")["properties"]["method"]["default"] == "full"
    for method, expected in advice.items():
        found = resolve(train={"method": method}).adapter.train
        names = ("per_device_train_batch_size", "learning_rate", "num_train_epochs", "warmup_steps")
        assert [getattr(found, name) for name in names] == pytest.approx(expected, rel=1e-3)
    lora = resolve(train={"method": "qlora"}).adapter.train.lora
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.bias) == (16, 32, 0.1, "none")
    assert (lora.target_modules, lora.task_type, lora.enabled) == ((), "FEATURE_EXTRACTION", True)
    assert resolve(train={"method": "qlora", "learning_rate": 2e-4}).adapter.train.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("gpus", "said", "device", "precision"),
    [
        ([], {}, "cpu", "fp32"),
        ([24], {}, "cuda", "bf16"),
        ([24], {"device": "cpu"}, "cpu", "fp32"),
        ([24], {"precision": "fp16"}, "cuda", "fp16"),
        ([], {"precision": "bf16", "method": "int8"}, "cpu", "bf16"),
    ],
)
def test_the_precision_depends_on_the_device(
    gpus: list[float], said: dict[str, Any], device: str, precision: str
) -> None:
    found = resolve(hardware={"gpus": gpus}, train=said).adapter.train
    assert (found.device, found.precision) == (device, precision)


def test_a_backbone_that_is_there_gives_its_own_numbers() -> None:
    base = resolve(base={"path": "own"}, clips={"path": "tennis", "eval_games": ["game2"]}).base
    assert dict(base.shape) == {**VIT, "image_size": 64}  # the numbers that are counted by, and no others
    assert base.random is None


def test_the_config_of_a_random_dinov2_is_one_that_transformers_takes() -> None:
    """Its `mlp_ratio` is a whole number, and 2.0 is refused."""
    random = resolve(base={"random": {**VIT, "model_type": "dinov2", "mlp_ratio": 2, "image_size": 64}}).base.random
    assert random is not None
    assert AutoConfig.for_model(**random).mlp_ratio == 2


def test_a_repository_needs_its_shape() -> None:
    hub = {"hub": "maker/vit", "revision": "main"}
    assert dict(resolve(base={**hub, "shape": VIT}).base.shape) == VIT
    (line,) = problems(base=hub)
    assert line == "models.t.base: 'shape' is a dependency of 'hub': they belong together"


def test_a_frozen_8_bit_backbone() -> None:
    train = {"method": "int8", "lora": {"enabled": False}, "quantization": {"load_in_8bit": True}}
    assert resolve(train=train).adapter.train.lora.enabled is False
    assert "--no-lora-enabled" in as_options(resolve(train=train).adapter.train)


def test_mistakes_of_both_families_are_told_in_one_run() -> None:
    told = problems(
        base={"random": {**VIT, "num_attention_heads": 5}},
        heatmap={"model": "convnext_fpn_heatmap", "channels": [8]},
        clips={"synthetic": {}, "eval_games": ["game5"]},
        train={"lora": {"enabled": False}},
        quantize={"types": ["q8_0"]},
    )
    keys = ["models.t: unknown key 'quantize'; language models have it", "models.t.base.random.num_attention_heads: "]
    keys += ["models.t.heatmap.model: ", "models.t.clips.eval_games: ", "models.t.heatmap: channels has 1 entries "]
    assert len(told) == len(keys)  # what `adapter` says with other sections is not known beside a key that is none
    assert all(any(line.startswith(key) for line in told) for key in keys)


SECTIONS: dict[str, tuple[type, Callable[[HeatmapModel], Any], tuple[str, ...]]] = {
    "heatmap": (Heatmap, lambda model: model.heatmap, ()),
    "clips": (ClipUse, lambda model: model.clips.use, ("path", "synthetic")),
    "train_heatmap": (TrainHeatmap, lambda model: model.adapter.train, ()),
    "evaluation": (Evaluation, lambda model: model.evaluation, ()),
}


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("far", [False, True], ids=["defaults", "all set"])
def test_what_a_rule_writes_a_script_reads(section: str, far: bool) -> None:
    settings = {
        "heatmap": {
            "model": "vit_heatmap",
            "input_size": [256.0, 144],
            "channels": [48, 32],
            "factors": [2, 3],
            "squeeze_excite": True,
            "sigma": 1,
        },
        "clips": {"synthetic": {}, "eval_games": ["game2", "game4"], "occluded": "target"},
        "train": {
            "method": "int8",
            "lora": {"enabled": False, "target_modules": ["query", "value"]},
            "freeze_backbone_epochs": 2,
            "flip": 0,
            "load_best_model_at_end": True,
        },
        "evaluation": {"threshold": 0.4, "distance": 4},
    }
    kind, part, without = SECTIONS[section]
    written = part(resolve(**(settings if far else {})))
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_settings(parser, section, without=without)
    import shlex

    read = settings_from(parser.parse_args(shlex.split(as_options(written))), section)
    assert plain(build(kind, read)) == plain(written)


def test_nothing_heavy_is_imported_for_a_plan() -> None:
    code = (
        "import sys; import lib.spec; print([n for n in ('torch', 'transformers', 'PIL', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
