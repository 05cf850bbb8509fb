"""Write clips of a drawn tennis court with a flying ball, in exactly the layout of TrackNet's data."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from lib.cli import UsageError, positive, run_script, script_parser
from lib.clips import BOUNCING, EASY, FLYING, HARD, HIT, NO_BALL, OCCLUDED, Frame, read_clips, write_labels
from lib.console import progress, say
from lib.outputs import scratch_beside

WIDTH, HEIGHT = 1280, 720  # of the drawing, which is then scaled
GRASS, CLAY = (58, 110, 62), (48, 84, 140)
LINE, NET, BALL = (232, 236, 232), (200, 204, 208), (214, 236, 84)
# Corners of the court as a camera behind it sees them: far left, far right, near right, near left.
COURT = ((440, 190), (840, 190), (1080, 640), (200, 640))
NET_TOP, NET_FOOT = 330, 372
RADIUS = 7.0  # of a ball in the middle of the court
JPEG_QUALITY = 90
BLUR_FROM = 34.0  # pixels a frame from which a ball is a streak, and hard to see
SHUTTER = 0.4  # share of the time between two frames in which light falls


@dataclass(frozen=True)
class Flight:
    """A ball's way over a clip: centres in pixels of the drawing, one a frame, and what happens in it."""

    centres: np.ndarray
    status: list[int]


def make_clips(
    *, output: Path, games: int, clips: int, frames: int, size: tuple[int, int], seed: int, quality: int = JPEG_QUALITY
) -> None:
    """
    Write a data set.

    Args:
        output: folder, which may not hold games yet.
        games, clips, frames: how many games, clips of each and frames of each.
        size: width and height of the frames.
        seed: the same seed gives the same clips, with the same Pillow the same bytes.
        quality: of the JPEG files.

    Raises:
        UsageError: there are games already.
    """
    if any(output.glob("game*")):
        raise UsageError(f"{output} has games already; name another folder, or remove them")
    with scratch_beside(output) as scratch:
        with progress("drawing clips", total=games * clips * frames, unit="frames") as bar:
            for game in range(1, games + 1):
                for clip in range(1, clips + 1):
                    random = np.random.default_rng([seed, game, clip])
                    folder = scratch / f"game{game}" / f"Clip{clip}"
                    folder.mkdir(parents=True)
                    labels = []
                    for number, (picture, frame) in enumerate(_draw_clip(random, frames=frames, size=size)):
                        path = folder / f"{number:04d}.jpg"
                        picture.save(path, quality=quality)
                        labels.append(Frame(path, frame.visibility, frame.ball, frame.status))
                        bar.advance()
                    write_labels(folder, labels)
        # Only now: of a half drawn set no table tells that clips are missing.
        output.mkdir(parents=True, exist_ok=True)
        for folder in sorted(scratch.iterdir()):
            os.replace(folder, output / folder.name)
    found = [frame for clip in read_clips(output) for frame in clip.frames]
    counts = {kind: sum(frame.visibility == kind for frame in found) for kind in (EASY, HARD, OCCLUDED, NO_BALL)}
    say(
        f"{output}: {len(found)} frames, the ball easy to see in {counts[EASY]}, hard in {counts[HARD]}, "
        f"occluded in {counts[OCCLUDED]}, not there in {counts[NO_BALL]}"
    )


def _draw_clip(
    random: np.random.Generator, *, frames: int, size: tuple[int, int]
) -> Iterator[tuple[Image.Image, Frame]]:
    """Each frame as drawn, and its row; the row's path is not meant."""
    background = _draw_court(random)
    players = [_Player(random, far=far) for far in (True, False)]
    flight = _fly(random, frames)  # last, so that the first frames are the same however many follow
    for number in range(frames):
        picture = background.copy()
        centre = flight.centres[number]
        step = centre - flight.centres[max(0, number - 1)]
        inside = 0 <= centre[0] < WIDTH and 0 <= centre[1] < HEIGHT
        if inside:
            _draw_ball(picture, centre, step)
        bodies = [box for player in players for box in player.draw(picture, number)]
        yield picture.resize(size, Image.Resampling.BILINEAR), _label(centre, step, flight.status[number], bodies, size)


def _label(
    centre: np.ndarray, step: np.ndarray, status: int, bodies: list[tuple[float, ...]], size: tuple[int, int]
) -> Frame:
    if not (0 <= centre[0] < WIDTH and 0 <= centre[1] < HEIGHT):
        return Frame(Path(), NO_BALL, ball=None, status=None)
    hidden = any(left <= centre[0] <= right and top <= centre[1] <= bottom for left, top, right, bottom in bodies)
    visibility = OCCLUDED if hidden else HARD if np.hypot(*step) > BLUR_FROM else EASY
    # Of a pixel the table tells the centre, where a drawing tells its corner.
    x, y = (
        max(0.0, round(float(at * new / old - 0.5), 2))
        for at, new, old in zip(centre, size, (WIDTH, HEIGHT), strict=True)
    )
    return Frame(Path(), visibility, ball=(x, y), status=status)


