"""Pictures of what a heatmap model says: the frame, the heatmap over it, the true and the predicted point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.heatmap_peaks import Peak

Point = tuple[float, float]
Draw = Callable[[ImageDraw.ImageDraw, Point, float, float, tuple[int, ...]], None]
Mark = tuple[Point, Draw, tuple[int, int, int]]
# Of the marks Okabe and Ito's, which the colour-blind tell apart; they differ in shape as well, and have dark borders.
TRUE, PREDICTED, HEAT = (86, 180, 233), (230, 159, 0), (213, 40, 160)
BORDER, PAPER, INK = (0, 0, 0), (250, 250, 250), (30, 30, 30)
MOST_HEAT = 0.75  # that the frame is seen through the highest heatmap
LEAST_WIDTH = 640  # smaller frames are enlarged, that text fits below them
ZOOM, LENS = 4, 0.028  # how much the lens enlarges, and half of what it shows, as a share of the width
SMOOTH = 4  # marks are drawn so much larger, and scaled down
MARK = 0.009  # half a mark's size, as a share of the width


def draw_overlay(
    frame: np.ndarray, heatmap: np.ndarray, true: Point | None, predicted: Peak | None, caption: str | None
) -> np.ndarray:
    """
    Draw one frame, with a lens on its ball and a legend below.

    Args:
        frame: (height, width, 3), uint8.
        heatmap: (rows, columns), from 0 to 1.
        true, predicted: in pixels of the frame, 0 being the middle of the first; None where there is no ball.
        caption: a line below the legend.

    Returns:
        (height, width, 3), uint8: of the frame, or enlarged, and higher by the text.
    """
    scale = max(1, math.ceil(LEAST_WIDTH / frame.shape[1]))
    picture = Image.fromarray(frame)
    picture = picture.resize((frame.shape[1] * scale, frame.shape[0] * scale), Image.Resampling.BICUBIC)
    picture = _heat(picture, heatmap)
    marks: list[Mark] = [(_scaled(true, scale), _ring, TRUE)] if true else []
    marks += [(_scaled((predicted.x, predicted.y), scale), _cross, PREDICTED)] if predicted else []
    plain = picture.copy()
    half = MARK * picture.width
    for point, draw, colour in marks:
        _stamp(picture, point, draw, colour, half)
    if marks:
        _put_lens(picture, plain, marks)
    below = _legend(picture.width, caption)
    whole = Image.new("RGB", (picture.width, picture.height + below.height))
    whole.paste(picture)
    whole.paste(below, (0, picture.height))
    return np.array(whole)


def _scaled(point: Point, scale: float) -> Point:
    return (point[0] + 0.5) * scale - 0.5, (point[1] + 0.5) * scale - 0.5


def _heat(picture: Image.Image, heatmap: np.ndarray) -> Image.Image:
    """The more of one colour, the higher the heatmap."""
    heat = Image.fromarray(np.clip(heatmap, 0, 1).astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    share = MOST_HEAT * np.asarray(heat)[:, :, None]
    return Image.fromarray(np.rint(np.asarray(picture) * (1 - share) + np.array(HEAT) * share).astype(np.uint8))


def _put_lens(picture: Image.Image, plain: Image.Image, marks: Sequence[Mark]) -> None:
    """The surroundings of the true point, or of the only one, enlarged in the corner that is farthest from them."""
    half = max(4, round(LENS * picture.width))
    x, y = (min(max(round(at), half), side - half) for at, side in zip(marks[0][0], picture.size, strict=True))
    box = (x - half, y - half, x + half, y + half)
    side = min(2 * half * ZOOM, min(picture.size) // 2)
    lens = plain.crop(box).resize((side, side), Image.Resampling.BICUBIC)
    zoom = side / (2 * half)
    for point, draw, colour in marks:
        inside = _scaled((point[0] - box[0], point[1] - box[1]), zoom)
        _stamp(lens, inside, draw, colour, 2 * MARK * picture.width)
    gap, width = picture.width // 100, max(1, picture.width // 640)
    corners = [(left, top) for left in (gap, picture.width - side - gap) for top in (gap, picture.height - side - gap)]
    shown = [(x, y), *(point for point, _, _ in marks)]
    place = max(corners, key=lambda at: min(math.dist((at[0] + side / 2, at[1] + side / 2), each) for each in shown))
    draw = ImageDraw.Draw(picture)
    draw.rectangle(box, outline=PAPER, width=width)
    picture.paste(lens, place)
    left, top = (at - width for at in place)
    draw.rectangle((left, top, left + side + 2 * width - 1, top + side + 2 * width - 1), outline=PAPER, width=width)


def _stamp(picture: Image.Image, point: Point, draw: Draw, colour: tuple[int, int, int], half: float) -> None:
    """Paste a mark with its middle at a part of a pixel; what lies outside of the picture is cut."""
    reach = math.ceil(half * 1.5) + 2
    left, top = math.floor(point[0]) - reach, math.floor(point[1]) - reach
    side = 2 * reach + 1
    layer = Image.new("RGBA", (side * SMOOTH, side * SMOOTH), (*colour, 0))
    middle = tuple((at - corner + 0.5) * SMOOTH for at, corner in zip(point, (left, top), strict=True))
    thin = max(1.0, half / 6) * SMOOTH
    for shade, width in ((BORDER, 2.4 * thin), (colour, thin)):
        draw(ImageDraw.Draw(layer), middle, half * SMOOTH, width, (*shade, 255))
    layer = layer.resize((side, side), Image.Resampling.BOX)
    picture.paste(layer, (left, top), layer)


def _ring(draw: ImageDraw.ImageDraw, middle: Point, half: float, width: float, colour: tuple[int, ...]) -> None:
    out = half + width / 2
    box = (middle[0] - out, middle[1] - out, middle[0] + out, middle[1] + out)
    draw.ellipse(box, outline=colour, width=round(width))


def _cross(draw: ImageDraw.ImageDraw, middle: Point, half: float, width: float, colour: tuple[int, ...]) -> None:
    """Diagonal arms that leave the middle free, where the ball is seen."""
    for across in (-1, 1):
        for down in (-1, 1):
            ends = [(middle[0] + across * part * half, middle[1] + down * part * half) for part in (0.3, 1.1)]
            draw.line(ends, fill=colour, width=round(width))


def _legend(width: int, caption: str | None) -> Image.Image:
    """What the marks and the colour mean, and the caption, which is cut where it is too long."""
    size = max(13, width // 64)
    font, row = _font(size), round(1.7 * size)
    legend = Image.new("RGB", (width, row * (2 if caption else 1) + size // 2), PAPER)
    draw, middle, x = ImageDraw.Draw(legend), row / 2 + size / 4, float(size)
    for text, mark, colour in (("true", _ring, TRUE), ("predicted", _cross, PREDICTED)):
        _stamp(legend, (x, middle), mark, colour, 0.45 * size)
        x += size
        draw.text((x, middle), text, font=font, fill=INK, anchor="lm")
        x += draw.textlength(text, font=font) + 1.5 * size
    bar = np.linspace(0, MOST_HEAT, 5 * size)[None, :, None]
    colours = np.rint(128 * (1 - bar) + np.array(HEAT) * bar).astype(np.uint8).repeat(round(0.7 * size), axis=0)
    for text in ("heatmap 0", "1"):
        draw.text((x, middle), text, font=font, fill=INK, anchor="lm")
        x += draw.textlength(text, font=font) + 0.4 * size
        if text != "1":
            legend.paste(Image.fromarray(colours), (round(x), round(middle - 0.35 * size)))
            x += colours.shape[1] + 0.4 * size
    if caption:
        draw.text((size * 0.6, middle + row), _cut(caption, width - size, font), font=font, fill=INK, anchor="lm")
    return legend


def _cut(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """A line that fits, with dots for what is left out of its middle: file and error stand at the ends."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    keep = len(text) - 1
    while keep > 2 and font.getlength(f"{text[: keep // 2]}…{text[-(keep // 2) :]}") > width:
        keep -= 1
    return f"{text[: keep // 2]}…{text[-(keep // 2) :]}"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # Pillow's own, the same on every machine
