"""Finding adapters in peft's format, and telling the complete ones from those that are still being written."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path

from lib.adapter_folder import CONFIG, PICKLED, WEIGHTS
from lib.checkpoint import CheckpointError
from lib.errors import ModelmillError
from lib.jsonfile import read_json
from lib.safetensors_file import read_header

SHOWN = 10


class AdapterError(ModelmillError):
    """There is no complete adapter where one was looked for, or it changed while it was read."""


def latest_adapter(folder: Path, *, passed_over: Collection[Path] = ()) -> Path:
    """
    The newest complete adapter in a folder or anywhere below it.

    Newest is the one whose weights were written last; of several written at the same time, the last by path. Hidden
    folders do not count. Links are followed, but a folder that is there without one goes by its own name.

    Args:
        folder: where to look.
        passed_over: folders that do not count, with all that lies below them.

    Raises:
        AdapterError: there is none; the incomplete ones are listed.
    """
    if not os.path.isdir(folder):  # unlike the path's own, no error for a name that is too long
        raise AdapterError(f"there is no folder {folder}")
    found = [
        (_written(place / WEIGHTS), str(place))
        for place in _folders(folder, passed_over=passed_over)
        if any(os.path.isfile(place / name) for name in (CONFIG, WEIGHTS, PICKLED))
    ]
    incomplete = []
    for _, place in sorted(found, reverse=True):
        problem = adapter_problem(Path(place))
        if problem is None:
            return Path(place)
        incomplete.append(f"  {place}: {problem}")
    if len(incomplete) > SHOWN:
        incomplete[SHOWN:] = [f"  and {len(incomplete) - SHOWN} older ones"]
    raise AdapterError("\n".join([f"no complete adapter under {folder}", *incomplete]))


def adapter_problem(folder: Path) -> str | None:
    """
    What keeps a folder from being a complete adapter; None if nothing does.

    Only headers are read. Whether the adapter can be merged, and into which base, is lib.lora's to say.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not os.path.isfile(folder / name)]
    if WEIGHTS in missing and os.path.isfile(folder / PICKLED):
        return f"{PICKLED} is pickled and can run code when read; save the adapter as {WEIGHTS}"
    if missing:
        return f"{' and '.join(missing)} missing" if os.path.isdir(folder) else "there is no such folder"
    try:
        read_header(folder / WEIGHTS)
        if not isinstance(read_json(folder / CONFIG), dict):
            return f"{CONFIG} is damaged: expected an object"
    except (CheckpointError, ValueError) as error:
        return str(error).removeprefix(f"{folder}/")
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _folders(root: Path, *, passed_over: Collection[Path]) -> Iterator[Path]:
    """A folder and all below it, each once; links come last, so that a folder is met by its own name first."""
    seen = {_identity(path) for path in passed_over if path.is_dir()}
    waiting = deque([root])
    while waiting:
        folder = waiting.popleft()
        try:
            identity, entries = _identity(folder), sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # removed meanwhile, or not ours to read
            continue
        if identity in seen:
            continue
        seen.add(identity)
        yield folder
        for entry in entries:
            # os.path's, unlike the entry's own, says no to a link to itself, and to what is not ours to read.
            if os.path.isdir(entry.path) and not entry.name.startswith("."):
                (waiting.append if entry.is_symlink() else waiting.appendleft)(folder / entry.name)


def _identity(folder: Path) -> tuple[int, int]:
    """What is the same however a folder is reached."""
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


def _written(weights: Path) -> int:
    """When a file was written, in nanoseconds; 0 if it is not there."""
    try:
        return weights.stat().st_mtime_ns
    except OSError:
        return 0
