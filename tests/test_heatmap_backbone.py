"""Backbones of heatmap models: made of a config alone, or fetched and held against what the plan was made with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fetch_base
import pytest
from conftest import ROOT
from heatmap_runs import BACKBONES, VIT, write_base
from transformers import AutoModel

from lib.checkpoint import CheckpointError
from lib.manifest import read_folder_manifest


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_seed_gives_the_same_weights(kind: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_base(tmp_path / name, kind)
    one, two = (read_folder_manifest(tmp_path / name, artifact="base") for name in ("one", "two"))
    assert one == two and one["origin"]["config"] == BACKBONES[kind]
    model = AutoModel.from_pretrained(tmp_path / "one")
    assert model.config.model_type == kind


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    write_base(tmp_path / "one")
    fetch_base.make_random(config=VIT, seed=1, output=tmp_path / "two", threads=1)
    one, two = (read_folder_manifest(tmp_path / name, artifact="base") for name in ("one", "two"))
    assert one["files"]["config.json"] == two["files"]["config.json"] and one["digest"] != two["digest"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "vitt"}, "cannot make a vitt of it"),
        ({**VIT, "hidden_act": "none of them"}, "cannot make a vit of it"),
        ({"model_type": "convnext", "depths": [1], "hidden_sizes": [8, 16]}, "cannot make a convnext of it"),
    ],
)
def test_a_config_that_contradicts_itself(config: dict[str, object], said: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/fetch_base.py"), f"--random={json.dumps(config)}"]
    done = subprocess.run([*command, "--output", str(tmp_path / "base")], capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "base").exists()


def test_a_fetched_backbone_is_held_against_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*, repo_id: str, revision: str, output: Path) -> str:
        output.mkdir()
        (output / "config.json").write_text(json.dumps({**VIT, "image_size": 224}))
        return "c" * 40

    monkeypatch.setattr(fetch_base, "download_checkpoint", download)
    shared = {"repo_id": "owner/backbone", "revision": "main", "shape": None, "threads": 1}
    with pytest.raises(CheckpointError, match="hidden_size: 64 in config.yaml, 32 in the checkpoint"):
        fetch_base.fetch_hub(output=tmp_path / "wrong", backbone={**VIT, "hidden_size": 64}, **shared)
    assert not (tmp_path / "wrong/MANIFEST.json").exists()
