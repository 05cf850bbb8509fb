"""Outputs: complete under their final name, or not there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from other_run import other_run

from lib.locks import LockedError
from lib.manifest import write_folder_manifest
from lib.outputs import OutputError, finished_file, finished_folder

Finished = Callable[[Path], AbstractContextManager[Path]]
BOTH = pytest.mark.parametrize("finished", [finished_file, finished_folder])
SCRIPTS = Path(__file__).parents[1] / "scripts"


class Stopped(Exception):
    """What ends a block early."""


def write(partial: Path, text: str) -> None:
    """A file, or a folder with one file and the manifest that makes it an artifact."""
    if partial.is_dir():
        write_folder_manifest(partial, artifact="base", files={"part": {"size": len(text)}}, origin={"kind": "hub"})
        partial = partial / "part"
    partial.write_text(text)


def read(output: Path) -> str:
    return (output / "part" if output.is_dir() else output).read_text()


def everything(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@BOTH
def test_the_final_name_appears_at_the_end(finished: Finished, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with finished(output) as partial:
        write(partial, "done")
        assert partial.parent == output.parent, "a rename has to stay on its file system"
        assert not output.exists()
    assert read(output) == "done"
    assert everything(output.parent) == ["out"]


@BOTH
@pytest.mark.parametrize("ending", [Stopped, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_block_that_fails(finished: Finished, ending: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(ending), finished(tmp_path / "out") as partial:
        write(partial, "half")
        raise ending
    assert everything(tmp_path) == []


@BOTH
def test_an_earlier_output_stays_until_it_is_replaced(finished: Finished, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with finished(output) as partial:
        write(partial, "first")
    with pytest.raises(Stopped), finished(output) as partial:
        write(partial, "second")
        raise Stopped
    assert read(output) == "first"
    with finished(output) as partial:
        assert read(output) == "first"
        write(partial, "third")
    assert read(output) == "third"


def test_a_replaced_folder_keeps_no_earlier_file(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with finished_folder(output) as partial:
        write_folder_manifest(partial, artifact="base", files={"old": {"size": 0}}, origin={"kind": "hub"})
        (partial / "old").touch()
    with finished_folder(output) as partial:
        write(partial, "new")
    assert everything(output) == ["MANIFEST.json", "part"]


def users_folder(output: Path) -> None:
    output.mkdir()
    (output / ".git").mkdir()


def artifact_with_a_users_file(output: Path) -> None:
    output.mkdir()
    write(output, "ours")
    (output / "notes.txt").touch()


def checkpoint_used_in_place(output: Path) -> None:
    output.mkdir()
    (output / "model.safetensors").touch()
    write_folder_manifest(output, artifact="base", files={"model.safetensors": {"size": 0}}, origin={"kind": "path"})


def users_file(output: Path) -> None:
    output.touch()


def link(output: Path) -> None:
    (output.parent / "elsewhere").mkdir()
    output.symlink_to(output.parent / "elsewhere")


@pytest.mark.parametrize(
    "prepare", [users_folder, artifact_with_a_users_file, checkpoint_used_in_place, users_file, link]
)
def test_what_is_not_ours_is_never_replaced(prepare: Callable[[Path], None], tmp_path: Path) -> None:
    prepare(tmp_path / "out")
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(OutputError, match="name another"), finished_folder(tmp_path / "out"):
        pytest.fail("the work must not begin")
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("read", ["out", "out/data.jsonl", "out/deep/er"])
def test_an_output_never_replaces_its_input(read: str, tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="would replace its own input"),
        finished_folder(tmp_path / "out", inputs=[tmp_path / "other", tmp_path / read]),
    ):
        pytest.fail("the work must not begin")


@BOTH
def test_what_a_killed_run_left_is_not_taken_over(finished: Finished, tmp_path: Path) -> None:
    output = tmp_path / "out"
    program = (
        f"import os, sys; sys.path.insert(0, {str(SCRIPTS)!r}); from pathlib import Path\n"
        f"from lib.outputs import {finished.__name__} as finished\n"
        f"with finished(Path({str(output)!r})) as partial:\n"
        "    (partial / 'stray' if partial.is_dir() else partial).write_text('stray')\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 9
    assert not output.exists()
    assert everything(tmp_path) != []
    with finished(output) as partial:
        write(partial, "done")
    assert read(output) == "done"
    assert everything(tmp_path) == ["out"]
    if output.is_dir():
        assert everything(output) == ["MANIFEST.json", "part"]


def test_killed_while_a_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The final name leads to a whole folder or to none."""
    output, seen = tmp_path / "out", []
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        if source.is_dir():
            seen.append({path.name: everything(path) for path in tmp_path.iterdir() if path.is_dir()})
        rename(source, target)

    monkeypatch.setattr("os.replace", replace)
    for text in ("first", "second"):
        with finished_folder(output) as partial:
            write(partial, text)
    whole = ["MANIFEST.json", "part"]
    assert seen == [
        {".out.partial": whole},
        {".out.partial": whole, "out": whole},
        {".out.partial": whole, ".out.earlier": whole},
    ]
    monkeypatch.undo()
    (tmp_path / ".out.earlier").mkdir()
    with finished_folder(output) as partial:
        write(partial, "third")
    assert everything(tmp_path) == ["out"] and read(output) == "third"


@BOTH
def test_beside_another_writer_nothing_begins(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.locks.TRIES", 1)
    output = tmp_path / "out"
    (tmp_path / ".out.partial").touch()
    with (
        other_run(output),
        pytest.raises(LockedError, match="out is being written by another run"),
        finished(output),
    ):
        pytest.fail("the work must not begin")
    assert (tmp_path / ".out.partial").is_file(), "that is the other's"


@BOTH
def test_outputs_side_by_side_do_not_wait_for_each_other(finished: Finished, tmp_path: Path) -> None:
    with finished(tmp_path / "one") as one, finished(tmp_path / "two") as two:
        write(one, "1")
        write(two, "2")
    assert (read(tmp_path / "one"), read(tmp_path / "two")) == ("1", "2")


@BOTH
def test_a_file_system_without_locks_goes_without(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with finished(tmp_path / "out") as partial:
        write(partial, "done")
    assert read(tmp_path / "out") == "done"
    assert everything(tmp_path) == ["out"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), finished_file(tmp_path / "out"):
        pass
    assert everything(tmp_path) == []
