"""Outputs that get their final name only when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from lib.errors import ModelmillError
from lib.jsonfile import read_json
from lib.locks import only_writer
from lib.manifest import NAME

# What may lie in a folder of ours beside the files that its manifest names.
ALSO_OURS = frozenset({NAME, ".snakemake_timestamp", ".hub"})


class OutputError(ModelmillError):
    """An output would destroy what is not ours."""


@contextmanager
def finished_folder(output: Path, *, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """
    Give a temporary folder beside `output`; it replaces an earlier one when the block ends without an error.

    Args:
        output: the final folder; if it is there, it has to be empty or an artifact of ours.
        inputs: what the block reads; none of it may be lost to the output.

    Raises:
        OutputError: before the block, if something would be lost.
        LockedError: another run writes this output.
    """
    _refuse_loss(output, inputs)
    with only_writer(output):
        partial, earlier = (output.with_name(f".{output.name}.{kind}") for kind in ("partial", "earlier"))
        for left in (partial, earlier):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        # Not removed before its successor is there: a run that is killed meanwhile would leave half of it.
        if output.exists():
            os.replace(output, earlier)
        os.replace(partial, output)
        shutil.rmtree(earlier, ignore_errors=True)


@contextmanager
def finished_file(output: Path) -> Iterator[Path]:
    """
    Give a temporary path beside `output`, and rename it when the block ends without an error.

    Raises:
        LockedError: another run writes this output.
    """
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


def scratch_beside(output: Path) -> AbstractContextManager[Path]:
    """A scratch folder for who writes `output`: not in the system's, where a run that is killed leaves it for good."""
    return scratch_folder(output.with_name(f".{output.name}.scratch"))


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder, which is removed when the block ends; what a run that was killed left there is, too."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _refuse_loss(output: Path, inputs: Iterable[Path]) -> None:
    place = output.resolve()
    for path in inputs:
        if place in (path.resolve(), *path.resolve().parents):
            raise OutputError(f"{output} would replace its own input {path}; name another folder")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputError(f"{output} is there and no folder; name another one")
    if output.is_dir() and (foreign := sorted({path.name for path in output.iterdir()} - _own_files(output))):
        shown = ", ".join(foreign[:3])
        raise OutputError(f"{output} holds files that are not modelmill's ({shown}); name another folder, or remove it")


def _own_files(folder: Path) -> set[str]:
    """The files that were written here by us: those of the manifest, unless it lists a base used in place."""
    try:
        manifest = read_json(folder / NAME)
        in_place = manifest["artifact"] == "base" and (manifest["origin"] or {}).get("kind") == "path"
        return {*ALSO_OURS, *({} if in_place else manifest["files"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set(ALSO_OURS)
