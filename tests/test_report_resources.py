"""The HTML report of a model that was built: what stands in it, with which captions, and that nothing is run for it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, copy_built, planned_rules, run_snakemake

from lib.usage import read_usage

MIB = 1 << 20
RESOURCES, PICTURE, TRAINING = "reports/tiny.resources.json", "reports/tiny.resources.png", "reports/tiny.training.png"


def embedded(page: str) -> dict[str, dict[str, Any]]:
    """The files that an HTML report holds, by path, as its own script reads them."""
    start = re.search(r"\bvar results = (?=\{\")", page)
    return json.JSONDecoder().raw_decode(page, start.end())[0]


def words(markup: str) -> str:
    return " ".join(unescape(re.sub("<[^>]*>", "", markup)).split())


@pytest.mark.slow
def test_the_report_of_a_built_model(built: Path, tmp_path: Path) -> None:
    project, checkout = copy_built(built, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*.gguf*")}

    done = run_snakemake(project, "-j1", PICTURE, TRAINING, checkout=checkout)
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"^(?:local)?rule (\w+):", done.stderr, re.M)) == {"report_resources", "report_training"}
    assert planned_rules(run_snakemake(project, "-n", PICTURE, TRAINING, checkout=checkout)) == set()
    check_figures(project)

    done = run_snakemake(project, "--report", "report.html", checkout=checkout)
    assert done.returncode == 0, done.stderr
    page = (project / "report.html").read_text(encoding="utf-8")
    files = embedded(page)
    said = {
        TRAINING: "The training run behind adapters/tiny.",
        PICTURE: "Each step of tiny: what its rule asks for (bar) and what was measured (dot)",
        "reports/tiny.smoke.json": "Held-out questions, answered by tiny and by its untuned base",
    }
    assert files.keys() == said.keys()
    for name, caption in said.items():
        assert words(files[name]["caption"]).startswith(caption)
        assert files[name]["labels"]["model"] == "tiny" and "{" not in files[name]["labels"]["shows"]
        assert files[name]["data_uri"].startswith("data:")
    assert "Models built by modelmill" in page

    # What lies elsewhere, or was cleaned away, is no reason to build it again.
    shutil.rmtree(project / "logs")
    shutil.rmtree(project / "bases")
    done = run_snakemake(project, "-j1", RESOURCES, checkout=checkout)
    assert done.returncode == 0, done.stderr
    report = json.loads((project / RESOURCES).read_text(encoding="utf-8"))
    assert not (project / "bases").exists()
    assert all(step["measured"] is None for step in report["steps"])
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*.gguf*")} == before


def check_figures(project: Path) -> None:
    """Each figure of the report against the file that it is from."""
    report = json.loads((project / RESOURCES).read_text(encoding="utf-8"))
    steps = {step["step"]: step for step in report["steps"]}
    logs = {path.stem: path for path in (project / "logs").rglob("*.jsonl") if path.stem != "report_training"}
    assert steps.keys() == logs.keys()
    assert {"train_adapter", "merge_adapter", "convert_gguf.f16", "quantize_gguf.base.q4_k_m"} <= steps.keys()
    for name, path in logs.items():
        record, usage = json.loads(path.read_text().splitlines()[-1]), read_usage(path.with_suffix(".log"))
        sampled = record["max_rss"] * MIB / 1e6 if record["max_rss"] != "NA" else 0
        measured = steps[name]["measured"]
        assert measured["seconds"] == record["s"] >= usage.seconds - 0.1
        assert measured["mem_mb"] == pytest.approx(max(sampled, usage.ram / 1e6), abs=0.1)
        # Both look now and then, and either may miss a program that ends between two looks.
        assert usage.ram / 1e6 >= 0.8 * sampled or record["s"] < 5
        assert 0 < measured["mem_mb"] < steps[name]["declared"]["mem_mb"]
    for name, size in report["artifacts"].items():
        listed = subprocess.run(["du", "-sb", "--apparent-size", name], cwd=project, capture_output=True, text=True)
        folders = 1 + sum(path.is_dir() for path in (project / name).rglob("*")) if (project / name).is_dir() else 0
        assert 0 <= int(listed.stdout.split()[0]) - size <= 8192 * folders, name
    assert steps["merge_adapter"]["measured"]["disk_mb"] == report["artifacts"]["models/tiny/merged"] / 1e6


def test_the_script_tells_an_unknown_model(project: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/report_resources.py"), "--model", "tinny"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "report_resources.py: --model: unknown model 'tinny'; did you mean 'tiny'?\n"


def test_nothing_is_planned_for_it(project: Path) -> None:
    assert planned_rules(run_snakemake(project, "-n", RESOURCES, PICTURE)) == {"report_resources"}
