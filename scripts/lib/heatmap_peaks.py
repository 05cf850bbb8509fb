"""Balls as heatmaps: drawing one into a heatmap, and reading its place back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

LEAST_SCORE = 1e-12  # has a logarithm


@dataclass(frozen=True)
class Peak:
    """A heatmap's highest place and its height; x and y in pixels of the frame, 0 being the middle of the first."""

    x: float
    y: float
    score: float


def scale_point(x: float, y: float, old: tuple[int, int], new: tuple[int, int]) -> tuple[float, float]:
    """A point of a picture in one that is scaled to another width and height; of a pixel the middle is meant."""
    (width, height), (new_width, new_height) = old, new
    return (x + 0.5) * new_width / width - 0.5, (y + 0.5) * new_height / height - 0.5


def draw_targets(points: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """
    Gaussians with 1 at the ball's exact place, which may lie between pixels.

    Args:
        points: (batch, 2), x and y in pixels of the heatmap; not a number where there is no ball.
        size: width and height of the heatmap.
        sigma: of the Gaussian, in its pixels.

    Returns:
        (batch, height, width), float32; zeros where there is no ball.
    """
    import torch

    width, height = size
    across = torch.arange(width, device=points.device) - points[:, :1]
    down = torch.arange(height, device=points.device) - points[:, 1:]
    drawn = torch.exp(-(down.square()[:, :, None] + across.square()[:, None, :]) / (2 * sigma**2))
    return torch.nan_to_num(drawn, nan=0.0)


def find_peaks(scores: Tensor) -> Tensor:
    """
    The highest place of each heatmap, to a part of a pixel; see `highest_places`.

    Args:
        scores: (batch, height, width), from 0 to 1, on any device.

    Returns:
        (batch, 3), float32, where `scores` are: x and y in pixels of the heatmap, and the score of the highest pixel.
    """
    import torch

    return torch.from_numpy(highest_places(scores.detach().float().cpu().numpy())).to(scores.device)


def highest_places(scores: np.ndarray) -> np.ndarray:
    """
    The highest place of each heatmap, to a part of a pixel.

    Through the logarithms of the highest pixel and its two neighbours (at the border: the next two) goes one parabola
    in each direction, whose top is that of a Gaussian exactly.

    Args:
        scores: (batch, height, width), from 0 to 1.

    Returns:
        (batch, 3), float32: x and y in pixels of the heatmap, and the score of the highest pixel.
    """
    batch, height, width = scores.shape
    place = scores.reshape(batch, -1).argmax(axis=1)
    row, column = place // width, place % width
    each = np.arange(batch)
    logs = np.log(np.maximum(scores, LEAST_SCORE))
    x, y = _top(logs[each, row, :], column), _top(logs[each, :, column], row)
    return np.stack([x, y, scores[each, row, column]], axis=1).astype(np.float32)


def _top(lines: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """Where a parabola through three pixels of each line is highest: half a pixel from its highest one at most."""
    last = lines.shape[1] - 1
    if last < 2:
        return highest.astype(np.float32)
    middle, each = highest.clip(1, last - 1), np.arange(len(lines))
    before, centre, after = (lines[each, middle + step] for step in (-1, 0, 1))
    bend = before - 2 * centre + after
    bent = bend < 0
    top = np.where(bent, middle + 0.5 * (before - after) / np.where(bent, bend, -1), highest)
    return top.clip(highest - 0.5, highest + 0.5)


def place_peak(
    highest: np.ndarray, *, heatmap_size: tuple[int, int], frame_size: tuple[int, int], threshold: float
) -> Peak | None:
    """
    A ball in pixels of the frame.

    Args:
        highest: a row of `highest_places`.
        threshold: the least score of a ball.
    """
    x, y, score = (float(value) for value in highest)
    return Peak(*scale_point(x, y, heatmap_size, frame_size), score) if score >= threshold else None
