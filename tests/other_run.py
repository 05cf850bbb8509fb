"""Another run that writes an output at this moment, as far as its lock tells."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITER = "process 7 on elsewhere"


@contextmanager
def other_run(output: Path) -> Iterator[None]:
    """Hold an output's lock; by a file of its own, as another process does."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_name(f".{output.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(WRITER)
        lock.flush()
        yield
