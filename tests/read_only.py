"""A folder that nobody can write to, root neither, where this machine lets us mount it so."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def read_only(folder: Path) -> Iterator[str | None]:
    """
    Make a folder of files read-only until the block ends.

    Yields:
        None if it is, else why it is not.
    """
    everything = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in everything}
    mounted = _mount("--bind", folder, folder) is None
    problem = _mount("-o", "remount,bind,ro", folder) if mounted else "it cannot be mounted"
    if problem:
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
    try:
        yield problem if _can_write(folder) else None
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)
        for path, mode in modes.items():
            path.chmod(mode)


def _mount(*arguments: str | Path) -> str | None:
    """What stands in the way of a mount."""
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no mount command"
    return done.stderr.strip() or "mount has failed" if done.returncode else None


def _can_write(folder: Path) -> bool:
    """For root the permissions alone forbid nothing."""
    try:
        (folder / "written").touch()
    except OSError:
        return False
    (folder / "written").unlink()
    return True
