"""Locks: one writer of an output at a time, however its run ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from other_run import WRITER, other_run

from lib import locks
from lib.locks import LockedError, held_locks, join_runs, only_writer, was_left, writer_of

SCRIPTS = Path(__file__).parents[1] / "scripts"
HOLD = "from lib.locks import only_writer; lock = only_writer(Path(sys.argv[1])); lock.__enter__()"
JOIN = "from lib.locks import join_runs; join_runs(Path(sys.argv[1]), left_by_dead='*.left')"


@pytest.fixture(autouse=True)
def one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody lets go of a lock in these tests, but where it is said."""
    monkeypatch.setattr(locks, "TRIES", 1)


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that says a line when it is there, and ends with its standard input."""
    code = f"import os, sys; from pathlib import Path; {program}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS)},
    )


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    told = f"out is being written by another run .{WRITER}.; wait"
    with other_run(output), pytest.raises(LockedError, match=told), only_writer(output):
        pytest.fail("the work must not begin")
    with only_writer(output):
        assert writer_of(output) == f"another run (process {os.getpid()} on {os.uname().nodename})"
    assert list(output.parent.iterdir()) == []


def test_who_holds_a_lock_may_take_it_again(tmp_path: Path) -> None:
    """A script holds that of its output, and so does the function that writes it."""
    output = tmp_path / "out"
    with only_writer(output):
        with only_writer(output):
            pass
        assert writer_of(output), "the inner block has let go of it"
    assert writer_of(output) is None


def test_of_several_outputs_all_are_held_or_none(tmp_path: Path) -> None:
    outputs = [tmp_path / name for name in ("a", "b", "c")]
    with other_run(outputs[1]), pytest.raises(LockedError, match="b is being written"), only_writer(*outputs):
        pytest.fail("the work must not begin")
    assert [writer_of(output) for output in outputs] == [None, None, None]


def test_a_lock_that_is_only_looked_at_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "TRIES", 200)
    output, ours = tmp_path / "out", threading.Event()

    def look() -> None:
        with other_run(output):
            ours.set()
            time.sleep(0.2)

    other = threading.Thread(target=look)
    other.start()
    ours.wait()
    with only_writer(output):
        assert "elsewhere" not in (writer_of(output) or "elsewhere")
    other.join()


def test_a_killed_writers_lock_is_free(tmp_path: Path) -> None:
    output = tmp_path / "out"
    killed = start(f"{HOLD}; print('here', flush=True); sys.stdin.read()", output)
    assert killed.stdout.readline() == "here\n"
    assert writer_of(output) == f"another run (process {killed.pid} on {os.uname().nodename})"
    assert not was_left(output)
    killed.kill()
    killed.communicate()
    assert (tmp_path / ".out.lock").exists()
    assert writer_of(output) is None and was_left(output)
    with only_writer(output):
        pass
    assert list(tmp_path.iterdir()) == []
    assert not was_left(output), "nobody was killed"


def test_a_program_of_a_killed_script_still_holds_its_lock(tmp_path: Path) -> None:
    """llama-quantize goes on writing when the script that started it is killed."""
    output = tmp_path / "out"
    script = start(
        f"{HOLD}; from lib.process import Program; program = Program(['sleep', '60']);"
        "print(program._process.pid, flush=True); sys.stdin.read()",
        output,
    )
    program = int(script.stdout.readline())
    try:
        script.kill()
        script.communicate()
        told = rf"another run \(process {script.pid} on .*, which has ended; a program that it started goes on\)"
        with pytest.raises(LockedError, match=f"out is being written by {told}"), only_writer(output):
            pytest.fail("the work must not begin")
    finally:
        os.kill(program, signal.SIGKILL)
    while writer_of(output):
        time.sleep(0.01)


def test_what_is_passed_on_is_what_is_held(tmp_path: Path) -> None:
    with only_writer(tmp_path / "a", tmp_path / "b"):
        names = {os.readlink(f"/proc/self/fd/{lock}") for lock in held_locks()}
    assert names == {str(tmp_path / ".a.lock"), str(tmp_path / ".b.lock")}
    assert held_locks() == []


def test_a_file_system_without_locks_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with only_writer(tmp_path / "out"):
        assert writer_of(tmp_path / "out") is None
        assert not was_left(tmp_path / "out"), "nobody knows"
    left = tmp_path / "locks" / "left"
    left.parent.mkdir()
    left.touch()
    join_runs(tmp_path, left_by_dead="locks/*")
    assert left.exists()


def test_only_what_dead_runs_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "0.left"

    def another_comes() -> bool:
        """Whether it finds what was left, and keeps it."""
        left.touch()
        assert start(JOIN, tmp_path).wait() == 0
        return left.exists()

    assert another_comes(), "nothing is known of the runs before the first"
    assert not another_comes()
    living = start(f"{JOIN}; print('here', flush=True); sys.stdin.read()", tmp_path)
    assert living.stdout.readline() == "here\n"
    assert another_comes(), "it is a living one's"
    assert another_comes(), "one that came and went does not end the living one's"
    living.kill()
    living.communicate()
    assert not another_comes()
    (tmp_path / "modelmill.lock").write_text("elsewhere")
    assert another_comes(), "a run on another machine may live"
