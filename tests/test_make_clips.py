"""Drawn clips: in TrackNet's layout, with the ball where the table says that it is."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from make_clips import make_clips
from PIL import Image
from small_disk import small_disk

from lib.cli import UsageError
from lib.clips import COLUMNS, EASY, HARD, NO_BALL, OCCLUDED, read_clips

SIZE = (640, 360)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "data"
    make_clips(output=folder, games=3, clips=2, frames=40, size=SIZE, seed=4)
    return folder


def ball_in(picture: np.ndarray, near: tuple[float, float]) -> tuple[float, float]:
    """The centre of what is as yellow as a ball, within some pixels of a place."""
    x, y = (round(value) for value in near)
    left, top = max(0, x - 12), max(0, y - 12)
    part = picture[top : y + 13, left : x + 13].astype(float)
    weight = np.clip(np.minimum(part[..., 0], part[..., 1]) - part[..., 2] - 40, 0, None)
    rows, columns = np.mgrid[top : top + part.shape[0], left : left + part.shape[1]]
    return float((columns * weight).sum() / weight.sum()), float((rows * weight).sum() / weight.sum())


def test_the_layout_is_tracknets(drawn: Path) -> None:
    folders = sorted(str(path.relative_to(drawn)) for path in drawn.glob("*/*"))
    assert folders == [f"game{game}/Clip{clip}" for game in (1, 2, 3) for clip in (1, 2)]
    clip = drawn / "game1/Clip1"
    assert sorted(path.name for path in clip.iterdir()) == [*(f"{number:04d}.jpg" for number in range(40)), "Label.csv"]
    with (clip / "Label.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == COLUMNS
    assert all(row[2:] == ["", "", ""] for row in rows[1:] if row[1] == "0")
    assert Image.open(clip / "0000.jpg").size == SIZE


def test_the_ball_is_where_the_table_says(drawn: Path) -> None:
    """Found by its colour, of which JPEG keeps every second pixel."""
    distances = []
    for clip in read_clips(drawn):
        for frame in clip.frames:
            if frame.visibility == EASY and frame.ball:
                found = ball_in(np.asarray(Image.open(frame.path)), frame.ball)
                distances.append(np.hypot(found[0] - frame.ball[0], found[1] - frame.ball[1]))
    assert len(distances) > 80
    assert np.quantile(distances, 0.9) < 0.5
    assert max(distances) < 5  # none is hidden


def test_all_kinds_of_visibility_are_there(drawn: Path) -> None:
    kinds = [frame.visibility for clip in read_clips(drawn) for frame in clip.frames]
    assert set(kinds) == {NO_BALL, EASY, HARD, OCCLUDED}
    assert kinds.count(EASY) > len(kinds) / 3


def test_a_seed_gives_the_same_clips(drawn: Path, tmp_path: Path) -> None:
    for seed in (4, 5):
        make_clips(output=tmp_path / str(seed), games=1, clips=1, frames=3, size=SIZE, seed=seed)
    same, other = (tmp_path / seed / "game1/Clip1" for seed in "45")
    # The first frames do not depend on how many follow.
    assert (same / "0001.jpg").read_bytes() == (drawn / "game1/Clip1/0001.jpg").read_bytes()
    assert (other / "0001.jpg").read_bytes() != (same / "0001.jpg").read_bytes()


def test_nothing_is_drawn_over_what_is_there(drawn: Path) -> None:
    with pytest.raises(UsageError, match="has games already"):
        make_clips(output=drawn, games=1, clips=1, frames=1, size=SIZE, seed=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "640"], "expected WIDTHxHEIGHT"),
        (["--size", "8x8"], "of at least 16"),
        (["--frames", "0"], "of at least 1"),
    ],
)
def test_wrong_use(options: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts/make_clips.py", "--output", tmp_path / "data", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_set_that_could_not_be_drawn_whole_is_not_left(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=128) as disk:
        options = ["--output", str(disk / "set"), "--games", "3", "--frames", "20", "--size", "384x216"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts/make_clips.py"), *options], capture_output=True, text=True
        )
        assert done.returncode == 1 and "the disk is full" in done.stderr
        assert not [path for path in disk.iterdir() if not path.name.endswith(".lock")]
