"""Checkpoints: the newest complete one counts, what was cut short goes, and each run has a folder of its own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import train_adapter
import training_runs as runs

from lib import checkpoints
from lib.checkpoints import COMPLETE, is_complete, mark_complete, newest_checkpoint, run_folder, step_of
from lib.train_settings import Train


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the user is told."""
    lines: list[str] = []
    monkeypatch.setattr(checkpoints, "say", lines.append)
    return lines


def write(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trained.safetensors").write_bytes(bytes(100))
    (folder / "trainer_state.json").write_text("{}")
    mark_complete(folder)
    return folder


def test_the_newest_is_the_one_of_the_most_steps(tmp_path: Path, said: list[str]) -> None:
    """By number, not by name or time."""
    for step in (100, 9, 20):
        write(tmp_path, step)
    newest = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-100"
    assert step_of(newest) == 100
    assert len(list(tmp_path.iterdir())) == 3
    assert said == []


def test_without_any(tmp_path: Path, said: list[str]) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path) is None
    assert (tmp_path / "checkpoint-best").is_dir(), "no checkpoint of ours"
    assert said == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / COMPLETE).unlink(),
        lambda folder: (folder / COMPLETE).write_text(""),
        lambda folder: (folder / COMPLETE).write_text("[]"),
        lambda folder: (folder / COMPLETE).write_bytes(b"\xff\xfe"),
        lambda folder: (folder / "trained.safetensors").write_bytes(bytes(99)),
        lambda folder: (folder / "trained.safetensors").write_bytes(b""),
        lambda folder: (folder / "trained.safetensors").unlink(),
    ],
    ids=["not marked", "empty mark", "no sizes", "no text", "cut", "empty", "missing"],
)
def test_what_was_cut_short_is_removed_and_the_one_before_taken(
    damage: Callable[[Path], object], tmp_path: Path, said: list[str]
) -> None:
    good, bad = write(tmp_path, 2), write(tmp_path, 4)
    assert is_complete(bad)
    damage(bad)
    assert not is_complete(bad)
    assert newest_checkpoint(tmp_path) == good
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert said == ["a checkpoint at step 4 was cut short and is removed"]


def test_a_later_file_beside_the_marked_ones_does_no_harm(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / "note.txt").write_text("by hand")
    assert is_complete(folder)


def test_an_identity_has_its_folder_whatever_the_order_of_its_keys(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, {"a": 1, "b": {"c": [1.5, None]}})
    assert folder.parent == tmp_path
    assert folder == run_folder(tmp_path, {"b": {"c": [1.5, None]}, "a": 1})
    others = [{"a": 2, "b": {"c": [1.5, None]}}, {"a": 1, "b": {"c": [1.5, 0]}}, {"a": 1}]
    assert len({folder, *(run_folder(tmp_path, other) for other in others)}) == 4


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if dataclasses.is_dataclass(value):
        raise TypeError
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {"cpu": "3GB"} if isinstance(value, Mapping) else ("q_proj",) if isinstance(value, tuple) else f"{value}-"


def changed(settings: Any) -> list[tuple[str, Any]]:
    """The settings with one of them changed, for each of them, by its name."""
    found = []
    for name in (field.name for field in dataclasses.fields(settings)):
        value = getattr(settings, name)
        inner = changed(value) if dataclasses.is_dataclass(value) else [("", other(value))]
        found += [(f"{name}.{key}".rstrip("."), dataclasses.replace(settings, **{name: new})) for key, new in inner]
    return found


@pytest.fixture
def started(tmp_path: Path, tiny_base: Path) -> tuple[Path, Train]:
    """A base and settings whose data file is there."""
    data = str(tiny.write_data(tmp_path / "data.jsonl"))
    return tiny_base, runs.settings(data=data, eval_data=data)


def folder_of(base: Path, settings: Train) -> Path:
    return run_folder(Path("runs"), train_adapter._origin(base, None, settings))


def test_every_setting_makes_another_run(started: tuple[Path, Train]) -> None:
    base, settings = started
    found = {"": folder_of(base, settings)}
    for name, new in changed(settings):
        if name not in ("data", "eval_data", "offload.offload_folder", "method_reason"):
            found[name] = folder_of(base, new)
    assert len(found) > 45
    assert len(set(found.values())) == len(found)


def test_other_data_makes_another_run(started: tuple[Path, Train], tmp_path: Path) -> None:
    base, settings = started
    before = folder_of(base, settings)
    more = str(tiny.write_data(tmp_path / "more.jsonl", repeats=2))
    assert folder_of(base, dataclasses.replace(settings, data=more)) != before
    assert folder_of(base, dataclasses.replace(settings, eval_data=more)) != before
    assert folder_of(base, dataclasses.replace(settings, eval_data=None)) != before
    data = Path(settings.data)
    data.write_text(data.read_text().replace("Two", "Six", 1))
    assert folder_of(base, settings) != before


def test_another_base_makes_another_run(started: tuple[Path, Train], tmp_path: Path) -> None:
    base, settings = started
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    assert folder_of(copy, settings) == folder_of(base, settings)
    weights = next(copy.glob("*-00001-*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert folder_of(copy, settings) != folder_of(base, settings)


def test_where_things_lie_makes_no_other_run(started: tuple[Path, Train], tmp_path: Path) -> None:
    base, settings = started
    moved = tmp_path / "elsewhere" / "data.jsonl"
    moved.parent.mkdir()
    shutil.copy(settings.data, moved)
    offload = dataclasses.replace(settings.offload, offload_folder=str(tmp_path))
    elsewhere = dataclasses.replace(settings, data=str(moved), eval_data=str(moved), offload=offload)
    assert folder_of(base, elsewhere) == folder_of(base, settings)
