"""The whole chain of a heatmap model by Snakemake, for each method: clips, training, merging, ONNX, evaluation."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, planned_rules, run_snakemake
from heatmap_runs import VIT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

METHODS = ("full", "int8", "qlora")
REPORTS = [f"reports/{method}.{kind}" for method in METHODS for kind in ("training.png", "eval.json")]
SIZES = {"input_size": [96, 48], "heatmap_size": [48, 24], "channels": [16, 16], "factors": [2, 2]}


def write_project(folder: Path) -> Path:
    """A model of each method, and clips of their own for each."""
    train = {"device": "cpu", "num_train_epochs": 1, "per_device_train_batch_size": 4, "save_steps": 0, "eval_steps": 2}
    models = {
        method: {
            "kind": "heatmap",
            "base": {"random": VIT},
            "clips": {
                "synthetic": {"games": 2, "clips": 1, "frames": 12, "size": [192, 96]},
                "eval_games": ["game2"],
            },
            "heatmap": {"model": "vit_heatmap", **SIZES},
            "adapter": {"train": {"method": method, **train}},
        }
        for method in METHODS
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"models": models}))
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_project(tmp_path_factory.mktemp("heatmaps") / "project")
    done = run_snakemake(folder, "-j1", "all", *REPORTS)
    assert done.returncode == 0, done.stderr
    return folder


def verify(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/verify.py"), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_nothing_is_left_to_do(built: Path) -> None:
    assert planned_rules(run_snakemake(built, "-n", "all")) == set()
    assert not any(path.name.startswith(".") for path in (built / "models").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_leaves_what_it_should(built: Path, method: str) -> None:
    report = json.loads((built / f"reports/{method}.eval.json").read_text())
    assert (
        report["games"] == ["game2"] and sum(report["frames"][key] for key in ("positive", "empty", "left_out")) == 12
    )
    assert len(list((built / f"reports/{method}.overlays").glob("*.png"))) > 0
    adapter = json.loads((built / f"adapters/{method}/MANIFEST.json").read_text())
    assert ("adapter_config.json" in adapter["files"]) == (method != "full")
    assert adapter["origin"]["settings"]["method"] == method
    training = json.loads((built / f"reports/{method}.training.json").read_text())
    assert training["unit"] == "frames" and training["summary"]["median_frames_per_second"] > 0
    events = EventAccumulator(str(built / f"reports/{method}.tensorboard")).Reload()
    assert {"train/loss", "train/frames_per_second", "eval/loss"} <= set(events.Tags()["scalars"])
    first = events.Images("held_out/0")[0]
    assert (first.width, first.height) > (96, 48)  # a frame with a line below it


@pytest.mark.slow
def test_every_artifact_can_be_verified(built: Path) -> None:
    artifacts = [built / f"models/{method}.onnx" for method in METHODS]
    artifacts += [built / f"{folder}/{method}" for method in METHODS for folder in ("adapters", "bases")]
    artifacts += [built / f"models/{method}/merged" for method in METHODS]
    done = verify(*artifacts)
    assert done.returncode == 0, done.stderr
    weights = built / "models/full/merged/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        done = verify(built / "models/full/merged")
        assert done.returncode == 1 and "model.safetensors" in done.stderr
    finally:
        weights.write_bytes(content)


@pytest.mark.slow
def test_clips_are_predicted_from_the_onnx_file(built: Path, tmp_path: Path) -> None:
    clip, table = built / "work/full/clips/game2/Clip1", tmp_path / "balls.csv"
    command = [sys.executable, str(ROOT / "scripts/predict_heatmap.py"), str(clip), "--model"]
    done = subprocess.run(
        [*command, str(built / "models/full.onnx"), "--threshold", "0.001", "--output", str(table)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file name"] for row in rows] == [f"{number:04d}.jpg" for number in range(12)]


@pytest.mark.slow
def test_methods_are_compared_by_one_command(built: Path, tmp_path: Path) -> None:
    sizes = ["--model", "vit_heatmap", "--input-size", "96", "48", "--heatmap-size", "48", "24"]
    sizes += ["--channels", "16", "16", "--factors", "2", "2"]
    run = ["--device", "cpu", "--max-steps", "2", "--per-device-train-batch-size", "4", "--save-steps", "0"]
    command = [sys.executable, str(ROOT / "scripts/compare_heatmaps.py"), "--base", str(built / "bases/full")]
    command += ["--clips", str(built / "work/full/clips"), "--eval-games", "game2", *sizes, *run]
    done = subprocess.run([*command, "--output", str(tmp_path / "methods.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "methods.json").read_text())
    assert list(report["methods"]) == ["full", "int8", "qlora"]
    for figures in report["methods"].values():
        assert figures["steps"] == 2 and figures["frames_per_second"] > 0 and figures["peak_ram_gb"] > 0.2
        assert 0 <= figures["f1"] <= 1
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
