"""Steps by the names of their logs: what is said of their needs is what the rules say."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import yaml
from conftest import run_snakemake
from test_plan import NEEDS
from tiny import SHAPE
from tiny_adapter import write_constants

from lib.cli import usable_cores
from lib.config_file import read_project
from lib.quantize_path import QuantizedFile, QuantizePaths
from lib.step_needs import Step, artifacts_of, heatmap_steps, judging_steps, needs_of, planned_steps, read_step

BASE = {"hub": "maker/model", "revision": "main", "shape": SHAPE}
TRAIN = {"train": {**tiny.TRAIN, "data": "train.jsonl"}}
MODELS = {
    "staged": {
        "base": BASE,
        "adapter": TRAIN,
        "quantize": {"path": "staged", "imatrix": {"text": "read.txt"}},
        "smoke": {"questions": "ask.jsonl", "min_gain": 0},
        "rag": {"documents": "notes", "questions": "ask.jsonl"},
    },
    "direct": {"base": BASE, "adapter": TRAIN, "quantize": {"path": "direct"}},
    "learned": {"base": BASE, "adapter": TRAIN, "quantize": {"path": "staged", "imatrix": {"text": "training"}}},
    "judged": {
        "base": BASE,
        "adapter": {"train": {**TRAIN["train"], "eval_fraction": 0.5}},
        "quality": {"text": "read.txt", "base_weights": True, "max_kld": 1},
    },
    "chosen": {
        "base": BASE,
        "quantize": {"types": "auto", "budget": {"file": 1}},
        "quality": {"text": "read.txt", "max_kld": 1},
    },
    "asked": {"base": BASE, "adapter": TRAIN, "quality": {"text": "read.txt", "types": ["q8_0"]}},
    "straight": {
        "base": BASE,
        "adapter": {"train": {**TRAIN["train"], "eval_fraction": 0.5}},
        "quantize": {"path": "direct", "imatrix": {"text": "training"}},
        "quality": {"text": "read.txt", "types": ["q6_k"], "general_text": "read.txt", "min_top1": 0.5},
    },
    "whole": {
        "base": BASE,
        "quantize": {"types": ["f16", "q8_0"], "path": "direct"},
        "quality": {"text": "read.txt", "max_kld": 1},
    },
    "brain": {
        "base": BASE,
        "quantize": {"types": ["bf16", "q8_0"]},
        "quality": {"text": "read.txt", "min_top1": 0.5},
    },
    "weighed": {
        "base": BASE,
        "adapter": {"train": {**TRAIN["train"], "eval_fraction": 0.5}},
        "quantize": {"types": "auto", "budget": {"file": 1}, "imatrix": {"text": "training"}},
        "quality": {"text": "read.txt"},
    },
    "taken": {"base": BASE, "adapter": {"path": "given"}, "quantize": {"types": ["f16"]}},
}
BACKBONE = {"model_type": "vit", "hidden_size": 96, "num_hidden_layers": 2, "patch_size": 8}
HEATMAP = {"kind": "heatmap", "base": {"random": BACKBONE}, "heatmap": {"model": "vit_heatmap"}}
HEATMAPS = {
    "drawn": {**HEATMAP, "clips": {"synthetic": {}, "eval_games": ["game4"]}, "adapter": {"train": {"method": "int8"}}},
    "filmed": {
        **HEATMAP,
        "clips": {"path": "tennis", "eval_games": ["game2"]},
        "adapter": {"train": {"device": "cpu"}},
    },
}
TARGETS = [
    "models/staged.Modelfile", "models/staged.base.q4_k_m.gguf", "models/staged.q8_0.Modelfile",
    "models/staged.adapter.gguf", "ollama/staged.json", "reports/staged.smoke.json", "reports/staged.rag.json",
    "models/direct.Modelfile", "models/direct.q4_k_m.gguf", "models/direct.q8_0.gguf", "models/taken.Modelfile",
    "models/learned.Modelfile", "reports/judged.quality.json", "work/judged/quality.json", "models/chosen.Modelfile",
    "work/chosen/quality.json",
    "models/drawn.onnx", "reports/drawn.eval.json", "models/filmed.onnx", "reports/filmed.eval.json",
]  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.write_data(Path("train.jsonl"))
    tiny.write_text(Path("read.txt"))
    write_constants(Path("given"))
    Path("ask.jsonl").write_text('{"question": "What?", "expect": [["that"]]}\n')
    Path("notes").mkdir()
    Path("notes/a.md").write_text("Text.")
    for game in ("game1", "game2"):
        Path("tennis", game, "Clip1").mkdir(parents=True)
        Path("tennis", game, "Clip1/Label.csv").write_text("")
    Path("config.yaml").write_text(yaml.safe_dump({"hardware": {"gpus": [24]}, "models": MODELS | HEATMAPS}))
    return tmp_path


def test_needs_are_those_of_the_rules(workplace: Path) -> None:
    """Of every job that a plan can have, by its log; none of them has another name there."""
    done = run_snakemake(workplace, "-n", *TARGETS)
    assert done.returncode == 0, done.stderr
    project = read_project([Path("config.yaml")], {})
    seen = set()
    for block in re.split(r"\n\[.*?\]\n", done.stdout + done.stderr)[1:]:
        log = re.search(r"\n    log: logs/(?:(\w+)/)?(\S+)\.log", block)
        asked = dict(each.split("=", 1) for each in re.search(r"\n    resources: (.*)", block)[1].split(", "))
        step = read_step(log[2])
        needs = needs_of(step, project.model(log[1] or "staged"), project, usable_cores())
        assert {name: str(getattr(needs, name)) for name in NEEDS} == {name: asked[name] for name in NEEDS}, log[2]
        seen.add(step.rule)
    assert seen == {
        "build_llama_cpp", "fetch_base", "check_base", "check_data", "train_adapter", "import_adapter",
        "convert_adapter", "merge_adapter", "convert_gguf", "check_calibration", "compute_imatrix", "quantize_gguf",
        "build_direct", "render_modelfile", "check_questions", "smoke_test", "check_documents",
        "answer_from_documents", "register_model", "make_clips", "check_clips", "train_heatmap", "merge_heatmap",
        "export_onnx", "evaluate_heatmap", "render_data", "check_quality_text", "measure_types", "measure_tuning",
        "compare_merges", "report_quality", "check_quality", "choose_type",
    }  # fmt: skip


def planned_by_snakemake(folder: Path, *targets: str) -> dict[str, set[str]]:
    """The logs of the jobs of a dry run, by model; those that are for all models by ""."""
    done = run_snakemake(folder, "-n", *targets)
    assert done.returncode == 0, done.stderr
    steps: dict[str, set[str]] = defaultdict(set)
    for name, step in re.findall(r"\n    log: logs/(?:(\w+)/)?(\S+)\.log", done.stdout + done.stderr):
        steps[name].add(step)
    return steps


def test_planned_steps_are_those_of_all(workplace: Path) -> None:
    project = read_project([Path("config.yaml")], {})
    paths = QuantizePaths(project, [])
    planned = planned_by_snakemake(workplace, "all")
    for name, model in project.models.items():
        direct = paths.is_direct(QuantizedFile(name, "", model.default_quant))
        assert set(planned_steps(model, direct=direct)) == planned[name] | planned[""], name


@pytest.mark.parametrize("keep", [True, False])
def test_judging_steps_are_what_the_report_adds(keep: bool, workplace: Path) -> None:
    """With the plan they are what one run of both has; that run keeps the 16-bit file until it is read."""
    config = yaml.safe_load(Path("config.yaml").read_text())
    for name in () if keep else ("taken", "whole", "brain"):  # whose default file is one in 16 bits
        del config["models"][name]
    Path("config.yaml").write_text(yaml.safe_dump({**config, "keep_intermediates": keep}))
    project = read_project([Path("config.yaml")], {})
    judged = {name: model for name, model in project.models.items() if model.quality}
    reports = [f"reports/{name}.quality.json" for name in judged]
    asked = planned_by_snakemake(workplace, "all", *reports)
    for name, model in judged.items():
        direct = model.quantize.path == "direct"
        steps = judging_steps(model, direct=direct, keep_intermediates=keep)
        assert {*planned_steps(model, direct=direct), *steps} == asked[name] | asked[""], name
    assert judging_steps(project.models["staged"], direct=False, keep_intermediates=keep) == []


def test_judging_steps_after_the_direct_path(workplace: Path) -> None:
    """What was built directly stays; the 16-bit file and, by it, the other types are made for the report."""
    model = read_project([Path("config.yaml")], {}).models["asked"]
    assert judging_steps(model, direct=True, keep_intermediates=True) == [
        "check_quality_text", "merge_adapter", "convert_gguf.f16", "quantize_gguf.q8_0", "measure_types",
        "report_quality",
    ]  # fmt: skip


def test_planned_steps_of_heatmap_models_are_those_of_all(workplace: Path) -> None:
    project = read_project([Path("config.yaml")], {})
    files = [file for name in HEATMAPS for file in (f"models/{name}.onnx", f"reports/{name}.eval.json")]
    done = run_snakemake(workplace, "-n", *files)
    planned = re.findall(r"\n    log: logs/(?:(\w+)/)?(\S+)\.log", done.stdout + done.stderr)
    for name, model in project.heatmaps.items():
        assert sorted(heatmap_steps(model)) == sorted(step for owner, step in planned if owner == name)
    filmed = project.heatmaps["filmed"]
    assert "make_clips" not in heatmap_steps(filmed)
    nothing_held_out = replace(filmed, clips=replace(filmed.clips, eval_games=()))
    assert heatmap_steps(nothing_held_out) == heatmap_steps(filmed)[:-1]


@pytest.mark.parametrize(
    ("log", "step", "artifacts"),
    [
        ("train_adapter", Step("train_adapter"), ["adapters/m"]),
        ("fetch_base", Step("fetch_base"), ["bases/m"]),
        ("compute_imatrix.base", Step("compute_imatrix", ".base"), ["models/m.base.imatrix.gguf"]),
        ("quantize_gguf.base.q4_0", Step("quantize_gguf", ".base", ("q4_0",)), ["models/m.base.q4_0.gguf"]),
        (
            "build_direct.q4_k_m_and_q8_0",
            Step("build_direct", "", ("q4_k_m", "q8_0")),
            ["models/m.q4_k_m.gguf", "models/m.q8_0.gguf"],
        ),
        ("train_heatmap", Step("train_heatmap"), ["adapters/m"]),
        ("export_onnx", Step("export_onnx"), ["models/m.onnx"]),
        ("render_modelfile.q8_0", Step("render_modelfile", "", ("q8_0",)), []),
    ],
)
def test_names_of_logs(log: str, step: Step, artifacts: list[str]) -> None:
    assert read_step(log) == step
    assert list(map(str, artifacts_of(step, "m"))) == artifacts


def test_a_rule_that_is_no_more(workplace: Path) -> None:
    project = read_project([Path("config.yaml")], {})
    assert needs_of(read_step("gone"), project.models["staged"], project) is None
