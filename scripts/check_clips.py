"""Check clips in TrackNet's layout and write down which they are, before anything long starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.cli import usable_cores
from lib.clips import identify_clips, read_clips
from lib.frames import check_pictures
from lib.input_check import run_input_check


def identify(clips: Path) -> tuple[dict[str, Any], str]:
    """
    Identity of the clips, and their number in words.

    Raises:
        ClipError: the clips cannot be used.
    """
    found = read_clips(clips)
    check_pictures(found, threads=usable_cores())
    identity = identify_clips(clips, found, threads=usable_cores())
    seen = identity["frames"] - identity["visibility"]["no ball"]
    counts = f"{identity['frames']} frames of {identity['clips']} clips in {len(identity['games'])} games"
    return identity, f"{counts}, {seen} with a ball"


if __name__ == "__main__":
    run_input_check(
        __doc__, "clips", what="folder of game*/Clip*/ with frames and Label.csv", identify=identify, metavar="DIR"
    )
