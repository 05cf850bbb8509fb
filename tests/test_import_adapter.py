"""Taking an adapter that is there already: checked against the base, the same bytes, and nothing of its place told."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import import_adapter
import pytest
import tiny
import torch
from conftest import ROOT, copy_checkout, planned_rules, run_snakemake, write_project
from safetensors import safe_open
from test_merge import unit_in_last_place
from test_rebuild import set_in_config
from tiny_adapter import CONFIG, WEIGHTS, train_with_peft, write_constants

from lib import estimate
from lib.adapter_search import AdapterError
from lib.manifest import describe_files, write_folder_manifest
from lib.spec import resolve_project

NAMES = {CONFIG, WEIGHTS, "MANIFEST.json"}
LAYER = "model.layers.1.self_attn.q_proj"


def take(base: Path, adapter: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a user does."""
    command = [sys.executable, str(ROOT / "scripts/import_adapter.py"), "--base", str(base), "--adapter", str(adapter)]
    command += ["--output", str(output), "--log", str(output.parent / "import.log"), *options]
    return subprocess.run(command, capture_output=True, text=True)


def taken(base: Path, adapter: Path, output: Path) -> dict[str, Any]:
    """Import in this process; the manifest."""
    return import_adapter.import_adapter(base=base, base_manifest=None, adapter=adapter, output=output, threads=1)


