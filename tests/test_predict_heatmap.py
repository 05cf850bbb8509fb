"""Tables of balls: by torch and by onnxruntime alike, readable as data, and mistakes told in a line."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_onnx import export_model
from onnx import TensorProto, helper
from PIL import Image
from predict_heatmap import list_frames, predict_heatmap
from tiny_heatmap import write_model

from lib.clips import EASY, NO_BALL, ClipError, read_clips
from lib.heatmap_onnx import METADATA
from lib.heatmap_predictor import load_predictor

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SIZE = (320, 180)
# What the frames of `bright` show: the middle of a bright square of 20 pixels, or nothing.
BALLS = [(100.0, 60.0), None, (240.5, 120.25), (33.3, 140.0)]


def run(*options: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / "predict_heatmap.py", *map(str, options)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of black frames with a soft white spot."""
    folder = tmp_path_factory.mktemp("bright") / "game1" / "Clip1"
    folder.mkdir(parents=True)
    columns, rows = np.arange(SIZE[0]), np.arange(SIZE[1])
    for number, ball in enumerate(BALLS):
        shade = np.zeros((SIZE[1], SIZE[0]))
        if ball:
            shade = 255 * np.exp(-((columns[None] - ball[0]) ** 2 + (rows[:, None] - ball[1]) ** 2) / (2 * 8.0**2))
        picture = Image.fromarray(np.repeat(np.rint(shade).astype(np.uint8)[:, :, None], 3, axis=2))
        picture.save(folder / f"{number:04d}.{'png' if number % 2 else 'jpg'}", quality=95)
    (folder / "notes.txt").write_text("no frame")
    return folder


