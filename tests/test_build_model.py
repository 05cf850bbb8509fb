"""build_model.py: what it plans for an adapter, what it refuses, how it ends; test_coming_from.py builds with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from build_model import refuse_loss
from conftest import ROOT, planned_rules, write_project
from tiny_adapter import write_constants

from lib.cli import UsageError
from lib.manifest import describe_files, write_folder_manifest

REFERENCE = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
HUB = REFERENCE["models"]["deepseek32b"]["base"]
NEW = {"build_llama_cpp", "fetch_base", "check_base", "import_adapter", "build_direct", "render_modelfile"}
# A `snakemake` that says that it runs, and ends when it is told to.
SLOW = """
import pathlib, signal, sys, time
def stop(number, _):
    pathlib.Path("stopped").write_text(str(number))
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
pathlib.Path("running").touch()
time.sleep(60)
"""


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A project with the tiny model and the 32B, two adapters of the one and a newer one of the other."""
    folder = write_project(tmp_path / "project", base=tiny_base)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    config["models"]["tiny"]["quantize"] = {"types": ["q8_0"]}
    config["models"]["deepseek32b"] = {"base": HUB}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    for number, (name, base) in enumerate([("a/final", tiny_base), ("b/final", tiny_base), ("lora_ds", HUB["hub"])]):
        write_constants(folder / "outputs" / name, written=1_700_000_000 + number, base_model_name_or_path=str(base))
    return folder


def build(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/build_model.py"), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    assert "Traceback" not in done.stderr, done.stderr
    return done


def request(folder: Path, name: str) -> dict[str, Any]:
    """What was written down of a model."""
    return yaml.safe_load((folder / f"work/build_model/{name}.yaml").read_text(encoding="utf-8"))["models"][name]


def test_the_newest_adapter_of_the_32b_is_planned(folder: Path) -> None:
    before = (folder / "config.yaml").read_bytes()
    done = build(folder, "--adapter", "latest", "-n")
    assert planned_rules(done) == NEW
    said = done.stderr.splitlines()
    assert "adapter   outputs/lora_ds" in said
    assert f"base      {HUB['hub']} at main" in said
    assert "builds    models/lora_ds.q4_k_m.gguf, models/lora_ds.Modelfile" in said
    assert any(line.startswith("lora_ds: merged onto the original weights, by blocks of rows: ") for line in said)
    assert request(folder, "lora_ds") == {
        "base": {**HUB, "import_dtype": "float16"},
        "adapter": {"path": "outputs/lora_ds"},
    }
    assert (folder / "config.yaml").read_bytes() == before
    assert {path.name for path in folder.iterdir()} <= {
        *("train.jsonl", "ask.jsonl", "config.yaml", "outputs", "work", ".snakemake")
    }


def test_a_base_that_was_fetched_is_not_fetched_again(folder: Path) -> None:
    base = folder / "bases/deepseek32b"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(HUB["shape"]))
    files = describe_files(base, ["config.json"], threads=1)
    write_folder_manifest(
        base, artifact="base", files=files, origin={"kind": "hub", "name": HUB["hub"], "revision": "c"}
    )
    done = build(folder, "--adapter", "outputs/lora_ds", "-n")
    assert planned_rules(done) == NEW  # listing its files, in place
    assert "base      bases/deepseek32b" in done.stderr.splitlines()


def test_settings_come_from_options_and_from_a_model_that_it_is_like(folder: Path) -> None:
    options = ["--like", "tiny", "--set", "ollama.parameters.temperature=0.1", "merge.dtype=bfloat16", "--ollama", "-n"]
    done = build(folder, "--adapter", "outputs/a/final", "--name", "second", *options, "--", "--quiet", "host")
    assert planned_rules(done) == {*NEW, "check_questions", "register_model"}
    assert "builds    models/second.q8_0.gguf, models/second.Modelfile, ollama/second.json" in done.stderr.splitlines()
    assert "SNAKEMAKE" not in done.stderr + done.stdout  # the host's table is what --quiet host leaves out
    asked = request(folder, "second")
    assert asked["ollama"] == {"system": "答えは短く。", "parameters": {"temperature": 0.1, "stop": ["END"]}}
    assert (asked["merge"], asked["quantize"]) == ({"max_shard_size": 1, "dtype": "bfloat16"}, {"types": ["q8_0"]})


def test_without_any_config(folder: Path, tiny_base: Path) -> None:
    (folder / "config.yaml").unlink()
    done = build(folder, "--adapter", "outputs/a/final", "--base", str(tiny_base), "-n")
    assert planned_rules(done) == NEW
    assert done.stderr.count("config.yaml") == 0


