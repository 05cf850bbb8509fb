"""Reading TrackNet's tables: as they are published, and with everything that can be wrong with a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.clips import BOUNCING, EASY, NO_BALL, OCCLUDED, ClipError, Frame, read_clips, write_labels

HEADER = "file name,visibility,x-coordinate,y-coordinate,status\n"


def write_clip(folder: Path, table: str, *, frames: int = 3) -> Path:
    folder.mkdir(parents=True)
    for number in range(frames):
        (folder / f"{number:04d}.jpg").touch()
    (folder / "Label.csv").write_text(table, encoding="utf-8")
    return folder


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_a_table_as_it_is_published(mark: str, end: str, tmp_path: Path) -> None:
    rows = f"{mark}{HEADER}0000.jpg,1,599,423,2\n0001.jpg,0,,,\n0002.jpg,3, 601.5 ,417,0\n"
    clip = write_clip(tmp_path / "game1/Clip1", rows.replace("\n", end))
    assert read_clips(tmp_path)[0].frames == (
        Frame(clip / "0000.jpg", EASY, (599.0, 423.0), BOUNCING),
        Frame(clip / "0001.jpg", NO_BALL, None, None),
        Frame(clip / "0002.jpg", OCCLUDED, (601.5, 417.0), 0),
    )


def test_games_and_clips_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for place in ("game10/Clip1", "game2/Clip10", "game2/Clip9"):
        write_clip(tmp_path / place, f"{HEADER}0000.jpg,0,,,\n", frames=1)
    (tmp_path / "game2/notes").mkdir()
    assert [(clip.game, clip.name) for clip in read_clips(tmp_path)] == [
        ("game2", "Clip9"), ("game2", "Clip10"), ("game10", "Clip1"),
    ]  # fmt: skip


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "game1/Clip1", "")
    frames = (
        Frame(clip / "0000.jpg", EASY, (1.25, 2.0), BOUNCING),
        Frame(clip / "0001.jpg", NO_BALL, None, None),
        Frame(clip / "0002.jpg", OCCLUDED, (0.0, 719.5), None),
    )
    write_labels(clip, frames)
    assert read_clips(tmp_path)[0].frames == frames


BAD_ROWS = {
    "0000.jpg,4,1,1,0": "visibility is '4', expected one of 0, 1, 2, 3",
    "0000.jpg,,1,1,0": "visibility is '', expected one of 0, 1, 2, 3",
    "0000.jpg,1,,1,0": "x-coordinate is '', expected pixels, since visibility is 1",
    "0000.jpg,2,1,-3,0": "y-coordinate is '-3', expected pixels, since visibility is 2",
    "0000.jpg,1,nan,1,0": "x-coordinate is 'nan', expected pixels",
    "0000.jpg,1,1,1,bounce": "status is 'bounce', expected one of 0, 1, 2",
    "0000.jpg,1": "x-coordinate is '', expected pixels",
    ",1,1,1,0": "there is no file name",
    "9999.jpg,1,1,1,0": "there is no 9999.jpg",
    "0001.jpg,0,,,": "0001.jpg has a row already, line 2",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_bad_rows_are_told_with_file_and_line(row: str, tmp_path: Path) -> None:
    write_clip(tmp_path / "game1/Clip1", f"{HEADER}0001.jpg,0,,,\n0002.jpg,0,,,\n{row}\n")
    with pytest.raises(ClipError) as told:
        read_clips(tmp_path)
    assert f"game1/Clip1/Label.csv, line 4: {BAD_ROWS[row]}" in str(told.value)


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    write_clip(tmp_path / "game1/Clip1", f"{HEADER}0000.jpg,7,,,\n")
    write_clip(tmp_path / "game1/Clip2", "name,visible\n0000.jpg,1\n")
    (write_clip(tmp_path / "game2/Clip1", "") / "Label.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(ClipError) as told:
        read_clips(tmp_path)
    first, bad, unlabelled, columns, encoding = str(told.value).splitlines()
    assert first == f"{tmp_path}:"
    assert bad.endswith("game1/Clip1/Label.csv, line 2: visibility is '7', expected one of 0, 1, 2, 3")
    assert unlabelled.endswith("Clip1/Label.csv: no row for 0001.jpg, 0002.jpg")
    assert "Clip2/Label.csv, line 1: missing column file name, visibility, x-coordinate, y-coordinate" in columns
    assert "game2/Clip1/Label.csv: is no UTF-8 text" in encoding


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    rows = "".join(f"{number:04d}.jpg,9,,,\n" for number in range(100))
    write_clip(tmp_path / "game1/Clip1", HEADER + rows, frames=100)
    with pytest.raises(ClipError) as told:
        read_clips(tmp_path)
    assert len(str(told.value).splitlines()) == 22 and str(told.value).endswith("and 80 more")


def test_a_folder_without_clips(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match=r"has no game\*/Clip\*/Label.csv: name the folder above game1"):
        read_clips(tmp_path)
