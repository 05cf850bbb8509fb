"""Drawing balls into heatmaps, and reading their places back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from lib.heatmap_peaks import Peak, draw_targets, find_peaks, highest_places, place_peak, scale_point

WIDTH, HEIGHT = 32, 24


def gaussian(x: float, y: float, *, sigma: float = 2.0) -> np.ndarray:
    """A ball's heatmap, each pixel by the formula."""
    return np.array(
        [
            [math.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * sigma**2)) for column in range(WIDTH)]
            for row in range(HEIGHT)
        ],
        dtype=np.float32,
    )


PLACES = [
    (10.0, 8.0), (10.25, 8.75), (15.5, 3.5), (20.49, 7.51),
    (0.0, 0.0), (0.3, 23.0), (-0.4, 5.2), (31.0, 12.4), (31.4, 23.3),
]  # fmt: skip


@pytest.mark.parametrize(("x", "y"), PLACES)
def test_a_drawn_ball_is_by_the_formula(x: float, y: float) -> None:
    drawn = draw_targets(torch.tensor([[x, y]]), (WIDTH, HEIGHT), 2.0)
    assert drawn.shape == (1, HEIGHT, WIDTH) and drawn.dtype == torch.float32
    np.testing.assert_allclose(drawn[0].numpy(), gaussian(x, y), atol=1e-6)


def test_no_ball_is_an_empty_heatmap() -> None:
    drawn = draw_targets(torch.tensor([[math.nan, math.nan], [3.0, 4.0]]), (WIDTH, HEIGHT), 2.0)
    assert not drawn[0].any() and drawn[1, 4, 3] == 1


@pytest.mark.parametrize(("x", "y"), PLACES)
@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.5])
def test_a_ball_is_found_to_a_part_of_a_pixel(x: float, y: float, sigma: float) -> None:
    """At the border as well, where one neighbour of the highest pixel is missing."""
    found = highest_places(0.8 * gaussian(x, y, sigma=sigma)[None])[0]
    assert found[:2] == pytest.approx((x, y), abs=0.02)
    assert found[2] == pytest.approx(0.8 * gaussian(x, y, sigma=sigma).max())


def test_each_heatmap_of_a_batch_has_its_own_peak() -> None:
    found = find_peaks(torch.from_numpy(np.stack([gaussian(x, y) for x, y in PLACES])))
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float32
    np.testing.assert_allclose(found[:, :2].numpy(), np.array(PLACES), atol=0.02)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_read(kind: torch.dtype) -> None:
    found = find_peaks(torch.from_numpy(gaussian(10.0, 8.0))[None].to(kind).requires_grad_())
    assert found[0].tolist() == pytest.approx([10, 8, 1], abs=0.1)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_flat_heatmap_has_a_peak_as_any(value: float) -> None:
    found = highest_places(np.full((1, HEIGHT, WIDTH), value, np.float32))[0]
    assert np.isfinite(found).all() and found[2] == pytest.approx(value)
    assert -0.5 <= found[0] < WIDTH and -0.5 <= found[1] < HEIGHT


def test_a_top_of_two_equal_pixels_lies_between_them() -> None:
    scores = np.full((1, 5, 6), 0.1, np.float32)
    scores[0, 2, 2:4] = 0.9
    assert highest_places(scores)[0].tolist() == pytest.approx([2.5, 2, 0.9])


def test_a_heatmap_of_two_pixels() -> None:
    assert highest_places(np.array([[[0.1, 0.7]]], np.float32))[0].tolist() == pytest.approx([1, 0, 0.7])


def test_the_threshold_decides_about_a_ball() -> None:
    highest = np.array([2.0, 1.0, 0.5], np.float32)
    sizes = {"heatmap_size": (32, 24), "frame_size": (64, 48)}
    # The middle of the third pixel of the heatmap lies between the fifth and the sixth of the frame.
    assert place_peak(highest, **sizes, threshold=0.5) == Peak(4.5, 2.5, 0.5)
    assert place_peak(highest, **sizes, threshold=0.51) is None


@pytest.mark.parametrize(("old", "new"), [((1280, 720), (256, 144)), ((1280, 720), (504, 280)), ((7, 5), (640, 360))])
def test_a_point_comes_back(old: tuple[int, int], new: tuple[int, int]) -> None:
    there = scale_point(3.25, 4.0, old, new)
    assert there != (3.25, 4.0)
    assert scale_point(*there, new, old) == pytest.approx((3.25, 4.0))


@pytest.mark.parametrize(("old", "new"), [((32, 24), (64, 48)), ((32, 24), (48, 60)), ((64, 48), (32, 24))])
def test_points_are_scaled_as_torch_scales_pictures(old: tuple[int, int], new: tuple[int, int]) -> None:
    """A picture whose values are its own coordinates keeps them where it is interpolated (align_corners=False)."""
    across = torch.arange(old[0], dtype=torch.float32).expand(old[1], -1)
    down = torch.arange(old[1], dtype=torch.float32)[:, None].expand(-1, old[0])
    scaled = functional.interpolate(torch.stack([across, down])[None], size=new[::-1], mode="bilinear")[0]
    for column, row in ((new[0] // 2, new[1] // 3), (new[0] // 4, new[1] // 2)):
        x, y = scaled[:, row, column].tolist()
        assert scale_point(x, y, old, new) == pytest.approx((column, row), abs=1e-4)
