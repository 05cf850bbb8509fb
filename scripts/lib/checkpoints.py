"""Checkpoints of a training run: which are complete, which belong to this run, and the newest of them."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from lib.console import say
from lib.jsonfile import digest_json, read_json, write_json

PREFIX = "checkpoint-"
# Written last: a checkpoint without it, or whose files have other sizes, was cut short.
COMPLETE = "complete.json"


def run_folder(checkpoints: Path, identity: Any) -> Path:
    """
    The folder of one run's checkpoints: a run with other settings, data, base or code has another.

    Args:
        identity: all that decides about the run's result, as plain values.
    """
    return checkpoints / digest_json(identity)[:16]


def forget_run(run: Path) -> None:
    """Remove a finished run's checkpoints; those of other runs beside it stay."""
    shutil.rmtree(run, ignore_errors=True)
    with suppress(OSError):
        run.parent.rmdir()


def mark_complete(folder: Path) -> None:
    """Declare a checkpoint complete as it is."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    write_json(folder / COMPLETE, sizes)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written to its end, and every file has its size."""
    try:
        sizes = read_json(folder / COMPLETE)
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def newest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint with the most steps; incomplete ones are removed."""
    found = [path for path in run.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    for path in found:
        if not is_complete(path):
            say(f"a checkpoint at step {step_of(path)} was cut short and is removed")
            shutil.rmtree(path)
    return max((path for path in found if path.exists()), key=step_of, default=None)


def step_of(folder: Path) -> int:
    """The number of updates after which a checkpoint was written."""
    return int(folder.name.removeprefix(PREFIX))
