"""How well a heatmap model finds balls: counts, errors, speed, and the frames that teach most about it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from lib.clips import OCCLUDED, VISIBILITIES, Clip, ClipError
from lib.frames import EMPTY, Moment, check_ball, list_moments
from lib.heatmap_peaks import Peak, highest_places, place_peak
from lib.heatmap_predictor import Prediction, Predictor, Stopwatch, predict

# Distances are in pixels of frames of this size, that of TrackNet's own.
WIDTH, HEIGHT = 1280, 720
# What became of a frame.
FOUND, FAR, MISSED, FALSE, EMPTY_SEEN = "found", "far", "missed", "false", "empty"
NEAR = 4  # frames of a clip that look alike
DEFINITIONS = {
    "prediction": "the sub-pixel peak of the heatmap, where its highest pixel is not below the threshold",
    "true positive": "a prediction within the distance of the ball",
    "false positive": "a prediction on a frame without a ball, or farther from the ball than the distance",
    "false negative": "a ball without a prediction within the distance; a far prediction counts as false positive too",
    "error": f"of true positives, in pixels of the frame scaled to {WIDTH}x{HEIGHT}, as is the distance",
    "without a ball": "visibility 0, and occluded balls where occluded is empty",
    "speed": "frames a second; with_reading adds decoding and scaling in one thread; the first batch counts once warm",
}


@dataclass(frozen=True)
class Outcome:
    """
    What became of a moment.

    Attributes:
        ball: the true place in pixels of the frame; None where there is none, or none that counts.
        predicted: the place that the model says.
        score: of the highest pixel, whether or not it is a prediction.
        error: distance of the two in pixels of a frame of WIDTH and HEIGHT; None unless there are both.
        kind: FOUND, FAR, MISSED, FALSE or EMPTY_SEEN.
    """

    moment: Moment
    ball: tuple[float, float] | None
    predicted: Peak | None
    score: float
    error: float | None
    kind: str


@dataclass(frozen=True)
class Rules:
    """What counts: see lib.heatmap_settings.ClipUse and Evaluation."""

    invisible: str
    occluded: str
    threshold: float
    distance: float


@dataclass(frozen=True)
class Evaluated:
    """The outcomes of the frames that count, in their order, how many do not, and what it took."""

    outcomes: list[Outcome]
    left_out: dict[str, int]
    stopwatch: Stopwatch


def choose_games(clips: Sequence[Clip], eval_games: Sequence[str]) -> list[str]:
    """
    The games to evaluate on.

    Raises:
        ClipError: none is named, or one that is not there.
    """
    games = list(dict.fromkeys(clip.game for clip in clips))
    if not eval_games:
        raise ClipError(f"clips.eval_games names no game to evaluate on; the data has {', '.join(games)}")
    if unknown := [name for name in eval_games if name not in games]:
        raise ClipError(f"clips.eval_games: there is no {', '.join(unknown)}; the data has {', '.join(games)}")
    return [name for name in games if name in eval_games]


def evaluate(
    predictor: Predictor, clips: Sequence[Clip], *, games: Sequence[str], rules: Rules, batch_size: int, progress: Any
) -> Evaluated:
    """
    Let a model look at all frames of some games.

    Args:
        progress: is advanced by each frame.

    Raises:
        ClipError: no frame counts, or one cannot be read.
    """
    moments = list_moments(
        clips, games=games, frames=predictor.frames, invisible=rules.invisible, occluded=rules.occluded
    )
    if not moments:
        raise ClipError(
            f"clips.eval_games: {', '.join(games)} has no frame that counts (invisible is {rules.invisible}, "
            f"occluded is {rules.occluded})"
        )
    left_out: Counter[int] = Counter(
        frame.visibility for clip in clips if clip.game in games for frame in clip.frames
    ) - Counter(moment.frame.visibility for moment in moments)
    stopwatch, outcomes = Stopwatch(), []
    for prediction in predict(predictor, moments, batch_size=batch_size, stopwatch=stopwatch):
        outcomes.append(judge(prediction, rules))
        progress.advance()
    return Evaluated(outcomes, {VISIBILITIES[kind]: count for kind, count in sorted(left_out.items())}, stopwatch)


def judge(prediction: Prediction, rules: Rules) -> Outcome:
    """
    Hold a prediction against the frame's row.

    Raises:
        ClipError: the row's ball lies outside of the frame.
    """
    frame, size = prediction.moment.frame, prediction.size
    check_ball(frame, size)
    rows, columns = prediction.heatmap.shape
    highest = highest_places(prediction.heatmap[None])[0]
    predicted = place_peak(highest, heatmap_size=(columns, rows), frame_size=size, threshold=rules.threshold)
    ball = None if frame.visibility == OCCLUDED and rules.occluded == EMPTY else frame.ball
    error = None
    if ball and predicted:
        error = math.hypot((predicted.x - ball[0]) * WIDTH / size[0], (predicted.y - ball[1]) * HEIGHT / size[1])
    if ball is None:
        kind = FALSE if predicted else EMPTY_SEEN
    elif error is None:
        kind = MISSED
    else:
        kind = FOUND if error <= rules.distance else FAR
    return Outcome(prediction.moment, ball, predicted, float(highest[2]), error, kind)


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """
    Counts, precision, recall, F1 and errors.

    A share of nothing is None: precision without predictions, recall without balls, F1 without either.
    """
    counts = Counter(outcome.kind for outcome in outcomes)
    found, far, missed, false = (counts[kind] for kind in (FOUND, FAR, MISSED, FALSE))
    errors = [outcome.error for outcome in outcomes if outcome.kind == FOUND and outcome.error is not None]
    return {
        "true_positives": found,
        "false_positives": far + false,
        "false_negatives": far + missed,
        "far": far,
        "missed": missed,
        "precision": _share(found, found + far + false),
        "recall": _share(found, found + far + missed),
        "f1": _share(2 * found, 2 * found + 2 * far + missed + false),
        "mean_error": round(fmean(errors), 4) if errors else None,
        "median_error": round(median(errors), 4) if errors else None,
    }


def report(evaluated: Evaluated) -> dict[str, Any]:
    """All figures of an evaluation; what is measured of the machine stands in "speed" alone."""
    outcomes, watch = evaluated.outcomes, evaluated.stopwatch
    empty = [outcome for outcome in outcomes if outcome.ball is None]
    false = sum(outcome.kind == FALSE for outcome in empty)
    by_visibility = {
        name: [outcome for outcome in outcomes if outcome.moment.frame.visibility == kind]
        for kind, name in VISIBILITIES.items()
    }
    return {
        "frames": {
            "positive": len(outcomes) - len(empty),
            "empty": len(empty),
            "left_out": sum(evaluated.left_out.values()),
            "left_out_by_visibility": evaluated.left_out,
        },
        **summarize(outcomes),
        "without_ball": {"frames": len(empty), "false_positives": false, "share": _share(false, len(empty))},
        "by_visibility": {
            name: {"frames": len(those), **summarize(those)} for name, those in by_visibility.items() if those
        },
        "speed": {
            "model": _rate(watch.frames, watch.computing),
            "with_reading": _rate(watch.frames, watch.computing + watch.reading),
        },
        "definitions": DEFINITIONS,
    }


def choose_overlays(outcomes: Sequence[Outcome], count: int) -> list[Outcome]:
    """
    Frames that teach most: the worst errors, balls that were missed, balls where there are none, and middling finds.

    Each kind gets a quarter; what one lacks goes to the others. Of missed balls those come first that are easy to see,
    of false ones those that the model is surest of. Neighbours in a clip, which look alike, come last.
    """
    number = {id(each): at for at, each in enumerate(outcomes)}
    of_kind: dict[str, list[Outcome]] = {kind: [] for kind in (FAR, MISSED, FALSE, FOUND, EMPTY_SEEN)}
    for each in outcomes:
        of_kind[each.kind].append(each)
    far, missed, false, found, empty = of_kind.values()
    far.sort(key=lambda each: -(each.error or 0))
    missed.sort(key=lambda each: (each.moment.frame.visibility, each.score))
    false.sort(key=lambda each: -each.score)
    found.sort(key=lambda each: each.error or 0)
    empty.sort(key=lambda each: -each.score)
    half = len(found) // 2
    # The median, the largest error that still counts as found, and outwards from the median.
    typical = [*found[half : half + 1], *found[half + 1 :][-1:], *found[:half][::-1], *found[half + 1 : -1]]
    queues = [_spread(queue, number) for queue in (far, missed, false, typical)]
    chosen: list[Outcome] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    chosen += _spread(empty, number)[: count - len(chosen)]
    order = {id(each): at for at, each in enumerate([*far, *missed, *false, *found, *empty])}
    return sorted(chosen, key=lambda each: order[id(each)])


def _spread(queue: Sequence[Outcome], number: dict[int, int]) -> list[Outcome]:
    """The same outcomes, those last that are within NEAR of an earlier one's frame."""
    first, later, near = [], [], set()
    for each in queue:
        at, clip = number[id(each)], each.moment.frame.path.parent
        if (clip, at) in near:
            later.append(each)
        else:
            first.append(each)
            near |= {(clip, at + step) for step in range(-NEAR, NEAR + 1)}
    return first + later


def describe_outcome(outcome: Outcome) -> str:
    """A line for below an overlay: the frame and what became of it."""
    path = outcome.moment.frame.path
    seen = VISIBILITIES[outcome.moment.frame.visibility]
    said = {
        FOUND: f"found, {outcome.error or 0:.1f} pixels off",
        FAR: f"far, {outcome.error or 0:.1f} pixels off",
        MISSED: "missed",
        FALSE: "a ball where there is none",
        EMPTY_SEEN: "rightly nothing",
    }[outcome.kind]
    return f"{'/'.join(path.parts[-3:])} ({seen}): {said}, score {outcome.score:.2f}"


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _rate(frames: int, seconds: float) -> float | None:
    return round(frames / seconds, 2) if seconds else None
