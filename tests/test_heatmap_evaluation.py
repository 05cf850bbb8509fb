"""Figures of an evaluation, held against tables counted by hand, and the pictures drawn of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from evaluate_heatmap import write_overlays
from PIL import Image
from tiny_heatmap import write_model

from lib.clips import EASY, HARD, NO_BALL, OCCLUDED, Clip, ClipError, Frame, read_clips, write_labels
from lib.console import progress
from lib.frames import Moment
from lib.heatmap_evaluation import (
    Evaluated,
    Outcome,
    Rules,
    choose_games,
    choose_overlays,
    describe_outcome,
    evaluate,
    report,
)
from lib.heatmap_peaks import Peak
from lib.heatmap_predictor import Predictor
from lib.heatmap_settings import InputPlan
from lib.manifest import read_folder_manifest
from lib.overlays import HEAT, PREDICTED, TRUE, draw_overlay

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/evaluate_heatmap.py"
SIZE, HEATMAP = (640, 360), (64, 36)  # half of 1280x720, so that a pixel counts as two
RULES = Rules(invisible="empty", occluded="target", threshold=0.5, distance=5.0)
# What a frame shows, and what the model says: place in pixels of the frame and score.
CASES = [
    (EASY, (100.0, 100.0), (100.0, 100.0, 0.9)),  # found, error 0
    (EASY, (200.0, 100.0), (201.2, 101.6, 0.8)),  # found: 2 pixels, 4 of 1280x720
    (HARD, (300.0, 100.0), (301.0, 100.0, 0.7)),  # found, error 2
    (HARD, (300.0, 200.0), (302.6, 200.0, 0.9)),  # far: 5.2
    (EASY, (300.0, 300.0), (300.0, 300.0, 0.4)),  # missed, though the peak is there
    (OCCLUDED, (400.0, 200.0), (400.0, 200.5, 0.6)),  # found, error 1
    (OCCLUDED, (500.0, 200.0), (100.0, 200.0, 0.6)),  # far: 800
    (NO_BALL, None, (50.0, 50.0, 0.8)),  # false
    (NO_BALL, None, (50.0, 50.0, 0.2)),
    (NO_BALL, None, (50.0, 50.0, 0.3)),
]
# By hand, for each use of occluded frames: TP, FP, FN, frames with a ball, without, left out.
COUNTS = {"target": (4, 3, 3, 7, 3, 0), "empty": (3, 4, 2, 5, 5, 0), "mask": (3, 2, 2, 5, 3, 2)}
ERRORS = {"target": [0, 4, 2, 1], "empty": [0, 4, 2], "mask": [0, 4, 2]}


def heatmap_of(x: float, y: float, score: float) -> np.ndarray:
    """A Gaussian whose top, after scaling to the frame, is at a place; its highest pixel has the score."""
    across, down = ((at + 0.5) / 10 - 0.5 for at in (x, y))
    columns, rows = np.arange(HEATMAP[0]), np.arange(HEATMAP[1])
    drawn = np.exp(-((columns[None] - across) ** 2 + (rows[:, None] - down) ** 2) / 8)
    return (score * drawn / drawn.max()).astype(np.float32)


def scripted(heatmaps: Sequence[np.ndarray]) -> Predictor:
    """A model that answers by the shade of a frame, in which its number was painted."""

    def compute(pixels: np.ndarray) -> np.ndarray:
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == (3, 36, 64)
        return np.stack([heatmaps[round(float(each.mean()) / 10) - 1] for each in pixels])

    return Predictor(InputPlan(64, 36, mean=(0.0,) * 3, std=(1.0,) * 3), HEATMAP, 1, compute)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for game in ("game1", "game2"):
        clip = folder / game / "Clip1"
        clip.mkdir(parents=True)
        frames = []
        for number, (visibility, ball, _) in enumerate(CASES):
            frames.append(Frame(clip / f"{number:04d}.jpg", visibility, ball, None))
            Image.new("RGB", SIZE, (10 * (number + 1),) * 3).save(frames[-1].path, quality=95)
        write_labels(clip, frames)
    return folder


def evaluated(data: Path, rules: Rules = RULES, *, batch_size: int = 3) -> Evaluated:
    predictor = scripted([heatmap_of(*said) for _, _, said in CASES])
    with progress("evaluating", total=20) as bar:
        return evaluate(
            predictor, read_clips(data), games=["game2"], rules=rules, batch_size=batch_size, progress=bar
        )  # fmt: skip


@pytest.mark.parametrize("occluded", COUNTS)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_figures_are_those_counted_by_hand(data: Path, occluded: str, batch_size: int) -> None:
    found = report(evaluated(data, Rules("empty", occluded, 0.5, 5.0), batch_size=batch_size))
    right, false, lost, positive, empty, left_out = COUNTS[occluded]
    assert (found["true_positives"], found["false_positives"], found["false_negatives"]) == (right, false, lost)
    assert found["precision"] == pytest.approx(right / (right + false), abs=1e-6)
    assert found["recall"] == pytest.approx(right / (right + lost), abs=1e-6)
    precision, recall = right / (right + false), right / (right + lost)
    assert found["f1"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-6)
    assert found["mean_error"] == pytest.approx(sum(ERRORS[occluded]) / len(ERRORS[occluded]), abs=0.02)
    assert found["median_error"] == pytest.approx(float(np.median(ERRORS[occluded])), abs=0.02)
    frames = found["frames"]
    assert (frames["positive"], frames["empty"], frames["left_out"]) == (positive, empty, left_out)


def test_figures_by_visibility(data: Path) -> None:
    found = report(evaluated(data))["by_visibility"]
    assert {
        kind: (part["frames"], part["true_positives"], part["false_positives"], part["false_negatives"])
        for kind, part in found.items()
    } == {"no ball": (3, 0, 1, 0), "easy": (3, 2, 0, 1), "hard": (2, 1, 1, 1), "occluded": (2, 1, 1, 1)}
    assert found["no ball"]["recall"] is None and found["easy"]["recall"] == pytest.approx(2 / 3, abs=1e-6)


def test_false_positives_without_a_ball(data: Path) -> None:
    assert report(evaluated(data))["without_ball"] == {"frames": 3, "false_positives": 1, "share": 0.333333}
    masked = report(evaluated(data, Rules("mask", "mask", 0.5, 5.0)))
    assert masked["without_ball"] == {"frames": 0, "false_positives": 0, "share": None}
    assert masked["frames"]["left_out_by_visibility"] == {"no ball": 3, "occluded": 2}


@pytest.mark.parametrize(("threshold", "predictions"), [(0.19, 10), (0.35, 8), (0.75, 4), (0.95, 0)])
def test_the_threshold_decides_what_is_a_prediction(data: Path, threshold: float, predictions: int) -> None:
    found = report(evaluated(data, Rules("empty", "target", threshold, 5.0)))
    assert found["true_positives"] + found["false_positives"] == predictions
    assert (found["precision"] is None) == (not predictions)


def test_the_distance_decides_what_is_found(data: Path) -> None:
    assert report(evaluated(data, Rules("empty", "target", 0.5, 3.9)))["true_positives"] == 3
    assert report(evaluated(data, Rules("empty", "target", 0.5, 5.3)))["true_positives"] == 5


def test_speed_is_measured(data: Path) -> None:
    speed = report(evaluated(data))["speed"]
    assert 0 < speed["with_reading"] < speed["model"]


def test_games_have_to_be_named_and_there(data: Path) -> None:
    clips = read_clips(data)
    assert choose_games(clips, ["game2", "game1"]) == ["game1", "game2"]
    with pytest.raises(ClipError, match="clips.eval_games names no game to evaluate on; the data has game1, game2"):
        choose_games(clips, [])
    with pytest.raises(ClipError, match="clips.eval_games: there is no game7; the data has game1, game2"):
        choose_games(clips, ["game1", "game7"])


def test_a_game_without_a_frame_that_counts(tmp_path: Path) -> None:
    clips = [Clip("game1", "Clip1", (Frame(tmp_path / "0.jpg", NO_BALL, None, None),))]
    with pytest.raises(ClipError, match="game1 has no frame that counts"), progress("evaluating", total=1) as bar:
        evaluate(
            scripted([]), clips, games=["game1"], rules=Rules("mask", "mask", 0.5, 5.0), batch_size=1, progress=bar
        )  # fmt: skip


def test_a_ball_outside_of_its_frame(data: Path, tmp_path: Path) -> None:
    clip = tmp_path / "game2/Clip1"
    clip.mkdir(parents=True)
    Image.new("RGB", SIZE, (10, 10, 10)).save(clip / "0000.jpg")
    write_labels(clip, [Frame(clip / "0000.jpg", EASY, (700.0, 10.0), None)])
    with pytest.raises(ClipError, match=r"0000.jpg: the ball is at \(700.0, 10.0\), outside of 640×360 pixels"):
        evaluated(tmp_path)


def outcome(number: int, kind: str, *, error: float | None = None, score: float = 0.6, seen: int = EASY) -> Outcome:
    moment = Moment((Frame(Path(f"game1/Clip1/{number:04d}.jpg"), seen, None, None),))
    return Outcome(moment, None, None, score, error, kind)


def numbers(chosen: Sequence[Outcome]) -> list[tuple[str, int]]:
    return [(each.kind, int(each.moment.frame.path.stem)) for each in chosen]


def test_overlays_are_of_every_kind_of_failure() -> None:
    outcomes = [outcome(number, "found", error=number / 100) for number in range(300)]
    for number, each in {
        10: outcome(10, "far", error=50.0),
        50: outcome(50, "far", error=300.0),
        90: outcome(90, "missed", score=0.1, seen=HARD),
        130: outcome(130, "missed", score=0.3),
        170: outcome(170, "false", score=0.7, seen=NO_BALL),
        210: outcome(210, "false", score=0.99, seen=NO_BALL),
        250: outcome(250, "empty", score=0.2, seen=NO_BALL),
    }.items():
        outcomes[number] = each
    chosen = numbers(choose_overlays(outcomes, 8))
    assert chosen[:6] == [
        ("far", 50), ("far", 10), ("missed", 130), ("missed", 90), ("false", 210), ("false", 170),
    ]  # fmt: skip
    # The frame of the median error, with 3 of the 7 others before it, and that of the largest.
    assert [kind for kind, _ in chosen[6:]] == ["found", "found"] and chosen[7][1] == 299
    assert 145 <= chosen[6][1] <= 155
    assert len(choose_overlays(outcomes, 12)) == 12
    assert numbers(choose_overlays(outcomes, 1)) == [("far", 50)]


def test_overlays_of_neighbours_come_last() -> None:
    outcomes = [outcome(number, "far", error=100 - number) for number in range(30)]
    assert [number for _, number in numbers(choose_overlays(outcomes, 4))] == [0, 5, 10, 15]
    assert len(choose_overlays(outcomes, 100)) == 30


def test_a_model_without_failures_shows_what_it_rightly_left() -> None:
    outcomes = [outcome(0, "found", error=1.0), outcome(1, "empty", score=0.1), outcome(2, "empty", score=0.4)]
    assert numbers(choose_overlays(outcomes, 2)) == [("found", 0), ("empty", 2)]


@pytest.mark.parametrize(
    ("kind", "said"),
    [("found", "found, 2.0 pixels off"), ("missed", "missed"), ("false", "a ball where there is none")],
)
def test_an_overlay_says_its_frame_and_error(kind: str, said: str) -> None:
    each = outcome(3, kind, error=2.0 if kind == "found" else None, score=0.61)
    assert describe_outcome(each) == f"game1/Clip1/0003.jpg (easy): {said}, score 0.61"


def test_overlays_are_the_same_bytes_again(data: Path, tmp_path: Path) -> None:
    predictor = scripted([heatmap_of(*said) for _, _, said in CASES])
    for name in ("first", "second"):
        drawn = write_overlays(predictor, evaluated(data), tmp_path / name, count=9, digest="0" * 64)
    assert len(drawn) == 9 and drawn[0] == {
        "file": "01-far-game2-Clip1-0006.png", "frame": "game2/Clip1/0006.jpg", "kind": "far", "error": 800.0,
    }  # fmt: skip
    files = read_folder_manifest(tmp_path / "first", artifact="overlays")["files"]
    assert {*files, "MANIFEST.json"} == {path.name for path in (tmp_path / "first").iterdir()}
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
        assert str(tmp_path).encode() not in path.read_bytes()


def near(colour: tuple[int, ...], picture: np.ndarray, *, within: float = 60) -> np.ndarray:
    """Rows and columns of the pixels of about a colour."""
    return np.argwhere(np.linalg.norm(picture.astype(float) - np.array(colour), axis=2) < within)


@pytest.mark.parametrize("place", [(400.0, 250.0), (0.0, 0.0), (639.0, 359.0), (639.4, -0.4)])
def test_marks_are_where_the_points_are(place: tuple[float, float]) -> None:
    frame = np.full((360, 640, 3), 128, np.uint8)
    picture = draw_overlay(frame, np.zeros((36, 64)), place, None, None)
    assert picture.dtype == np.uint8 and picture.shape[1] == 640 and picture.shape[0] > 360
    ring = near(TRUE, picture[:360])
    close = ring[np.linalg.norm(ring - np.array(place)[::-1], axis=1) < 12]
    assert len(close) > 1  # of a ring whose middle is in a corner, a quarter
    if 20 < place[0] < 600:
        assert close.mean(axis=0)[::-1] == pytest.approx(place, abs=0.3)
    assert not len(near(PREDICTED, picture[:360]))


def test_the_heatmap_is_seen_at_its_place_and_the_frame_elsewhere() -> None:
    frame = np.full((360, 640, 3), 128, np.uint8)
    picture = draw_overlay(frame, heatmap_of(400.0, 250.0, 1.0), None, None, "nothing")[:360]
    warm = np.linalg.norm(picture - np.array(HEAT, float), axis=2)
    assert np.unravel_index(warm.argmin(), warm.shape) == pytest.approx(
        (250, 400), abs=5
    )  # of the heatmap half a pixel
    np.testing.assert_array_equal(picture[:, :300], frame[:, :300])


def test_both_points_far_apart_and_small_frames() -> None:
    frame = np.full((45, 80, 3), 128, np.uint8)
    picture = draw_overlay(frame, np.zeros((9, 16)), (10.0, 10.0), Peak(70.0, 40.0, 0.9), "a" * 500)
    assert picture.shape[1] == 640
    for colour, (x, y) in ((TRUE, (10, 10)), (PREDICTED, (70, 40))):
        found = near(colour, picture[:360])
        assert np.linalg.norm(found - (8 * y + 3.5, 8 * x + 3.5), axis=1).min() < 12


def run(*options: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_script_writes_report_and_overlays(data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "merged", frames=2)
    done = run(
        "--model", model, "--clips", data, "--eval-games", "game2", "--occluded", "mask", "--threshold", 0.001,
        "--output", "eval.json", "--overlays", "overlays", "--overlay-count", 3, "--log", "x.log", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "eval.json").read_text())
    assert said["model"]["digest"] == read_folder_manifest(model, artifact="merged")["digest"]
    assert said["settings"] | {"threshold": 0.001, "distance": 5.0, "occluded": "mask"} == said["settings"]
    assert said["frames"]["left_out"] == 2 and said["games"] == ["game2"]
    assert said["true_positives"] + said["false_positives"] == 8
    assert {each["file"] for each in said["overlays"]} | {"MANIFEST.json"} == set(os.listdir(tmp_path / "overlays"))
    assert str(tmp_path) not in (tmp_path / "eval.json").read_text()


def test_wrong_use_is_told_in_a_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "language").mkdir()
    (tmp_path / "language/config.json").write_text('{"model_type": "llama"}')
    for options, status, said in (
        (["--model", "language", "--eval-games", "game1"], 1, "it is of a model of type llama"),
        (["--model", "language"], 1, "clips.eval_games names no game to evaluate on"),
        (
            ["--model", "language", "--eval-games", "game1", "--threshold", "1.5"],
            2,
            "greater than or equal to the maximum of 1",
        ),
    ):
        done = run(*options, "--clips", data, "--output", "eval.json", cwd=tmp_path)
        assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr
        assert status == 2 or len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "eval.json").exists()
