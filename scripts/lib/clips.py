"""TrackNet's data: games of clips, each a folder of frames with a table that says where the ball is."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import ModelmillError
from lib.jsonfile import digest_json
from lib.manifest import describe_files

LABELS = "Label.csv"
COLUMNS = ("file name", "visibility", "x-coordinate", "y-coordinate", "status")
NO_BALL, EASY, HARD, OCCLUDED = range(4)
VISIBILITIES = {NO_BALL: "no ball", EASY: "easy", HARD: "hard", OCCLUDED: "occluded"}
FLYING, HIT, BOUNCING = range(3)
SHOWN_PROBLEMS = 20


class ClipError(ModelmillError):
    """There are no clips, or rows of their tables cannot be used."""


@dataclass(frozen=True)
class Frame:
    """
    A frame and its row.

    Attributes:
        visibility: NO_BALL in the picture, EASY or HARD to see, or OCCLUDED.
        ball: its centre, x and y in pixels of the frame, 0 being the middle of the first; None with NO_BALL.
        status: FLYING, HIT or BOUNCING; None with NO_BALL, or where the table leaves it out.
    """

    path: Path
    visibility: int
    ball: tuple[float, float] | None
    status: int | None


@dataclass(frozen=True)
class Clip:
    """Frames of one camera that follow one another."""

    game: str
    name: str
    frames: tuple[Frame, ...]


def read_clips(folder: Path) -> list[Clip]:
    """
    Read every `game*/Clip*/` of a data set, in the order of their numbers; pictures are not opened.

    Raises:
        ClipError: there is no clip; or listing bad rows with file and line, missing frames, and frames without a row.
    """
    tables = sorted(folder.glob(f"game*/Clip*/{LABELS}"), key=lambda path: by_number(path.parts[-3:]))
    if not tables:
        raise ClipError(f"{folder} has no game*/Clip*/{LABELS}: name the folder above game1")
    problems: list[str] = []
    clips = [Clip(path.parts[-3], path.parts[-2], tuple(_read_frames(path, problems))) for path in tables]
    if problems:
        more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise ClipError("\n  ".join([f"{folder}:", *problems[:SHOWN_PROBLEMS], *more]))
    return clips


def identify_clips(folder: Path, clips: Sequence[Clip], *, threads: int) -> dict[str, Any]:
    """
    What a data set is, wherever its folder lies.

    Returns:
        A digest of every frame and table by their names within the folder, and how many there are of what.
    """
    frames = [frame for clip in clips for frame in clip.frames]
    tables = {frame.path.parent / LABELS for frame in frames}
    names = sorted(path.relative_to(folder).as_posix() for path in [*tables, *(frame.path for frame in frames)])
    return {
        "digest": digest_json(describe_files(folder, names, threads=threads)),
        "games": list(dict.fromkeys(clip.game for clip in clips)),
        "clips": len(clips),
        "frames": len(frames),
        "visibility": {name: sum(frame.visibility == kind for frame in frames) for kind, name in VISIBILITIES.items()},
    }


def write_labels(folder: Path, frames: Sequence[Frame]) -> None:
    """Write a clip's table, as TrackNet has it: nothing but a 0 for a frame without a ball."""
    with (folder / LABELS).open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for frame in frames:
            place = frame.ball or ("", "")
            rows.writerow([frame.path.name, frame.visibility, *place, "" if frame.status is None else frame.status])


def _read_frames(path: Path, problems: list[str]) -> Iterator[Frame]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark before it
    except UnicodeDecodeError as error:
        problems.append(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start})")
        return
    rows = csv.DictReader(text.splitlines(), skipinitialspace=True)
    if missing := [name for name in COLUMNS[:4] if name not in (rows.fieldnames or ())]:
        problems.append(f"{path}, line 1: missing column {', '.join(missing)}; expected {','.join(COLUMNS)}")
        return
    named: dict[str, int] = {}
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        name = (row["file name"] or "").strip()
        try:
            frame = _read_row(path.parent / name, row)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        finally:
            repeated = named.setdefault(name, rows.line_num)
        if repeated != rows.line_num:
            problems.append(f"{where}: {name} has a row already, line {repeated}")
        elif not frame.path.is_file():
            problems.append(f"{where}: there is no {frame.path.name}")
        yield frame
    unlabelled = sorted(each.name for each in path.parent.glob("*.jpg") if each.name not in named)
    if unlabelled:
        problems.append(f"{path}: no row for {', '.join(unlabelled[:5])}{' …' if len(unlabelled) > 5 else ''}")


def _read_row(path: Path, row: dict[str, str | None]) -> Frame:
    """
    Raises:
        ValueError: saying which value cannot be.
    """
    cells = {name: (row.get(name) or "").strip() for name in COLUMNS}
    if not cells["file name"]:
        raise ValueError("there is no file name")
    visibility = _one_of(cells, "visibility", (NO_BALL, EASY, HARD, OCCLUDED))
    status = _one_of(cells, "status", (FLYING, HIT, BOUNCING)) if cells["status"] else None
    if visibility == NO_BALL:
        return Frame(path, NO_BALL, ball=None, status=None)
    x, y = (_coordinate(cells, name) for name in COLUMNS[2:4])
    return Frame(path, visibility, ball=(x, y), status=status)


def _one_of(cells: dict[str, str], name: str, allowed: Sequence[int]) -> int:
    if cells[name] not in map(str, allowed):
        raise ValueError(f"{name} is {cells[name]!r}, expected one of {', '.join(map(str, allowed))}")
    return int(cells[name])


def _coordinate(cells: dict[str, str], name: str) -> float:
    try:
        value = float(cells[name])
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {cells[name]!r}, expected pixels, since visibility is {cells['visibility']}")
    return value


def by_number(names: Sequence[str]) -> list[list[tuple[int, str]]]:
    """So that Clip2 comes before Clip10."""
    return [[(int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)] for name in names]
