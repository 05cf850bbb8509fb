"""Check clips in TrackNet's layout and write down which they are, before anything long starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.cli import usable_cores
from lib.clips import EASY, HARD, LABELS, NO_BALL, OCCLUDED, read_clips
from lib.frames import check_pictures
from lib.input_check import run_input_check
from lib.jsonfile import digest_json
from lib.manifest import describe_files

VISIBILITY = {"no_ball": NO_BALL, "easy": EASY, "hard": HARD, "occluded": OCCLUDED}


def identify(clips: Path) -> tuple[dict[str, Any], str]:
    """
    A digest of every frame and table by their names within the folder, and how many there are of what.

    Raises:
        ClipError: the clips cannot be used.
    """
    found = read_clips(clips)
    check_pictures(found)
    frames = [frame for clip in found for frame in clip.frames]
    tables = [clips / clip.game / clip.name / LABELS for clip in found]
    names = sorted(path.relative_to(clips).as_posix() for path in [*tables, *(frame.path for frame in frames)])
    visibility = {name: sum(frame.visibility == kind for frame in frames) for name, kind in VISIBILITY.items()}
    identity = {
        "digest": digest_json(describe_files(clips, names, threads=usable_cores())),
        "games": list(dict.fromkeys(clip.game for clip in found)),
        "clips": len(found),
        "frames": len(frames),
        "visibility": visibility,
    }
    seen = len(frames) - visibility["no_ball"]
    return identity, f"{len(frames)} frames of {len(found)} clips in {len(identity['games'])} games, {seen} with a ball"


if __name__ == "__main__":
    run_input_check(
        __doc__, "clips", what="folder of game*/Clip*/ with frames and Label.csv", identify=identify, metavar="DIR"
    )