def test_the_copy_is_complete_and_says_what_it_is(tiny_base: Path, tmp_path: Path) -> None:
    adapter = write_constants(tmp_path / "given" / "run7", base_model_name_or_path="/home/someone/model")
    output = tmp_path / "adapters" / "tiny"
    done = take(tiny_base, adapter, output)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in output.iterdir()} == NAMES
    assert (output / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    manifest = json.loads((output / "MANIFEST.json").read_text())
    assert manifest["artifact"] == "adapter"
    assert manifest["files"] == describe_files(output, [CONFIG, WEIGHTS], threads=1)
    origin = manifest["origin"]
    assert (origin["kind"], origin["name"], origin.keys()) == ("path", "run7", {"kind", "name", "base"})
    base_files = describe_files(tiny_base, [path.name for path in tiny_base.iterdir()], threads=1)
    canonical = json.dumps(base_files, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert origin["base"] == {"digest": hashlib.sha256(canonical.encode()).hexdigest(), "origin": None}
    for name in (CONFIG, "MANIFEST.json"):
        assert str(tmp_path) not in (output / name).read_text()
        assert "/home/someone" not in (output / name).read_text()
    log = (output.parent / "import.log").read_text()
    assert f"adapter {adapter}, trained on /home/someone/model: its 1 pairs fit tiny-llama" in log


def test_the_config_is_rewritten_and_keeps_its_meaning(tiny_base: Path, tmp_path: Path) -> None:
    names = {"target_modules": ["v_proj", "q_proj"], "exclude_modules": ["b", "a"], "layers_to_transform": [10, 2]}
    left_alone = {"lora_alpha": 3, "use_rslora": True, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    adapter = write_constants(tmp_path / "run7", inference_mode=False, **names, **left_alone)
    taken(tiny_base, adapter, tmp_path / "out")
    text = (tmp_path / "out" / CONFIG).read_text()
    config = json.loads(text)
    assert {key: config.pop(key) for key in names} == {key: sorted(value) for key, value in names.items()}
    assert config.pop("base_model_name_or_path") == "tiny-llama"
    assert config.pop("inference_mode") is True
    assert config == {"peft_type": "LORA", "r": 2, **left_alone}
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_the_same_adapter_is_the_same_bytes(tiny_base: Path, tmp_path: Path) -> None:
    """Whatever order peft wrote its sets in, whatever the base was called, and wherever the folder lies."""
    layers = (LAYER, "model.layers.0.self_attn.q_proj")
    names, turned = (
        {"layers": layers, "target_modules": [*layers]},
        {"layers": layers, "target_modules": [*layers[::-1]]},
    )
    first = write_constants(tmp_path / "a" / "run", base_model_name_or_path="/a", **names)
    second = write_constants(tmp_path / "b" / "run", base_model_name_or_path="b", **turned)
    other = write_constants(tmp_path / "c" / "run", value=2.0, **names)
    manifests = [taken(tiny_base, adapter, tmp_path / f"out{i}") for i, adapter in enumerate((first, second, other))]
    assert manifests[0] == manifests[1]
    for name in NAMES:
        assert (tmp_path / "out0" / name).read_bytes() == (tmp_path / "out1" / name).read_bytes()
    assert manifests[0]["digest"] != manifests[2]["digest"]


def test_the_digest_covers_the_config(tiny_base: Path, tmp_path: Path) -> None:
    digests = {
        taken(tiny_base, write_constants(tmp_path / "run", lora_alpha=alpha), tmp_path / "out")["digest"]
        for alpha in (4, 8)
    }
    assert len(digests) == 2


def test_another_one_replaces_it(tiny_base: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        manifest = taken(tiny_base, write_constants(tmp_path / name), tmp_path / "out")
        assert manifest["origin"]["name"] == name
    assert {path.name for path in (tmp_path / "out").iterdir()} == NAMES


def test_the_base_goes_by_its_manifest(tiny_base: Path, tmp_path: Path) -> None:
    files = describe_files(tiny_base, [path.name for path in tiny_base.iterdir()], threads=1)
    origin = {"kind": "hub", "name": "maker/model", "revision": "abc"}
    listed = write_folder_manifest(tmp_path, artifact="base", files=files, origin=origin)
    adapter = write_constants(tmp_path / "run")
    done = take(tiny_base, adapter, tmp_path / "out", "--base-manifest", str(tmp_path / "MANIFEST.json"))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "MANIFEST.json").read_text())
    assert manifest["origin"]["base"] == {"digest": listed["digest"], "origin": origin}
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == "maker/model"


@pytest.mark.parametrize("changed", [False, True], ids=["as trained", "changed since"])
def test_training_of_an_adapter_that_was_trained_here_stays_known(
    changed: bool, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = write_constants(tmp_path / "run")
    known = {
        "data": {"name": "talks.jsonl", "size": 3, "sha256": "0" * 64},
        "four_bit": {"device": "cuda", "dtype": "bfloat16", "layers": 14},
    }
    files = describe_files(adapter, [CONFIG, WEIGHTS], threads=1)
    write_folder_manifest(adapter, artifact="adapter", files=files, origin={**known, "settings": {}})
    if changed:
        write_constants(adapter, value=2.0)
    origin = taken(tiny_base, adapter, tmp_path / "out")["origin"]
    assert {key: origin[key] for key in origin if key in known} == ({} if changed else known)
    assert "settings" not in origin


def pickle_alone(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def trained_otherwise(folder: Path) -> None:
    write_constants(folder, init_lora_weights="pissa", layer_replication=[[0, 2]], target_parameters=["experts"])


REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "another width": (
        lambda folder: write_constants(folder, layers=(LAYER, "model.layers.0.self_attn.q_proj"), width=128),
        ["does not fit this base", f"{LAYER}.weight: (256, 256) in the base, A (2, 128), B (128, 2)", "layers.0"],
    ),
    "other names": (
        lambda folder: write_constants(folder, layers=("model.layers.2.self_attn.q_proj", "model.h.0.attn.c_attn")),
        ["layers.2.self_attn.q_proj.weight: the base has no such tensor", "h.0.attn.c_attn.weight: the base has no"],
    ),
    "what cannot be merged": (
        trained_otherwise,
        [f"{CONFIG}:", "init_lora_weights: 'pissa'", "layer_replication: [[0, 2]]", "target_parameters: ['experts']"],
    ),
    "a target without a pair": (
        lambda folder: write_constants(folder, target_modules=["q_proj"]),
        ["layers.1.self_attn.q_proj.weight: adapter_config.json targets it, but it has no pair of factors"],
    ),
    "another kind": (lambda folder: write_constants(folder, peft_type="IA3"), ["peft_type is 'IA3'; only LORA"]),
    "a config that JSON does not know": (
        lambda folder: write_constants(folder, lora_dropout=float("nan")),
        [f"{CONFIG} is damaged"],
    ),
    "lists of lists": (
        lambda folder: write_constants(folder, target_modules=[["q_proj"]]),
        [f"{CONFIG} is damaged"],
    ),
    "pickled": (pickle_alone, ["adapter_model.bin is pickled and can run code when read"]),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), ["is no complete adapter", f"{WEIGHTS} missing"]),
    "no folder": (shutil.rmtree, ["is no complete adapter: there is no such folder"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused(fault: str, tiny_base: Path, tmp_path: Path) -> None:
    """And the adapter that was there stays."""
    output = tmp_path / "out"
    kept = taken(tiny_base, write_constants(tmp_path / "good"), output)
    spoil, parts = REFUSED[fault]
    spoil(write_constants(tmp_path / "run7"))
    done = take(tiny_base, tmp_path / "run7", output)
    assert done.returncode == 1
    assert [part for part in ["run7", *parts] if part not in done.stderr] == [], done.stderr
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr
    assert json.loads((output / "MANIFEST.json").read_text()) == kept
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_nothing_is_written_over_the_adapter_itself(tiny_base: Path, tmp_path: Path) -> None:
    adapter = write_constants(tmp_path / "run7")
    done = take(tiny_base, adapter, adapter)
    assert done.returncode == 1
    assert "would replace its own input" in done.stderr
    assert {path.name for path in adapter.iterdir()} == {CONFIG, WEIGHTS}


def test_an_adapter_that_is_written_anew_meanwhile(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_constants(tmp_path / "run7", written=1_700_000_000)
    copy = shutil.copyfile

    def copy_late(source: Path, target: Path) -> None:
        copy(source, target)
        os.utime(source)

    monkeypatch.setattr(shutil, "copyfile", copy_late)
    with pytest.raises(AdapterError, match="run7 was written anew while it was copied"):
        taken(tiny_base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], ["--adapter", "x"], ["--adapter", "x", "--base", "y", "--what"]])
def test_wrong_options(options: list[str]) -> None:
    command = [sys.executable, str(ROOT / "scripts/import_adapter.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_its_needs_are_those_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for rank in (4, 4000):
        write_constants(tmp_path / "run7", rank=rank)
        model = {"base": {"hub": "maker/model", "revision": "main", "shape": tiny.SHAPE}, "adapter": {"path": "run7"}}
        found.append(estimate.import_needs(resolve_project({"models": {"m": model}}).models["m"]))
        assert found[-1].disk_mb * 1e6 > (tmp_path / "run7" / WEIGHTS).stat().st_size
    assert found[0].disk_mb < found[1].disk_mb
    assert found[0].mem_mb == found[1].mem_mb and found[0].gpu == 0


@pytest.mark.slow
def test_an_adapter_that_does_not_fit_leaves_the_earlier_one(tiny_base: Path, tmp_path: Path) -> None:
    project, target = write_project(tmp_path / "project", base=tiny_base), "adapters/tiny/MANIFEST.json"
    for name, width, status in (("good", 256, 0), ("bad", 128, 1)):
        write_constants(project / name, width=width)
        set_in_config("models", "tiny", "adapter", value={"path": name})(project, project)
        done = run_snakemake(project, "-j1", target)
        assert done.returncode == status, done.stderr
        assert json.loads((project / target).read_text())["origin"]["name"] == "good"
        assert {path.name for path in (project / "adapters/tiny").iterdir()} - {".snakemake_timestamp"} == NAMES
    assert "bad does not fit this base" in done.stderr


@pytest.fixture(scope="module")
def trained_elsewhere(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a project with an adapter that peft trained and wrote; the newest of two."""
    project = write_project(tmp_path_factory.mktemp("imported") / "project", base=tiny_base)
    write_constants(project / "runs/older", written=1_700_000_000)
    train_with_peft(tiny_base, project / "runs/newer")
    return project


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter", [{"path": "runs/newer"}, {"latest_in": "runs"}], ids=lambda value: next(iter(value))
)
def test_merged_weights_are_those_of_peft(adapter: dict[str, str], trained_elsewhere: Path, tiny_base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    project = trained_elsewhere
    shutil.rmtree(project / "adapters", ignore_errors=True)
    set_in_config("models", "tiny", "adapter", value=adapter)(project, project)
    done = run_snakemake(project, "-j1", "models/tiny/merged/MANIFEST.json")
    assert done.returncode == 0, done.stderr
    assert "adapter runs/newer" in (project / "logs/tiny/import_adapter.log").read_text()
    assert planned_rules(run_snakemake(project, "-n", "models/tiny/merged/MANIFEST.json")) == set()
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    oracle = PeftModel.from_pretrained(base, project / "runs/newer").merge_and_unload().state_dict()
    merged = {}
    for shard in (project / "models/tiny/merged").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            merged |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert merged.keys() == oracle.keys()
    changed = 0
    for name, tensor in merged.items():
        largest = torch.maximum(oracle[name].abs(), weights[name].abs())
        assert ((tensor.double() - oracle[name].double()).abs() <= unit_in_last_place(largest, torch.float16)).all()
        changed += not torch.equal(tensor, weights[name].to(torch.float16))
    assert changed == 2 * 7, "every linear layer but the head"


@pytest.mark.slow
def test_no_place_of_the_adapter_is_told(trained_elsewhere: Path, tmp_path: Path) -> None:
    """From the same adapter elsewhere the same bytes come, also with an absolute path."""
    place = tmp_path / "elsewhere"
    shutil.copytree(trained_elsewhere, place / "project", ignore=shutil.ignore_patterns(".snakemake", "adapters"))
    shutil.move(place / "project/runs", place / "runs")
    checkout = copy_checkout(place / "checkout")
    manifests = []
    for project, path in ((trained_elsewhere, "runs/newer"), (place / "project", str(place / "runs/newer"))):
        set_in_config("models", "tiny", "adapter", value={"path": path})(project, checkout)
        done = run_snakemake(project, "-j1", "adapters/tiny/MANIFEST.json", checkout=checkout)
        assert done.returncode == 0, done.stderr
        manifests.append((project / "adapters/tiny/MANIFEST.json").read_bytes())
    assert manifests[0] == manifests[1]
    assert str(tmp_path).encode() not in manifests[1]