def test_another_config_is_put_over_it(folder: Path) -> None:
    (folder / "more.yaml").write_text(yaml.safe_dump({"models": {"b": {"base": {**HUB, "hub": "maker/b"}}}}))
    done = build(folder, "--adapter", "outputs/a/final", "--config", "more.yaml", "--base", "maker/b", "-n")
    assert planned_rules(done) == NEW
    assert request(folder, "final")["base"]["hub"] == "maker/b"


WRONG: dict[str, tuple[list[str], int, str]] = {
    "no adapter said": ([], 2, "the following arguments are required: --adapter"),
    "no such adapter": (["--adapter", "gone"], 1, "--adapter: gone is no complete adapter: there is no such folder"),
    "no adapters": (["--adapter", "latest", "--latest-in", "bases"], 1, "--adapter latest: there is no folder bases"),
    "no such base": (["--adapter", "outputs/a/final", "--base", "gone"], 2, "the base 'gone' is neither a folder here"),
    "no checkpoint": (["--adapter", "outputs/a/final", "--base", "outputs"], 1, "there is no file outputs/config.json"),
    "no revision": (["--adapter", "outputs/a/final", "--base", "maker/x"], 2, "--base maker/x: which revision?"),
    "no shape": (["--adapter", "outputs/a/final", "--base", "maker/x@main"], 2, "say --shape FILE, with its config"),
    "misspelt setting": (["--adapter", "outputs/a/final", "--set", "quantise.path=direct"], 2, "mean 'quantize'?"),
    "wrong value": (["--adapter", "outputs/a/final", "--set", "quantize.types=[q4km]"], 1, "did you mean 'q4_k_m'?"),
    "no value": (["--adapter", "outputs/a/final", "--set", "quantize.path"], 2, "say what, as in key=value"),
    "training": (
        ["--adapter", "outputs/a/final", "--set", "adapter.train.lora.r=32"],
        2,
        "--set adapter: the adapter is what --adapter says, and nothing is trained",
    ),
    "name that is taken": (
        ["--adapter", "outputs/a/final", "--name", "tiny"],
        2,
        "config.yaml has a model 'tiny', whose adapter would be lost; say another --name",
    ),
    "another kind": (["--adapter", "outputs/a/final", "--set", "kind=heatmap"], 2, "are made of language models"),
    "name of another form": (["--adapter", "outputs/a/final", "--name", "A b"], 1, "A b"),
    "unknown model to be like": (["--adapter", "outputs/a/final", "--like", "tyni"], 2, "did you mean 'tiny'?"),
    "no such config": (["--adapter", "outputs/a/final", "--config", "gone.yaml"], 1, "gone.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(case: str, folder: Path) -> None:
    options, status, said = WRONG[case]
    before = sorted(folder.rglob("*"))
    done = build(folder, *options)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert sorted(folder.rglob("*")) == before


def test_what_another_adapter_was_built_into_is_not_replaced_by_chance(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    first, second = Path("outputs/a/final"), Path("outputs/b/final")
    models = {"final": {"base": HUB, "adapter": {"path": str(first)}}}
    Path("work/build_model").mkdir(parents=True)
    Path("work/build_model/final.yaml").write_text(yaml.safe_dump({"models": models}))
    refuse_loss("final", second, chosen=False)  # nothing is built yet
    Path("adapters/final").mkdir(parents=True)
    refuse_loss("final", first.absolute(), chosen=False)
    refuse_loss("final", second, chosen=True)
    with pytest.raises(UsageError, match="^final was built from outputs/a/final; --name final builds it anew, another"):
        refuse_loss("final", second, chosen=False)
    Path("work/build_model/final.yaml").unlink()
    with pytest.raises(UsageError, match="^adapters/final is there already and not from this script; say another"):
        refuse_loss("final", first, chosen=True)


def test_snakemakes_failure_is_its_own(folder: Path) -> None:
    done = build(folder, "--adapter", "outputs/a/final", "--", "--no-such-option")
    assert done.returncode == 1
    assert "unrecognized arguments: --no-such-option" in done.stderr
    assert done.stderr.splitlines()[-1] == "build_model.py: snakemake ended with status 2"


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_an_interrupted_snakemake_is_waited_for(number: signal.Signals, to_all: bool, folder: Path) -> None:
    """SIGTERM is handed on; Ctrl-C reaches the whole process group by itself."""
    (folder / "fake").mkdir()
    (folder / "fake/snakemake.py").write_text(SLOW)
    command = [sys.executable, str(ROOT / "scripts/build_model.py"), "--adapter", "outputs/a/final"]
    environment = {**os.environ, "PYTHONPATH": str(folder / "fake")}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 30
    while not (folder / "running").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    (os.killpg if to_all else os.kill)(process.pid, number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (folder / "stopped").read_text() == str(int(number))
    assert said.splitlines()[-1] == "build_model.py: interrupted; nothing unfinished has a final name"
