"""What a machine has, as its tools tell it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil
import pytest

from lib import machine
from lib.machine import MIB, Card, model_store, nearest, this_machine


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on PATH."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def write_nvidia_smi(folder: Path, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_cards(tools: Path) -> None:
    write_nvidia_smi(
        tools,
        "echo 'NVIDIA RTX A5000, GPU-5e, 24564, 312'\n"
        "echo 'Some, Card, GPU-a, 8192, 0'\n"
        "echo 'Odd, GPU-b, [N/A], [N/A]'",
    )
    assert this_machine(Path()).cards == (
        Card("NVIDIA RTX A5000", 24564 * MIB, 312 * MIB, "GPU-5e"),
        Card("Some, Card", 8192 * MIB, 0, "GPU-a"),
    )


@pytest.mark.parametrize(
    ("named", "left"),
    [("", []), ("1", ["b"]), ("1, 0", ["a", "b"]), ("-1", []), ("GPU-b", ["b"]), ("MIG-5e1f", ["a", "b", "c"])],
)
def test_cards_that_may_be_used(named: str, left: list[str], tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvidia_smi(tools, "for name in a b c; do echo $name, GPU-$name-5e, 8192, 0; done")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert [card.name for card in this_machine(Path()).cards] == left


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'; exit 6", "exec sleep 30"])
def test_a_driver_that_does_not_answer(script: str, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SECONDS", 0.5)
    write_nvidia_smi(tools, script)
    assert this_machine(Path()).cards == ()


def test_memory_and_disk_are_the_systems(tmp_path: Path) -> None:
    found = this_machine(tmp_path, tmp_path / "not/there")
    assert 0 < found.available <= found.ram <= psutil.virtual_memory().total
    free = shutil.disk_usage(tmp_path).free
    assert list(found.disk) == [str(tmp_path), str(tmp_path / "not/there")]
    assert all(abs(each - free) < 0.05 * free + 10**9 for each in found.disk.values())


@pytest.mark.parametrize(("content", "limited"), [("1073741824\n", True), ("max\n", False)])
def test_a_control_group_limits_memory(
    content: str, limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(content)
    found = this_machine(tmp_path)
    assert (found.ram == 1 << 30) == limited and found.available <= found.ram


def test_the_nearest_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert nearest(tmp_path / "a/b") == tmp_path
    assert nearest(Path("a/b")).resolve() == tmp_path
    assert nearest(tmp_path) == tmp_path


def test_a_folder_that_nobody_may_look_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the service's own; root may look into any, so that the system's answer is put here."""
    closed = tmp_path / "ollama"
    closed.mkdir()
    is_dir = Path.is_dir

    def refuse(place: Path) -> bool:
        if closed in place.parents:
            raise PermissionError(13, "Permission denied", str(place))
        return is_dir(place)

    monkeypatch.setattr(Path, "is_dir", refuse)
    monkeypatch.setattr(os, "access", lambda place, _: place != closed)
    monkeypatch.setenv("OLLAMA_MODELS", str(closed / "models"))
    assert model_store() == tmp_path


def test_where_ollama_keeps_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    assert model_store() == tmp_path
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(machine, "STORES", (str(tmp_path / "service"), "~/.ollama/models"))
    assert model_store() == tmp_path
    (tmp_path / ".ollama/models").mkdir(parents=True)
    assert model_store() == tmp_path / ".ollama/models"
    (tmp_path / "service").mkdir()
    assert model_store() == tmp_path / "service"
