"""Merging, converting and quantizing when things go wrong: a clear error, nothing half done under the final name."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from small_disk import enlarge, small_disk

from lib.adapter_folder import WEIGHTS
from lib.locks import writer_of
from lib.manifest import sha256_file

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Step:
    """A script on the tiny model's files: its command but for the output, and the output's name."""

    command: list[str]
    name: str

    def start(self, folder: Path) -> subprocess.Popen[str]:
        """Start it, with its output in `folder`."""
        command = [sys.executable, *self.command, "--output", str(folder / self.name)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder.parent)

    def run(self, folder: Path) -> tuple[int, str]:
        """Its exit status, and what it said on stderr."""
        process = self.start(folder)
        _, said = process.communicate()
        return process.returncode, said


@pytest.fixture(scope="module")
def steps(built: Path, tiny_base: Path) -> dict[str, Step]:
    scripts, models = ROOT / "scripts", built / "models"
    convert = [str(scripts / "convert_gguf.py"), f"--checkpoint={models}/tiny/merged", "--name=tiny"]
    inputs = [f"--base={tiny_base}", f"--adapter={built}/adapters/tiny"]
    direct = [str(scripts / "build_direct.py"), *inputs, "--device=cpu", "--quant=q4_k_m"]
    return {
        "direct": Step(direct, "tiny.q4_k_m.gguf"),
        "merge": Step([str(scripts / "merge_adapter.py"), *inputs], "merged"),
        "convert": Step(convert, "tiny.f16.gguf"),
        "quantize": Step([str(scripts / "quantize_gguf.py"), f"--source={models}/tiny.f16.gguf"], "tiny.q4_k_m.gguf"),
    }


@pytest.fixture(scope="module")
def folders(steps: dict[str, Step], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where each step has written when nothing went wrong."""
    written = {}
    for name, step in steps.items():
        written[name] = tmp_path_factory.mktemp(name)
        status, said = step.run(written[name])
        assert status == 0, said
    return written


@pytest.fixture(scope="module")
def undisturbed(folders: dict[str, Path]) -> dict[str, dict[str, str]]:
    """What each step writes."""
    return {name: contents(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def sizes(folders: dict[str, Path]) -> dict[str, int]:
    """How many bytes that is."""
    files = {name: [path for path in folder.rglob("*") if path.is_file()] for name, folder in folders.items()}
    return {name: sum(path.stat().st_size for path in each) for name, each in files.items()}


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder but locks, with its digest."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


@pytest.mark.parametrize("name", ["merge", "convert", "quantize", "direct"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_full_disk(
    name: str,
    share: float,
    steps: dict[str, Step],
    undisturbed: dict[str, dict[str, str]],
    sizes: dict[str, int],
    tmp_path: Path,
) -> None:
    """It is full at the beginning, in the middle, and shortly before the end; with more room the same run succeeds."""
    with small_disk(tmp_path / "disk", kib=int(share * sizes[name] / 1024)) as disk:
        status, said = steps[name].run(disk)
        assert status == 1, said
        assert "the disk is full" in said and "Traceback" not in said, said
        assert contents(disk) == {}
        enlarge(disk)
        status, said = steps[name].run(disk)
        assert status == 0, said
        assert contents(disk) == undisturbed[name]


@pytest.mark.parametrize("name", ["merge", "convert", "quantize", "direct"])
def test_kill_9_in_the_middle(
    name: str, steps: dict[str, Step], undisturbed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Killed when the first bytes are there, and at moments after that."""
    moments = random.Random(0)
    unfinished = 0
    for attempt in range(2 if name == "direct" else 3):  # which begins late, after some seconds
        folder = tmp_path / str(attempt)
        folder.mkdir()
        process = steps[name].start(folder)
        while process.poll() is None and not any(path.name.endswith(".partial") for path in folder.iterdir()):
            time.sleep(0.001)
        time.sleep(attempt * moments.uniform(0, 0.02))
        process.kill()
        final = folder / steps[name].name
        # A program that it has started is not killed with it, and has the lock until it ends.
        while process.poll() is None or writer_of(final):
            time.sleep(0.01)
        process.communicate()
        unfinished += not final.exists()
        if final.is_file():
            assert sha256_file(final) == undisturbed[name][final.name]
        status, said = steps[name].run(folder)
        assert status == 0, said
        assert contents(folder) == undisturbed[name]
    assert unfinished


@pytest.mark.parametrize("name", ["merge", "convert", "quantize", "direct"])
def test_two_runs_at_once(
    name: str, steps: dict[str, Step], undisturbed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """One of them, at least, ends well; the other does as well, or says why not."""
    folder = tmp_path / "both"
    folder.mkdir()
    both = [steps[name].start(folder) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    ended = [process.returncode for process in both]
    assert 0 in ended, said
    for status, text in zip(ended, said, strict=True):
        assert status == 0 or "is being written by another run" in text, text
    assert contents(folder) == undisturbed[name]


def cut_a_shard(base: Path, adapter: Path) -> None:
    shard = sorted(base.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def lose_a_shard(base: Path, adapter: Path) -> None:
    sorted(base.glob("*.safetensors"))[0].unlink()


def list_a_tensor_that_is_not_there(base: Path, adapter: Path) -> None:
    index = base / "model.safetensors.index.json"
    listed = json.loads(index.read_text(encoding="utf-8"))
    listed["weight_map"]["model.layers.7.mlp.up_proj.weight"] = sorted(listed["weight_map"].values())[0]
    index.write_text(json.dumps(listed), encoding="utf-8")


def cut_the_adapter(base: Path, adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-100])


def damage_the_adapters_header(base: Path, adapter: Path) -> None:
    damaged = bytearray((adapter / WEIGHTS).read_bytes())
    damaged[20:40] = b"\0" * 20
    (adapter / WEIGHTS).write_bytes(damaged)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (cut_a_shard, "model-00001-of"),
        (lose_a_shard, "are missing: model-00001-of"),
        (list_a_tensor_that_is_not_there, "model.layers.7.mlp.up_proj.weight: in model.safetensors.index.json but in"),
        (cut_the_adapter, WEIGHTS),
        (damage_the_adapters_header, WEIGHTS),
    ],
)
@pytest.mark.parametrize("script", ["merge_adapter.py", "build_direct.py --quant=q4_k_m --device=cpu"])
def test_damaged_inputs_of_a_merge(
    script: str, damage: Callable[[Path, Path], None], part: str, built: Path, tiny_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    adapter = shutil.copytree(built / "adapters/tiny", tmp_path / "adapter")
    damage(base, adapter)
    output = tmp_path / "output"
    output.mkdir()
    command = [*f"{ROOT}/scripts/{script}".split(), f"--base={base}", f"--adapter={adapter}"]
    status, said = Step(command, "merged").run(output)
    assert status == 1
    assert part in said and "Traceback" not in said, said
    assert contents(output) == {}
