"""Outputs that get their final name only when they are complete."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.errors import ModelmillError


class OutputError(ModelmillError):
    """An output is being written by another run."""


@contextmanager
def finished_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder beside `output`; it replaces an earlier one when the block ends without an error."""
    with _only_writer(output):
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
    with _only_writer(output):
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
def _only_writer(output: Path) -> Iterator[None]:
    """A job whose Snakemake was killed goes on writing; a second one must not write beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{output.name}.lock")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                raise BlockingIOError  # the holder removed the file between our opening and our locking it
        except BlockingIOError:
            raise OutputError(f"{output} is being written by another run; wait for it or end it") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
