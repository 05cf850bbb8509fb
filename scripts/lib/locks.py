"""
One writer at a time: a lock file beside each output, held until its writer has ended; a second one is refused. What all
runs of a machine share (a cache) they use in turn.

A job whose Snakemake was killed goes on writing; a second one must not write beside it. The programs that a script runs
hold its locks too (`held_locks`), since those go on when the script itself is killed.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from lib.console import say
from lib.errors import ModelmillError

# A look at a lock holds it for some microseconds, and a job that begins just then is not to be refused.
TRIES, SECONDS_BETWEEN = 10, 0.05

# By the lock's absolute path. What this process holds is held by all of it: a script locks its outputs, and so do the
# functions that write them.
_held: dict[Path, IO[str]] = {}
# Open, and thereby locked, until this process ends.
_runs: list[IO[str]] = []


class LockedError(ModelmillError):
    """An output is being written by another run."""


@contextmanager
def only_writer(*outputs: Path) -> Iterator[None]:
    """
    Hold the right to write these outputs until the block ends; within it, the same process may ask for it again.

    Raises:
        LockedError: another run holds it.
    """
    with ExitStack() as stack:
        for output in outputs:
            stack.enter_context(_only_writer(output))
        yield


@contextmanager
def in_turn(path: Path, *, waiting: str | None = None) -> Iterator[None]:
    """
    Hold a lock file until the block ends, after whoever has it.

    Args:
        waiting: what to say where it is held at first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                say(waiting)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def held_locks() -> list[int]:
    """Descriptors to pass on to programs that write for this process."""
    return [lock.fileno() for lock in _held.values()]


def writer_of(output: Path) -> str | None:
    """Who is writing an output at this moment, in words; None if nobody is."""
    path = _lock_file(output)
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _describe(path)
    except OSError:  # no such file; or a file system without locks
        pass
    return None


def was_left(output: Path) -> bool:
    """Whether who wrote an output was killed: its lock is there, and free."""
    try:
        with _lock_file(output).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # a lock that is held is one as well
        return False
    return True


def join_runs(folder: Path, *, left_by_dead: str) -> None:
    """
    Count as a living run until this process ends, and remove what earlier ones left that have all ended.

    Children do not count: they go on when it is killed, but their outputs have locks of their own. Where it is not
    known whether a run lives (the last one was on another machine, or there is no locking here), nothing is removed.

    Args:
        folder: what runs share.
        left_by_dead: pattern of the files in it that no run is without while it lives.
    """
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "modelmill.lock").open("a+")
        _runs.append(lock)
        lock.seek(0)
        here = lock.read() == socket.gethostname()
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.glob(left_by_dead) if here else ():
                left.unlink(missing_ok=True)
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not here:
            _write(lock, socket.gethostname())


@contextmanager
def _only_writer(output: Path) -> Iterator[None]:
    path = _lock_file(output)
    if path in _held:
        yield
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, output=output) as lock:
        with suppress(OSError):  # a full disk; then it is not said who writes
            _write(lock, f"process {os.getpid()} on {socket.gethostname()}")
        _held[path] = lock
        try:
            yield
        finally:
            del _held[path]
            path.unlink(missing_ok=True)


def _locked(path: Path, *, output: Path) -> IO[str]:
    """The lock file, open and ours; a file system without locks goes without."""
    for _ in range(TRIES):
        # Not emptied: while another run holds it, it says which.
        lock = path.open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed the file between our opening and our locking it.
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError:
            time.sleep(SECONDS_BETWEEN)
        except OSError as error:
            say(f"{path} cannot be locked ({error.strerror}): see to it that no other run writes {output}")
            return lock
        lock.close()
    raise LockedError(f"{output} is being written by {_describe(path)}; wait for it or end it")


def _write(lock: IO[str], text: str) -> None:
    """Replace its content; at once, since a buffer would be tried again when the file is closed."""
    os.ftruncate(lock.fileno(), 0)
    os.write(lock.fileno(), text.encode())


def _lock_file(output: Path) -> Path:
    place = output.absolute()
    return place.parent / f".{place.name}.lock"


def _describe(path: Path) -> str:
    """Whoever wrote the lock file."""
    try:
        said = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        said = ""
    if not (found := re.fullmatch(r"process (\d+) on (.+)", said)):
        return "another run"
    ended = found[2] == socket.gethostname() and not _is_alive(int(found[1]))
    return f"another run ({said}{', which has ended; a program that it started goes on' if ended else ''})"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # someone else's
        pass
    return True
