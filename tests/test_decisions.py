"""What the plan settles is said before anything starts: 4 bits where 16 do not fit, and what is merged into what."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, run_snakemake
from tiny_adapter import write_constants

from lib.decisions import merge_decisions, training_decisions, type_decisions
from lib.quantize_path import QuantizePaths
from lib.spec import Project, resolve_project


def shipped(**merge: Any) -> Project:
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    for model in (each for each in config["models"].values() if "kind" not in each):
        model["merge"] = {**model.get("merge", {}), **merge}
    return resolve_project(config)


def merges(project: Project) -> dict[str, str]:
    return merge_decisions(project, QuantizePaths(project, []))


def test_the_32b_in_4_bits_since_16_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert training_decisions(shipped()) == {
        "deepseek32b": "deepseek32b: trained by qlora in bf16 on cuda (auto: 32.8 B weights, smallest planned GPU "
        "24 GiB; 65.5 GB in 16 bits do not fit the 51.5 GB of all GPUs)",
        "tracknet-demo": "tracknet-demo: trained by full in fp32 on cpu (as configured: every weight, without an "
        "adapter)",
    }


def test_types_to_choose_from_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert type_decisions(shipped()) == {}
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    config["models"]["deepseek32b"] |= {
        "quantize": {"types": "auto", "budget": {"gpu_memory": 24}},
        "quality": {"text": "data/quality.txt"},
    }
    said = type_decisions(resolve_project(config))["deepseek32b"]
    assert said == "deepseek32b: auto will be the best, as measured, of q5_k_m, q4_k_m, iq4_xs, q3_k_m that fits"


def test_a_merge_needs_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = merges(shipped())
    assert lines.keys() == {"demo", "deepseek32b"}
    said = re.fullmatch(
        r"deepseek32b: merged onto the original weights, by blocks of rows: ([0-9.]+) GB of RAM, where the whole of "
        r"them in FP16 takes 65\.5 GB; no fallback to 4 bits",
        lines["deepseek32b"],
    )
    assert said and float(said[1]) < 8
    held = merges(shipped(base_weights="nf4", device="cuda"))["deepseek32b"]
    assert "onto the weights of its 4-bit training, by blocks of rows: " in held and "GB of a GPU" in held


def test_the_way_that_is_taken_decides_about_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    project = shipped()
    model = project.models["deepseek32b"]
    staged = replace(model, quantize=replace(model.quantize, path="staged"))
    assert merges(project)["deepseek32b"] != merges(replace(project, models={"deepseek32b": staged}))["deepseek32b"]


def test_a_model_without_adapter_is_not_mentioned(tiny_base: Path) -> None:
    project = resolve_project({"models": {"m": {"base": {"path": str(tiny_base)}}}})
    assert training_decisions(project) == merges(project) == {}


def test_the_dry_run_says_it(tiny_base: Path, tmp_path: Path) -> None:
    write_constants(tmp_path / "run")
    shape = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))["models"]["deepseek32b"]["base"]["shape"]
    hub = {"hub": "maker/model", "revision": "main", "shape": shape}
    (tmp_path / "talks.jsonl").write_text("{}\n")
    models = {
        "taken": {"base": {"path": str(tiny_base)}, "adapter": {"path": "run"}},
        "trained": {"base": hub, "adapter": {"train": {"data": "talks.jsonl"}}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"hardware": {"gpus": [24, 24]}, "models": models}))
    done = run_snakemake(tmp_path, "-n", "models/taken.q4_k_m.gguf")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert sum(line.startswith("trained: trained by qlora in bf16 on cuda (auto: ") for line in lines) == 1
    for name in models:
        assert sum(line.startswith(f"{name}: merged onto the original weights, ") for line in lines) == 1
