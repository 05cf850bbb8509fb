"""Frames as a model's input: which ones, how they are scaled, and where the ball is then."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from lib.clips import EASY, HARD, NO_BALL, OCCLUDED, Clip, ClipError, Frame
from lib.frames import MomentReader, list_moments, read_frame, split_games

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def make_clip(game: str, kinds: list[int], name: str = "Clip1") -> Clip:
    frames = (
        Frame(Path(f"{game}/{name}/{number:04d}.jpg"), kind, (1.0, 2.0) if kind else None, None)
        for number, kind in enumerate(kinds)
    )
    return Clip(game, name, tuple(frames))


CLIPS = [
    make_clip("game1", [EASY, NO_BALL, OCCLUDED]),
    make_clip("game1", [HARD], "Clip2"),
    make_clip("game2", [EASY, EASY]),
]


def numbers(**how: object) -> list[tuple[int, ...]]:
    """The numbers of the frames of each moment of game1."""
    how = {"games": ["game1"], "frames": 1, **how}
    return [tuple(int(each.path.stem) for each in moment.frames) for moment in list_moments(CLIPS, **how)]


def test_a_moment_has_the_frames_before_it() -> None:
    assert numbers() == [(0,), (1,), (2,), (0,)]
    assert numbers(frames=3) == [(0, 0, 0), (0, 0, 1), (0, 1, 2), (0, 0, 0)]
    moment = list_moments(CLIPS, games=["game1"], frames=2)[3]
    assert {each.path.parent.name for each in moment.frames} == {"Clip2"}, "of another clip"
    assert moment.frame.visibility == HARD


def test_frames_that_are_masked_are_left_out_but_seen() -> None:
    assert numbers(invisible="mask") == [(0,), (2,), (0,)]
    assert numbers(occluded="mask") == [(0,), (1,), (0,)]
    assert numbers(occluded="empty", invisible="empty") == numbers()
    assert numbers(invisible="mask", frames=2) == [(0, 0), (1, 2), (0, 0)], "a masked frame still comes before the next"


def test_games_are_split_by_name() -> None:
    assert split_games(CLIPS, ["game2"]) == (["game1"], ["game2"])
    assert split_games(CLIPS, []) == (["game1", "game2"], [])
    with pytest.raises(ClipError, match="eval_games: there is no game3; the data has game1, game2"):
        split_games(CLIPS, ["game3"])
    with pytest.raises(ClipError, match="all games are held out"):
        split_games(CLIPS, ["game1", "game2"])


def spot(path: Path, x: float, y: float, size: tuple[int, int] = (320, 180)) -> Path:
    columns, rows = np.arange(size[0]), np.arange(size[1])
    shade = 255 * np.exp(-((columns[None] - x) ** 2 + (rows[:, None] - y) ** 2) / (2 * 9.0**2))
    Image.fromarray(np.rint(shade).astype(np.uint8)).save(path)
    return path


def middle_of(pixels: np.ndarray) -> tuple[float, float]:
    weight = pixels.astype(float) / pixels.sum()
    return float((weight.sum(axis=0) * np.arange(pixels.shape[1])).sum()), float(
        (weight.sum(axis=1) * np.arange(pixels.shape[0])).sum()
    )


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("size", [(160, 90), (100, 63), (70, 42), (640, 360)])
def test_a_spot_is_where_torch_puts_it(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    """However JPEG's own scaling was used: by interpolation of the whole picture, with torch's convention."""
    path = spot(tmp_path / f"frame.{kind}", 100.0, 80.0)
    pixels, own = read_frame(path, size)
    assert own == (320, 180) and pixels.shape == (size[1], size[0], 3) and pixels.dtype == np.uint8
    with Image.open(path) as picture:
        whole = torch.from_numpy(np.array(picture.convert("L"), dtype=np.float32))[None, None]
    expected = functional.interpolate(whole, size=size[::-1], mode="bilinear", antialias=True)[0, 0].numpy()
    assert middle_of(pixels[:, :, 0]) == pytest.approx(middle_of(expected), abs=0.15)
    assert np.abs(pixels[:, :, 0] - expected).max() < 16


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_pictures_of_every_mode_are_read_as_colours(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("frame.jpg" if mode == "CMYK" else "frame.png")
    Image.new("RGB", (32, 24), (255, 255, 255)).convert(mode).save(path)
    pixels, _ = read_frame(path, (16, 12))
    assert pixels.shape == (12, 16, 3) and (pixels > 250).all()


def test_colours_come_as_red_green_blue(tmp_path: Path) -> None:
    Image.new("RGB", (32, 24), (200, 100, 50)).save(tmp_path / "frame.png")
    assert read_frame(tmp_path / "frame.png", (16, 12))[0][0, 0].tolist() == [200, 100, 50]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def damaged(folder: Path) -> dict[str, bytes]:
    whole = spot(folder / "whole.jpg", 10, 10).read_bytes()
    png = spot(folder / "whole.png", 10, 10).read_bytes()
    at = png.index(b"IDAT")
    start = b"\x89PNG\r\n\x1a\n"
    return {
        "text": b"no picture",
        "nothing": b"",
        "cut jpeg": whole[: len(whole) // 2],
        "cut png": png[: len(png) // 2],
        "a chunk of no name": png[:at] + b"\x06\xe9s\x14" + png[at + 4 :],
        "a short header": start + chunk(b"IHDR", b"\0" * 5) + chunk(b"IEND", b""),
        "a size that cannot be": start + chunk(b"IHDR", struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0)),
    }


def test_damaged_pictures_are_named(tmp_path: Path) -> None:
    for kind, content in damaged(tmp_path).items():
        path = tmp_path / "frame.jpg"
        path.write_bytes(content)
        with pytest.raises(ClipError, match="frame.jpg: cannot be read as a picture") as told:
            read_frame(path, (16, 12))
        assert "\n" not in str(told.value), kind
    with pytest.raises(ClipError, match="absent.jpg: cannot be read as a picture"):
        read_frame(tmp_path / "absent.jpg", (16, 12))


def reader(folder: Path, visibility: int, ball: tuple[float, float] | None, **how: str) -> MomentReader:
    paths = [spot(folder / f"{number}.png", 100.0 + number, 80.0) for number in range(3)]
    frames = tuple(Frame(path, visibility, ball, None) for path in paths)
    moments = list_moments([Clip("game1", "Clip1", frames)], games=["game1"], frames=3)
    return MomentReader(moments, size=(64, 36), heatmap_size=(32, 18), **how)


def test_a_sample_has_all_frames_and_the_ball_of_the_last(tmp_path: Path) -> None:
    samples = reader(tmp_path, EASY, (100.0, 80.0))
    assert len(samples) == 3
    sample = samples[2]
    assert sample.pixels.shape == (9, 36, 64) and sample.pixels.dtype == torch.uint8 and sample.pixels.is_contiguous()
    for number in range(3):
        expected = read_frame(tmp_path / f"{number}.png", (64, 36))[0].transpose(2, 0, 1)
        np.testing.assert_array_equal(sample.pixels[3 * number : 3 * number + 3].numpy(), expected)
    # 320 pixels become 32: the middle of the 100th is at 100.5 / 10, less the half of one.
    assert sample.point == pytest.approx((9.55, 7.55)) and sample.size == (320, 180)


def test_a_ball_that_is_hidden_or_absent(tmp_path: Path) -> None:
    assert reader(tmp_path, OCCLUDED, (100.0, 80.0))[0].point == pytest.approx((9.55, 7.55))
    assert all(math.isnan(at) for at in reader(tmp_path, OCCLUDED, (100.0, 80.0), occluded="empty")[0].point)
    assert all(math.isnan(at) for at in reader(tmp_path, NO_BALL, None)[0].point)


def test_a_ball_at_the_border_and_beyond(tmp_path: Path) -> None:
    assert reader(tmp_path, EASY, (0.0, 0.0))[0].point == pytest.approx((-0.45, -0.45))
    with pytest.raises(ClipError, match=r"0.png: the ball is at \(321.0, 80.0\), outside of 320×180 pixels"):
        reader(tmp_path, EASY, (321.0, 80.0))[0]


def test_torch_is_not_needed_to_read_frames() -> None:
    program = "import sys; import lib.frames, lib.heatmap_onnx, lib.heatmap_peaks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=SCRIPTS).returncode == 0
