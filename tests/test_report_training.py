"""The report on a training run: what is written, and what is said where there is nothing to report on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, planned_rules, run_snakemake
from report_training import report_training
from test_training_report import record_of
from tiny import SHAPE

from lib.manifest import describe_files, write_folder_manifest
from lib.spec import resolve_project
from lib.targets import explain_target, wrong_targets
from lib.training_report import TrainingReportError, read_history, summarize_history

REPORT, PICTURE = "reports/tiny.training.json", "reports/tiny.training.png"


def write_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """An adapter's folder with the record of its training; `changes` replace keys of the record."""
    adapter = folder / "adapters/tiny"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    files = describe_files(adapter, ["adapter_config.json"], threads=1)
    manifest = write_folder_manifest(adapter, artifact="adapter", files=files, origin={})
    record = {**record_of(12), "adapter_digest": manifest["digest"], **changes}
    (folder / "work/tiny").mkdir(parents=True)
    (folder / "work/tiny/training.json").write_text(json.dumps(record), encoding="utf-8")
    return record


def report(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/report_training.py"), "--history", "work/tiny/training.json"]
    command += ["--adapter", "adapters/tiny", "--output", REPORT, "--picture", PICTURE, "--title", "tiny"]
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"}
    return subprocess.run(
        [*command, "--log", "report.log"], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_report_and_picture(tmp_path: Path) -> None:
    record = write_run(tmp_path)
    done = report(tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.splitlines() == [
        "tiny: 12 steps (2 epochs) in 2 min 05 s, loss 1.91 → 1.2, 803 tokens/s",
        f"{REPORT} and {PICTURE} written",
    ]
    history, _ = read_history(tmp_path / "work/tiny/training.json")
    written = json.loads((tmp_path / REPORT).read_text(encoding="utf-8"))
    assert written == {**record, "summary": summarize_history(history)}
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "reports").iterdir()} == {Path(REPORT).name, Path(PICTURE).name}


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    write_run(tmp_path)
    written = []
    for _ in range(2):
        assert report(tmp_path).returncode == 0
        written.append([(tmp_path / name).read_bytes() for name in (REPORT, PICTURE)])
    assert written[0] == written[1]


AGAIN = f"train it again with: snakemake -j1 {REPORT} -R train_adapter"


def refusal(folder: Path) -> str:
    with pytest.raises(TrainingReportError) as caught:
        report_training(
            history=Path("work/tiny/training.json"),
            adapter=Path("adapters/tiny"),
            title="tiny",
            output=Path(REPORT),
            picture=Path(PICTURE),
        )
    assert not (folder / "reports").exists()
    return str(caught.value)


def test_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    (tmp_path / "work/tiny/training.json").unlink()
    message = refusal(tmp_path)
    assert message.startswith("there is no record of the training of tiny")
    assert "trained elsewhere, or its record was removed" in message
    assert message.endswith(AGAIN)


def test_record_of_another_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, adapter_digest="f" * 64)
    message = refusal(tmp_path)
    assert "is the record of another adapter (ffffffffffff…) than the one in adapters/tiny (" in message
    assert message.endswith(AGAIN)


def test_damaged_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, seconds="long")
    message = refusal(tmp_path)
    assert "  seconds: expected a finite number, found 'long'" in message.splitlines()
    assert message.endswith(AGAIN)


@pytest.mark.parametrize("lost", ["work/tiny/training.json", "adapters/tiny/MANIFEST.json"])
def test_failures_are_plain_lines(lost: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / lost).unlink()
    done = report(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("report_training.py: ")
    assert lost in done.stderr and "Traceback" not in done.stderr


def test_both_files_are_targets_of_the_workflow(project: Path) -> None:
    for target in (REPORT, PICTURE):
        assert planned_rules(run_snakemake(project, "-n", target)) >= {"train_adapter", "report_training"}


@pytest.mark.slow
def test_the_rule_follows_the_adapter_and_not_its_record(project: Path) -> None:
    """The record is no input. Snakemake's own --touch takes all but the report as built, so nothing is trained."""
    write_run(project)
    made = ["bases/tiny/MANIFEST.json", "work/tiny/data.json", "adapters/tiny/adapter_model.safetensors"]
    for name in (*made, REPORT, PICTURE):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("{}")
    touched = run_snakemake(project, "-j1", "--touch", "--forceall", REPORT)
    assert touched.returncode == 0, touched.stderr
    (project / REPORT).unlink()
    assert planned_rules(run_snakemake(project, "-n", PICTURE, REPORT)) == {"report_training"}
    done = run_snakemake(project, "-j1", PICTURE, REPORT)
    assert done.returncode == 0, done.stderr
    assert json.loads((project / REPORT).read_text(encoding="utf-8"))["summary"]["seconds"] == 125.4
    (project / "work/tiny/training.json").write_text('{"another": "record"}')
    assert planned_rules(run_snakemake(project, "-n", REPORT)) == set()
    (project / "adapters/tiny/MANIFEST.json").write_text('{"another": "adapter"}')
    assert planned_rules(run_snakemake(project, "-n", REPORT)) == {"report_training"}


def test_models_that_are_not_trained_have_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talks.jsonl").write_text("{}\n")
    base = {"hub": "maker/model", "revision": "main", "shape": SHAPE}
    trained = {"base": base, "adapter": {"train": {"data": "talks.jsonl"}}}
    project = resolve_project({"models": {"tuned": trained, "plain": {"base": base}}})
    for ending in ("json", "png"):
        assert not re.fullmatch(wrong_targets(project), f"reports/tuned.training.{ending}")
        target = f"reports/plain.training.{ending}"
        assert re.fullmatch(wrong_targets(project), target)
        assert (
            explain_target(target, project) == f"{target}: plain has no adapter in config.yaml, so nothing was trained"
        )
