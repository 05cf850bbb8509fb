"""The identity of clips: what it counts, and what changes it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
HEADER = "file name,visibility,x-coordinate,y-coordinate,status\n"
ROWS = {"0000.jpg": "1,10,20,0", "0001.jpg": "2,11,21,0", "0002.jpg": "3,12,22,1", "0003.jpg": "0,,,"}


def picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "JPEG")
    return file.getvalue()


PICTURE = picture(64, 48)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two games, of one and two clips; any bytes may follow a picture, and tell frames apart."""
    for number, name in enumerate(("game1/Clip1", "game1/Clip2", "game2/Clip1")):
        folder = tmp_path / "tennis" / name
        folder.mkdir(parents=True)
        for frame in ROWS:
            (folder / frame).write_bytes(PICTURE + f"{number} {frame}".encode())
        (folder / "Label.csv").write_text(HEADER + "".join(f"{frame},{row}\n" for frame, row in ROWS.items()))
    return tmp_path / "tennis"


def run(clips: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/check_clips.py", "--clips", clips, "--output", output]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def identity(clips: Path) -> dict[str, Any]:
    output = clips.parent / "clips.json"
    done = run(clips, output)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


def test_what_there_is_is_counted(clips: Path) -> None:
    found = identity(clips)
    digest = found.pop("digest")
    assert found == {
        "games": ["game1", "game2"],
        "clips": 3,
        "frames": 12,
        "visibility": {"no ball": 3, "easy": 3, "hard": 3, "occluded": 3},
    }
    assert len(digest) == len(hashlib.sha256().hexdigest())


def test_the_place_and_the_times_do_not_count(clips: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(clips, tmp_path / "elsewhere" / "else"))
    for file in moved.rglob("*"):
        os.utime(file, (1, 1))
    assert identity(moved) == identity(clips)


def test_every_byte_and_every_name_counts(clips: Path) -> None:
    digests = {identity(clips)["digest"]}
    frame = clips / "game2/Clip1/0003.jpg"
    frame.write_bytes(PICTURE + b"another")
    digests.add(identity(clips)["digest"])
    table = clips / "game1/Clip2/Label.csv"
    table.write_text(table.read_text().replace("10,20", "10,21"))
    digests.add(identity(clips)["digest"])
    (clips / "game2").rename(clips / "game3")
    digests.add(identity(clips)["digest"])
    assert len(digests) == 4


def test_bad_rows_are_listed_and_nothing_is_written(clips: Path, tmp_path: Path) -> None:
    (clips / "game1/Clip1/0001.jpg").unlink()
    table = clips / "game2/Clip1/Label.csv"
    table.write_text(table.read_text().replace("1,10,20", "7,10,20"))
    done = run(clips, tmp_path / "clips.json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "line 3: there is no 0001.jpg" in done.stderr
    assert "game2/Clip1/Label.csv, line 2: visibility is '7'" in done.stderr
    assert not (tmp_path / "clips.json").exists()


def test_frames_that_training_would_stop_at_are_listed_before_it(clips: Path, tmp_path: Path) -> None:
    (clips / "game1/Clip1/0001.jpg").write_text("no picture")
    (clips / "game1/Clip2/0003.jpg").write_bytes(picture(32, 24))
    whole = (clips / "game2/Clip1/0002.jpg").read_bytes()
    (clips / "game2/Clip1/0002.jpg").write_bytes(whole[: len(whole) - 40])
    table = clips / "game2/Clip1/Label.csv"
    table.write_text(table.read_text().replace("1,10,20", "1,10,49"))
    done = run(clips, tmp_path / "clips.json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "game1/Clip1/0001.jpg: cannot be read as a picture" in done.stderr
    assert "game2/Clip1/0002.jpg: cannot be read as a picture (image file is truncated" in done.stderr
    assert "game1/Clip2/0003.jpg: is of 32×24 pixels, 0000.jpg of 64×48" in done.stderr
    assert "game2/Clip1/0000.jpg: the ball is at (10.0, 49.0), outside of 64×48 pixels" in done.stderr
    assert len(done.stderr.splitlines()) == 5 and not (tmp_path / "clips.json").exists()


def test_no_clips_at_all(tmp_path: Path) -> None:
    done = run(tmp_path, tmp_path / "clips.json")
    assert done.returncode == 1
    assert "name the folder above game1" in done.stderr
