"""Outputs that get their final name only when they are complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lib.console import note
from lib.errors import ModelmillError


class OutputError(ModelmillError):
    """An output is being written by another run."""


@contextmanager
def finished_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder beside `output`; it replaces an earlier one when the block ends without an error."""
    with only_writer(output):
        partial = output.with_name(f".{output.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if output.exists():
            shutil.rmtree(output)
        os.replace(partial, output)


@contextmanager
def finished_file(output: Path) -> Iterator[Path]:
    """Give a temporary path beside `output`, and rename it when the block ends without an error."""
    with only_writer(output):
        partial = output.with_name(f".{output.name}.partial")
        partial.unlink(missing_ok=True)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        os.replace(partial, output)


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """
    Hold the right to write `output`, by a lock file beside it, until the block ends.

    A job whose Snakemake was killed goes on writing; a second one must not write beside it.

    Raises:
        OutputError: another run holds it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{output.name}.lock")
    with path.open("w") as lock:
        if not _locked(lock, path):
            raise OutputError(f"{output} is being written by another run; wait for it or end it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(lock: IO[str], path: Path) -> bool:
    """Whether the lock is ours; a file system without locks goes without."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its holder may have removed the file between our opening and our locking it.
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        note(f"{path} cannot be locked ({error.strerror})")
        return True
