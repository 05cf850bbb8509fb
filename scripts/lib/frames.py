"""Frames of clips as a model's input, and where the ball is in them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lib.clips import NO_BALL, OCCLUDED, SHOWN_PROBLEMS, Clip, ClipError, Frame
from lib.errors import first_line

if TYPE_CHECKING:
    from torch import Tensor

# What is made of frames whose ball cannot be seen: an empty heatmap, none at all, or (occluded) the ball's.
EMPTY, MASK, TARGET = "empty", "mask", "target"

# What Pillow says, beside OSError, of pictures that are damaged: of a PNG's chunks, and of a size that cannot be.
DAMAGED = (SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Moment:
    """A frame with those before it, as many as the model sees at a time, the frame itself last."""

    frames: tuple[Frame, ...]

    @property
    def frame(self) -> Frame:
        """The frame that is asked about."""
        return self.frames[-1]


@dataclass(frozen=True)
class HeatmapSample:
    """
    A moment read and scaled.

    Attributes:
        pixels: (3 · frames, height, width), uint8.
        point: x and y of the ball in pixels of the heatmap; not a number where there is none.
        size: width and height of the frame as it lies on disk.
    """

    pixels: Tensor
    point: tuple[float, float]
    size: tuple[int, int]


@dataclass(frozen=True)
class HeatmapBatch:
    """
    Samples in one tensor: each by itself would be handed over by itself from the process that reads it, which is slow.

    Attributes:
        pixels: (samples, 3 · frames, height, width), uint8.
        points: (samples, 2), float64: x and y of each.
    """

    pixels: Tensor
    points: Tensor

    @classmethod
    def of(cls, samples: Sequence[HeatmapSample]) -> HeatmapBatch:
        """A batch of samples of one size."""
        import torch

        points = torch.tensor([sample.point for sample in samples], dtype=torch.float64)
        return cls(torch.stack([sample.pixels for sample in samples]), points)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, part: slice) -> HeatmapBatch:
        return HeatmapBatch(self.pixels[part], self.points[part])

    def __contains__(self, _: object) -> bool:
        """No key: transformers' Trainer looks for labels."""
        return False


def list_moments(
    clips: Sequence[Clip], *, games: Collection[str], frames: int, invisible: str = EMPTY, occluded: str = TARGET
) -> list[Moment]:
    """
    The frames of some games, each with those before it; before a clip's first frame that one stands in.

    Args:
        invisible, occluded: see EMPTY; masked frames are left out.
    """
    left_out = {NO_BALL} if invisible == MASK else set()
    left_out |= {OCCLUDED} if occluded == MASK else set()
    return [
        Moment(tuple(clip.frames[max(0, number - back)] for back in reversed(range(frames))))
        for clip in clips
        if clip.game in games
        for number, frame in enumerate(clip.frames)
        if frame.visibility not in left_out
    ]


def split_games(clips: Sequence[Clip], eval_games: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Names of the games to train on, and of those held out.

    Raises:
        ClipError: a game is held out that is not there, or all of them are.
    """
    games = list(dict.fromkeys(clip.game for clip in clips))
    if unknown := [name for name in eval_games if name not in games]:
        raise ClipError(f"eval_games: there is no {', '.join(unknown)}; the data has {', '.join(games)}")
    train = [name for name in games if name not in eval_games]
    if not train:
        raise ClipError(f"eval_games: all games are held out ({', '.join(games)}); leave some to train on")
    return train, list(eval_games)


def read_frame(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """
    A frame scaled to a width and height.

    Returns:
        (height, width, 3), uint8, and the frame's own width and height.

    Raises:
        ClipError: it is no picture, or cut short.
    """
    try:
        with Image.open(path) as picture:
            own = picture.size
            picture.draft("RGB", size)  # JPEG can be read at a half or a quarter of its size
            return np.array(picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)), own
    except (OSError, *DAMAGED) as error:
        raise ClipError(f"{path}: cannot be read as a picture ({first_line(error)})") from error


def check_ball(frame: Frame, size: tuple[int, int]) -> None:
    """
    Raises:
        ClipError: the ball lies outside of the frame, whose width and height are given.
    """
    if frame.ball and not (frame.ball[0] <= size[0] and frame.ball[1] <= size[1]):
        raise ClipError(f"{frame.path}: the ball is at {frame.ball}, outside of {size[0]}×{size[1]} pixels")


def check_pictures(clips: Sequence[Clip], *, threads: int = 1) -> None:
    """
    Decode every frame: a fault told here is not told in the middle of a training.

    Raises:
        ClipError: listing frames that are no whole pictures or not of the size of the clip's first, and balls outside.
    """
    problems: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        sizes = pool.map(_picture_size, (frame.path for clip in clips for frame in clip.frames))
    for clip in clips:
        first: tuple[int, int] | None = None
        for frame in clip.frames:
            size = next(sizes)
            if isinstance(size, ClipError):
                problems.append(str(size))
                continue
            try:
                first = first or size
                if size != first:
                    raise ClipError(
                        f"{frame.path}: is of {size[0]}×{size[1]} pixels, {clip.frames[0].path.name} of "
                        f"{first[0]}×{first[1]}; a clip's frames are of one camera"
                    )
                check_ball(frame, size)
            except ClipError as error:
                problems.append(str(error))
    if problems:
        more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise ClipError("\n  ".join(["frames that cannot be used:", *problems[:SHOWN_PROBLEMS], *more]))


def _picture_size(path: Path) -> tuple[int, int] | ClipError:
    """The size of a picture that is whole; decoded as coarsely as its format allows, since nobody looks at it."""
    try:
        with Image.open(path) as picture:
            size = picture.size
            picture.draft("L", (1, 1))
            picture.load()
            return size
    except (OSError, *DAMAGED) as error:
        return ClipError(f"{path}: cannot be read as a picture ({first_line(error)})")


class MomentReader:
    """A data set of moments, read when they are asked for."""

    def __init__(
        self, moments: Sequence[Moment], *, size: tuple[int, int], heatmap_size: tuple[int, int], occluded: str = TARGET
    ) -> None:
        """
        Args:
            size: width and height of the model's input.
            heatmap_size: of its heatmap.
            occluded: TARGET, or EMPTY for a heatmap without the ball.
        """
        self._moments, self._size, self._heatmap, self._occluded = moments, size, heatmap_size, occluded

    def __len__(self) -> int:
        return len(self._moments)

    def __getitem__(self, number: int) -> HeatmapSample:
        """
        Raises:
            ClipError: see `read_frame`; the ball lies outside of the frame.
        """
        import torch

        from lib.heatmap_peaks import scale_point

        moment = self._moments[number]
        pictures = [read_frame(frame.path, self._size) for frame in moment.frames]
        pixels = torch.from_numpy(np.concatenate([picture for picture, _ in pictures], axis=2)).permute(2, 0, 1)
        frame, own = moment.frame, pictures[-1][1]
        check_ball(frame, own)
        drawn = frame.ball and (frame.visibility != OCCLUDED or self._occluded == TARGET)
        point = scale_point(*frame.ball, own, self._heatmap) if drawn and frame.ball else (math.nan, math.nan)
        return HeatmapSample(pixels.contiguous(), point, own)
