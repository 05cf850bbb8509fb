"""Training: the loss falls, the method is the one asked for, and the same run gives the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from conftest import ROOT

from lib.config import definition, with_defaults
from lib.dataset import IGNORED, Sample
from lib.train_settings import Train
from lib.training import TrainingError, encode_samples, load_base, pad_batch
from lib.typed import build


def train(base: Path, data: Path, output: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script on the tiny model, with its test settings changed by `options`."""
    command = [sys.executable, str(ROOT / "scripts/train_adapter.py"), "--base", str(base), "--data", str(data)]
    command += ["--output", str(output), "--device", "cpu", "--threads", "2", "--dtype", "float32", "--r", "4"]
    command += ["--bnb-4bit-compute-dtype", "float32", "--num-train-epochs", "2", "--learning-rate", "0.01"]
    log = ["--log", str(output.with_suffix(".log"))]
    return subprocess.run([*command, *log, *options], capture_output=True, text=True, env={**os.environ, **environment})


def losses(output: Path) -> list[float]:
    return [float(value) for value in re.findall(r"step \d+ .*loss ([\d.]+)", output.with_suffix(".log").read_text())]


def test_batch_is_padded_to_its_longest_sample() -> None:
    batch = pad_batch([Sample([5, 6, 7], [IGNORED, 6, 7], 0), Sample([8], [8], 0)], pad=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--method", "lora"), ("--method", "qlora", "--gradient-checkpointing")])
def test_loss_falls_and_the_adapter_is_complete(options: tuple[str, ...], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "adapter"
    data = tiny.write_data(tmp_path / "data.jsonl", repeats=4)
    done = train(tiny_base, data, output, *options, "--num-train-epochs", "6")
    assert done.returncode == 0, done.stderr
    assert sum(losses(output)[-3:]) < 0.8 * sum(losses(output)[:3])
    assert {path.name for path in output.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "MANIFEST.json",
    }
    manifest = json.loads((output / "MANIFEST.json").read_text())
    assert manifest["origin"]["settings"]["method"] == options[1]
    assert manifest["origin"]["data"] == {
        "name": "data.jsonl", "size": data.stat().st_size, "sha256": manifest["origin"]["data"]["sha256"]
    }  # fmt: skip
    assert str(tmp_path) not in (output / "MANIFEST.json").read_text()


@pytest.mark.slow
def test_the_environments_thread_count_changes_no_adapter(tiny_base: Path, tmp_path: Path) -> None:
    """Snakemake exports OMP_NUM_THREADS by -j; the run's own number of threads is what counts."""
    data = tiny.write_data(tmp_path / "data.jsonl")
    weights = []
    for threads in ("1", "2"):
        output = tmp_path / threads / "adapter"
        output.parent.mkdir()
        done = train(tiny_base, data, output, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
        assert done.returncode == 0, done.stderr
        weights.append((output / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-modules", "q_prj"), "q_prj"),
        (("--max-length", "8"), "max_length 8 cuts all that the assistant says"),
        (("--device", "cuda"), "set train.device: cpu"),
    ],
)
def test_what_cannot_be_trained(options: tuple[str, ...], message: str, tiny_base: Path, tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data.jsonl")
    done = train(tiny_base, data, tmp_path / "adapter", *options, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "adapter").exists()


def set_model_type(folder: Path, value: str | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": value}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda base: (base / "tokenizer.json").write_text("{bad"), "cannot load its tokenizer (JSONDecodeError: "),
        (lambda base: (base / "tokenizer.json").write_text("{}"), "cannot load its tokenizer (KeyError: "),
        (lambda base: set_model_type(base, "foo"), "model type `foo`"),
        (lambda base: (base / "config.json").unlink(), "config.json"),
        (lambda base: (base / "config.json").write_text("{bad"), "not a valid JSON file"),
        (lambda base: next(base.glob("*-00001-*")).write_bytes(b"short"), "cannot load its weights (SafetensorError: "),
    ],
    ids=["damaged tokenizer", "empty tokenizer", "unknown type", "no config", "damaged config", "cut weights"],
)
def test_a_base_that_transformers_refuses_is_named(
    damage: Callable[[Path], object], said: str, tiny_base: Path, tmp_path: Path
) -> None:
    """Called as by the script once a manifest has vouched for the folder."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    damage(base)
    asked = {**tiny.TRAIN, "method": "lora"}
    settings = build(Train, with_defaults(asked, definition("train")))
    with pytest.raises(TrainingError) as refused:
        encode_samples(base=base, data=tiny.write_data(tmp_path / "data.jsonl"), max_length=64)
        load_base(base, settings)
    assert str(refused.value).startswith(f"{base}: transformers cannot load its ")
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
