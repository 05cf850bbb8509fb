"""Finding the newest complete adapter: what counts, what is passed over, and what is said if there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_adapter import CONFIG, WEIGHTS, write_constants

from lib.adapter_search import SHOWN, AdapterError, adapter_problem, latest_adapter


def runs(folder: Path, *names: str) -> None:
    """Adapters of these names, each newer than the one before it."""
    for time, name in enumerate(names, start=1_700_000_000):
        write_constants(folder / name, written=time)


def found(folder: Path, *passed_over: str) -> str:
    return str(latest_adapter(folder, passed_over=[folder / name for name in passed_over]).relative_to(folder))


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (["a"], "a"),
        (["b", "a"], "a"),
        (["run/checkpoint-9", "run/checkpoint-10", "run"], "run"),
        (["run", "deep/er/and/deeper"], "deep/er/and/deeper"),
        (["z", "."], "."),
        (["ours", ".hidden", "seen/.partial/run"], "ours"),
    ],
)
def test_the_newest_at_any_depth(names: list[str], newest: str, tmp_path: Path) -> None:
    runs(tmp_path, *names)
    assert found(tmp_path) == newest


def test_the_time_is_that_of_the_weights(tmp_path: Path) -> None:
    runs(tmp_path, "a", "b")
    os.utime(tmp_path / "a" / CONFIG)
    os.utime(tmp_path / "a")
    assert found(tmp_path) == "b"


def test_of_the_same_time_the_last_by_path(tmp_path: Path) -> None:
    for name in ("b", "c", "a"):
        write_constants(tmp_path / name, written=1_700_000_000)
    assert found(tmp_path) == "c"


def test_the_folder_itself_may_be_hidden_and_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs(tmp_path / ".cache", "a")
    monkeypatch.chdir(tmp_path)
    assert latest_adapter(Path(".cache")) == Path(".cache/a")
    assert latest_adapter(Path(".cache/a")) == Path(".cache/a")


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


def rewrite(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def pickle_alone(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


DAMAGE = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG} missing"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} missing"),
    "pickled": (pickle_alone, "adapter_model.bin is pickled and can run code when read; save the adapter as"),
    "cut weights": (cut(WEIGHTS), f"{WEIGHTS} is cut off or damaged: "),
    "longer weights": (lambda folder: (folder / WEIGHTS).open("ab").write(b"x"), f"{WEIGHTS} is cut off or damaged: "),
    "no header": (rewrite(WEIGHTS, "short"), f"{WEIGHTS} is no safetensors file, or cut off"),
    "empty weights": (rewrite(WEIGHTS, ""), f"{WEIGHTS} is no safetensors file, or cut off"),
    "cut config": (cut(CONFIG), f"{CONFIG} is no valid JSON: "),
    "config of another kind": (rewrite(CONFIG, "[]"), f"{CONFIG} is damaged: expected an object"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_incomplete_is_passed_over(damage: str, tmp_path: Path) -> None:
    runs(tmp_path, "older", "newer")
    spoil, said = DAMAGE[damage]
    spoil(tmp_path / "newer")
    assert adapter_problem(tmp_path / "newer").startswith(said)
    assert found(tmp_path) == "older"
    shutil.rmtree(tmp_path / "older")
    with pytest.raises(AdapterError) as refused:
        latest_adapter(tmp_path)
    first, line = str(refused.value).splitlines()
    assert first == f"no complete adapter under {tmp_path}"
    assert line.startswith(f"  {tmp_path}/newer: {said}")


def test_a_complete_adapter_has_no_problem(tmp_path: Path) -> None:
    assert adapter_problem(write_constants(tmp_path / "a")) is None
    assert adapter_problem(tmp_path / "absent") == "there is no such folder"
    assert adapter_problem(tmp_path) == f"{CONFIG} and {WEIGHTS} missing"


def test_both_files_may_be_links(tmp_path: Path) -> None:
    """As in the Hugging Face cache; the time is that of what they lead to."""
    runs(tmp_path, ".blobs/x", "other")
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / ".blobs/x" / name)
    assert found(tmp_path) == "other"
    os.utime(tmp_path / ".blobs/x" / WEIGHTS)
    assert found(tmp_path) == "snapshot"
    (tmp_path / "snapshot" / WEIGHTS).unlink()
    (tmp_path / "snapshot" / WEIGHTS).symlink_to("nowhere")
    assert found(tmp_path) == "other"


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    runs(tmp_path, "here/old", "elsewhere/new")
    here = tmp_path / "here"
    (here / "loop").symlink_to(here)
    (here / "old" / "up").symlink_to(tmp_path)
    (here / "dangling").symlink_to("nowhere")
    (here / "itself").symlink_to("itself")
    (here / CONFIG).symlink_to(CONFIG)
    assert found(here) == "old/up/elsewhere/new"


def test_a_folder_goes_by_its_own_name(tmp_path: Path) -> None:
    """Not by that of a link as in `latest`, which leads to another one later."""
    runs(tmp_path, "a", "run")
    (tmp_path / "latest").symlink_to("run")
    (tmp_path / "zz").symlink_to("run")
    assert found(tmp_path) == "run"


def test_folders_that_do_not_count(tmp_path: Path) -> None:
    runs(tmp_path, "run", "copies/a", "copies/b/deep")
    (tmp_path / "link").symlink_to("copies/a")
    assert found(tmp_path) == "copies/b/deep"
    assert found(tmp_path, "copies/b", "absent") == "copies/a"
    assert found(tmp_path, "copies/b", "copies/a") == "run"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"^no complete adapter under {tmp_path}$"):
        latest_adapter(tmp_path)
    with pytest.raises(AdapterError, match="^there is no folder .*absent$"):
        latest_adapter(tmp_path / "absent")


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    runs(tmp_path, *(f"run-{i:02}" for i in range(SHOWN + 5)))
    for weights in tmp_path.rglob(WEIGHTS):
        cut(WEIGHTS)(weights.parent)
    with pytest.raises(AdapterError) as refused:
        latest_adapter(tmp_path)
    assert len(str(refused.value).splitlines()) == 1 + SHOWN + 1
    assert str(refused.value).endswith("  and 5 older ones")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    runs(tmp_path, "run", "locked/run")
    (tmp_path / "locked").chmod(0)
    try:
        assert found(tmp_path) == "run"
    finally:
        (tmp_path / "locked").chmod(0o755)
