"""Balls as heatmaps: drawing one into a heatmap, and reading its place back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peak:
    """The highest place of a heatmap: x and y in pixels of the frame, 0 being the middle of the first; its height."""

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
    width, height = size
    across = torch.arange(width, device=points.device) - points[:, :1]
    down = torch.arange(height, device=points.device) - points[:, 1:]
    drawn = torch.exp(-(down.square()[:, :, None] + across.square()[:, None, :]) / (2 * sigma**2))
    return torch.nan_to_num(drawn, nan=0.0)


def find_peaks(scores: Tensor) -> Tensor:
    """
    The highest place of each heatmap, to a part of a pixel.

    Through the logarithms of the highest pixel and its two neighbours goes one parabola in each direction, whose top
    is that of a Gaussian exactly.

    Args:
        scores: (batch, height, width), from 0 to 1.

    Returns:
        (batch, 3): x and y in pixels of the heatmap, and the score of the highest pixel.
    """
    batch, height, width = scores.shape
    best, place = scores.flatten(1).max(dim=1)
    row, column = place // width, place % width
    logs = scores.clamp_min(1e-12).log()
    each = torch.arange(batch, device=scores.device)
    x = column + _top(*(logs[each, row, (column + step).clamp(0, width - 1)] for step in (-1, 0, 1)))
    y = row + _top(*(logs[each, (row + step).clamp(0, height - 1), column] for step in (-1, 0, 1)))
    return torch.stack([x, y, best], dim=1)


def _top(before: Tensor, middle: Tensor, after: Tensor) -> Tensor:
    """Where the parabola through three neighbours is highest, from the middle one; half a pixel away at most."""
    bend = before - 2 * middle + after
    shift = 0.5 * (before - after) / torch.where(bend < 0, bend, -torch.ones_like(bend))
    return torch.where(bend < 0, shift, torch.zeros_like(shift)).clamp(-0.5, 0.5)