@pytest.fixture(scope="module")
def spotter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX model written by hand that takes the last frame's red for the heatmap: it finds bright spots."""
    width, height = 80, 45
    nodes = [
        helper.make_node("Gather", ["frames", "red"], ["channel"], axis=1),
        helper.make_node("Mul", ["channel", "std"], ["scaled"]),
        helper.make_node("Add", ["scaled", "mean"], ["heatmap"]),
    ]
    constants = [
        helper.make_tensor("red", TensorProto.INT64, [], [3]),
        helper.make_tensor("std", TensorProto.FLOAT, [], [0.25]),
        helper.make_tensor("mean", TensorProto.FLOAT, [], [0.5]),
    ]
    graph = helper.make_graph(
        nodes,
        "spotter",
        [helper.make_tensor_value_info("frames", TensorProto.FLOAT, ["batch", 6, height, width])],
        [helper.make_tensor_value_info("heatmap", TensorProto.FLOAT, ["batch", height, width])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    said = {"width": "80", "height": "45", "mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]"}
    helper.set_model_props(model, {**said, "heatmap_size": "[80, 45]", "frames": "2"})
    assert {each.key for each in model.metadata_props} == set(METADATA)
    path = tmp_path_factory.mktemp("spotter") / "spotter.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model of two frames, with its ONNX file beside it."""
    folder = write_model(tmp_path_factory.mktemp("models") / "merged", frames=2)
    export_model(model=folder, output=folder.with_suffix(".onnx"), threads=1)
    return folder


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_places_are_in_pixels_of_the_frame(bright: Path, spotter: Path, batch_size: int, tmp_path: Path) -> None:
    output = tmp_path / "balls.csv"
    found = predict_heatmap(
        clips=[bright], model=spotter, output=output, threshold=0.5, device="cpu", batch_size=batch_size, threads=1
    )
    assert found == 3
    rows = rows_of(output.read_text())
    assert [row["file name"] for row in rows] == ["0000.jpg", "0001.png", "0002.jpg", "0003.png"]
    for row, ball in zip(rows, BALLS, strict=True):
        assert row["clip"] == str(bright) and row["status"] == ""
        if ball is None:
            assert (row["visibility"], row["x-coordinate"], row["y-coordinate"]) == ("0", "", "")
            assert float(row["score"]) == pytest.approx(0, abs=0.01)
        else:
            assert row["visibility"] == "1" and float(row["score"]) > 0.9
            assert (float(row["x-coordinate"]), float(row["y-coordinate"])) == pytest.approx(ball, abs=0.3)


def test_the_table_is_data_like_any_other(bright: Path, spotter: Path, tmp_path: Path) -> None:
    shutil.copytree(bright, tmp_path / "game1/Clip1")
    done = run("game1/Clip1", "--model", spotter, "--output", "game1/Clip1/Label.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "found a ball in 3 of 4 frames, written to game1/Clip1/Label.csv" in done.stderr
    frames = read_clips(tmp_path)[0].frames
    assert [frame.visibility for frame in frames] == [EASY, NO_BALL, EASY, EASY]
    assert frames[0].ball == pytest.approx(BALLS[0], abs=0.3)


def test_an_onnx_file_needs_no_torch(bright: Path, trained: Path, tmp_path: Path) -> None:
    """torch and transformers are made impossible to import; the table is that of the merged model."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    (tmp_path / "transformers.py").write_text("raise ImportError('no transformers here')")
    options = (bright, "--threshold", "0.001", "--output", "-", "--threads", "1")
    by_file = run(*options, "--model", trained.with_suffix(".onnx"), cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert by_file.returncode == 0, by_file.stderr
    assert run(*options, "--model", trained, cwd=tmp_path, PYTHONPATH=str(tmp_path)).returncode == 1
    by_folder = run(*options, "--model", trained, cwd=tmp_path)
    assert by_folder.returncode == 0, by_folder.stderr
    rows = rows_of(by_file.stdout), rows_of(by_folder.stdout)
    assert len(rows[0]) == 4 and len({row["x-coordinate"] for row in rows[0]}) > 1
    for ours, theirs in zip(*rows, strict=True):
        for name in ("x-coordinate", "y-coordinate", "score"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=0.02)


def test_several_clips_do_not_mix(bright: Path, trained: Path, tmp_path: Path) -> None:
    """The first frame of a clip is seen with itself, not with the last of the clip before."""
    shutil.copytree(bright, tmp_path / "b")
    options = ("--model", trained.with_suffix(".onnx"), "--threshold", "0.001", "--output", "-", "--batch-size", "3")
    both = rows_of(run(bright, "b", *options, cwd=tmp_path).stdout)
    alone = rows_of(run(bright, *options, cwd=tmp_path).stdout)
    assert [row["clip"] for row in both] == [str(bright)] * 4 + ["b"] * 4
    assert [{**row, "clip": ""} for row in both] == [{**row, "clip": ""} for row in alone] * 2


def test_frames_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("frame10.png", "frame9.JPG", "frame1.jpeg", "Label.csv"):
        (tmp_path / name).touch()
    assert [frame.path.name for frame in list_frames(tmp_path).frames] == ["frame1.jpeg", "frame9.JPG", "frame10.png"]


def test_the_folder_above_clips_names_one(bright: Path) -> None:
    with pytest.raises(
        ClipError, match=r"game1 has no frames \(.jpg, .jpeg, .png\); there are frames in .*game1/Clip1"
    ):
        list_frames(bright.parent)


def test_mistakes_are_told_in_a_line(bright: Path, spotter: Path, trained: Path, tmp_path: Path) -> None:
    for name in ("empty", "text", "cut", "language"):
        (tmp_path / name).mkdir()
    (tmp_path / "text/0000.jpg").write_text("no picture")
    content = (bright / "0001.png").read_bytes()
    (tmp_path / "cut/0000.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "language/config.json").write_text('{"model_type": "llama"}')
    wrong = {
        ("empty", spotter): "empty has no frames",
        ("absent", spotter): "absent is no folder: name the folder of a clip's frames",
        ("text", spotter): "text/0000.jpg: cannot be read as a picture",
        ("cut", spotter): "cut/0000.png: cannot be read as a picture",
        (bright, "absent"): "absent is no heatmap model: no config.json can be read there",
        (bright, "absent.onnx"): "there is no absent.onnx",
        (bright, "language"): "it is of a model of type llama",
        (bright, "language/config.json"): "onnxruntime cannot load it",
    }
    for (clip, model), said in wrong.items():
        done = run(clip, "--model", model, "--output", "x.csv", cwd=tmp_path)
        assert done.returncode == 1 and said in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.csv")) and not list(tmp_path.glob(".*"))
    done = run(bright, "--model", spotter, "--output", "x.csv", "--threshold", "0", cwd=tmp_path)
    assert done.returncode == 2 and "--threshold: 0.0 is less than or equal to the minimum of 0" in done.stderr


def test_a_gpu_that_is_not_there(bright: Path, spotter: Path, trained: Path, tmp_path: Path) -> None:
    for model, said in ((spotter, "has no CUDAExecutionProvider"), (trained, "torch finds no GPU")):
        done = run(
            bright, "--model", model, "--output", "-", "--device", "cuda", cwd=tmp_path, CUDA_VISIBLE_DEVICES=""
        )  # fmt: skip
        assert done.returncode == 1 and f"--device cuda: {'this onnxruntime ' if model == spotter else ''}{said}" in (
            done.stderr
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU")
def test_a_gpu_computes_the_same(trained: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 48, 64), dtype=np.uint8)
    heatmaps = [load_predictor(trained, device=device, threads=1).compute(pixels) for device in ("cpu", "cuda")]
    np.testing.assert_allclose(*heatmaps, atol=1e-2)  # convolutions take TF32 there