def _fly(random: np.random.Generator, frames: int) -> Flight:
    """Strokes from one end to the other, each an arc with one bounce; now and then high above the picture."""
    centres, status = np.empty((frames, 2)), [FLYING] * frames
    start, far, number = _place(random, far=False), True, 0
    while number < frames:
        end = _place(random, far=far)
        lob = random.random() < 0.25
        length = int(random.integers(40, 60) if lob else random.integers(22, 40))
        height = random.uniform(500, 900) if lob else random.uniform(60, 150)
        bounce = random.uniform(0.7, 0.85)
        for part in range(length):
            if number == frames:
                break
            share = part / length
            # Over the ground: a high arc to the bounce, and a low one after it.
            arc = share / bounce if share < bounce else (share - bounce) / (1 - bounce)
            rise = 4 * arc * (1 - arc) * (height if share < bounce else 0.3 * min(height, 150))
            centres[number] = start + (end - start) * share - (0, rise)
            if part == 0:
                status[number] = HIT
            elif share - 1 / length < bounce <= share:
                status[number] = BOUNCING
            number += 1
        start, far = end, not far
    return Flight(centres, status)


def _place(random: np.random.Generator, *, far: bool) -> np.ndarray:
    """Where a player hits: a little above the ground, at one end of the court."""
    low, high = ((470, 810), (170, 200)) if far else ((320, 960), (560, 610))
    return np.array([random.uniform(*low), random.uniform(*high)])


def _draw_court(random: np.random.Generator) -> Image.Image:
    """The court with its lines and net, in light and colours that differ from clip to clip, with a little noise."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), GRASS)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, WIDTH, 120), fill=(72, 70, 78))
    for x in range(0, WIDTH, 16):  # spectators
        shade = int(random.integers(40, 150))
        draw.ellipse((x, 30 + shade % 40, x + 11, 42 + shade % 40), fill=(shade, shade // 2 + 40, 120 - shade // 3))
    draw.polygon(COURT, fill=CLAY)
    far_left, far_right, near_right, near_left = (np.array(corner, float) for corner in COURT)
    for share in (0.0, 0.125, 0.5, 0.875, 1.0):
        ends = [tuple(a + (b - a) * share) for a, b in ((far_left, far_right), (near_left, near_right))]
        draw.line(ends if share != 0.5 else _between(*ends, 0.2, 0.68), fill=LINE, width=4)
    for share in (0.0, 0.2, 0.68, 1.0):
        draw.line(
            [tuple(a + (b - a) * share) for a, b in ((far_left, near_left), (far_right, near_right))],
            fill=LINE,
            width=4,
        )
    for y in range(NET_TOP, NET_FOOT, 6):
        draw.line((330, y, 950, y), fill=NET, width=1)
    draw.line((330, NET_TOP, 950, NET_TOP), fill=LINE, width=4)
    light = random.uniform(0.75, 1.2) * random.uniform(0.92, 1.08, size=3)
    pixels = np.asarray(picture, dtype=np.float32) * light + random.normal(0, 4, size=(HEIGHT, WIDTH, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _between(first: tuple[float, ...], last: tuple[float, ...], begin: float, end: float) -> list[tuple[float, ...]]:
    a, b = np.array(first), np.array(last)
    return [tuple(a + (b - a) * begin), tuple(a + (b - a) * end)]


def _draw_ball(picture: Image.Image, centre: np.ndarray, step: np.ndarray) -> None:
    """The ball, smaller at the far end, and a fainter streak along its last step where it is fast."""
    radius = RADIUS * (0.55 + 0.9 * centre[1] / HEIGHT)
    fast = np.hypot(*step) > BLUR_FROM
    layer = Image.new("L", picture.size, 0)
    draw = ImageDraw.Draw(layer)
    for share in np.linspace(-0.5, 0.5, 9) if fast else (0.0,):
        x, y = centre + step * share * SHUTTER
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=170 if fast else 255)
    picture.paste(BALL, mask=layer.filter(ImageFilter.GaussianBlur(1.2)))


class _Player:
    """A body that runs along an end of the court and may hide the ball."""

    def __init__(self, random: np.random.Generator, *, far: bool) -> None:
        self._middle, self._reach = random.uniform(560, 720), random.uniform(60, 180)
        self._pace, self._phase = random.uniform(0.05, 0.12), random.uniform(0, 6)
        self._foot, self._height = (205.0, 62.0) if far else (650.0, 150.0)
        # Nothing like a ball's.
        self._colour = tuple(int(value) for value in random.integers((110, 30, 60), (230, 100, 230)))

    def draw(self, picture: Image.Image, number: int) -> list[tuple[float, float, float, float]]:
        """Draw it, and tell the boxes of body and head: left, top, right, bottom."""
        x = self._middle + self._reach * np.sin(self._phase + self._pace * number)
        half, head = 0.16 * self._height, 0.1 * self._height
        top = self._foot - self._height
        draw = ImageDraw.Draw(picture)
        draw.rectangle((x - half, top + 2 * head, x + half, self._foot), fill=self._colour)
        draw.ellipse((x - head, top, x + head, top + 2 * head), fill=(196, 156, 124))
        return [(x - half, top + 2 * head, x + half, self._foot), (x - head, top, x + head, top + 2 * head)]


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= 16):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT of at least 16 each, found {text!r}")
    return int(width), int(height)


def _work(arguments: argparse.Namespace) -> None:
    make_clips(
        output=arguments.output,
        games=arguments.games,
        clips=arguments.clips,
        frames=arguments.frames,
        size=arguments.size,
        seed=arguments.seed,
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where game1, game2, … are written")
    parser.add_argument("--games", type=positive, default=4, metavar="N", help="number of games")
    parser.add_argument("--clips", type=positive, default=2, metavar="N", help="clips of each game")
    parser.add_argument("--frames", type=positive, default=60, metavar="N", help="frames of each clip")
    parser.add_argument("--size", type=_size, default=(WIDTH, HEIGHT), metavar="WxH", help="of the frames")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same clips")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
