"""Balls found in frames, by a merged model's folder (torch) or by its ONNX file (onnxruntime, no torch)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from lib.errors import ModelmillError
from lib.frames import Moment, read_frame
from lib.heatmap_onnx import OnnxHeatmap
from lib.heatmap_settings import InputPlan

SUFFIX = ".onnx"


class DeviceError(ModelmillError):
    """There is no such device here."""


@dataclass(frozen=True)
class Predictor:
    """
    A model ready to look at frames.

    Attributes:
        input: how a frame becomes the model's input.
        heatmap_size: width and height.
        frames: how many the model sees at a time.
        compute: heatmaps (batch, height, width), 0 to 1, of frames (batch, 3 · frames, height, width), uint8.
    """

    input: InputPlan
    heatmap_size: tuple[int, int]
    frames: int
    compute: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Prediction:
    """What a model says of one moment: its heatmap, and width and height of the frame as it lies on disk."""

    moment: Moment
    heatmap: np.ndarray
    size: tuple[int, int]


@dataclass
class Stopwatch:
    """Seconds that reading frames and computing heatmaps took."""

    reading: float = 0.0
    computing: float = 0.0
    frames: int = field(default=0)


def load_predictor(model: Path, *, device: str, threads: int) -> Predictor:
    """
    Load a model.

    Args:
        model: folder of a merged model, or its ONNX file.
        device: cpu or cuda.
        threads: on the CPU.

    Raises:
        HeatmapError, OnnxFileError: it is no such model.
        DeviceError: there is no such device.
    """
    if model.suffix == SUFFIX or model.is_file():
        loaded = OnnxHeatmap(model, device=device, threads=threads)
        shown = loaded.input

        def by_onnxruntime(pixels: np.ndarray) -> np.ndarray:
            mean, std = (
                np.array(each * loaded.frames, np.float32).reshape(1, -1, 1, 1) for each in (shown.mean, shown.std)
            )
            return loaded.run((pixels.astype(np.float32) / 255 - mean) / std)

        return Predictor(shown, loaded.heatmap_size, loaded.frames, by_onnxruntime)
    return _by_torch(model, device=device, threads=threads)


def _by_torch(folder: Path, *, device: str, threads: int) -> Predictor:
    import torch

    from lib.heatmap_folder import load_heatmap, normalize

    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch finds no GPU that it can use; take cpu")
    torch.set_num_threads(threads)
    loaded = load_heatmap(folder, device=device)
    model, config = loaded.model, loaded.config

    def compute(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            frames = normalize(torch.from_numpy(pixels).to(device), config)
            return torch.sigmoid(model(frames)).cpu().numpy()

    return Predictor(config.input, config.heatmap.heatmap_size, config.heatmap.frames, compute)


def predict(
    predictor: Predictor, moments: Sequence[Moment], *, batch_size: int, stopwatch: Stopwatch | None = None
) -> Iterator[Prediction]:
    """
    Look at moments, batch by batch, in their order.

    Args:
        stopwatch: is told what it took, but for the first batch, which is computed twice: libraries set up then.

    Raises:
        ClipError: a frame cannot be read.
    """
    stopwatch = stopwatch or Stopwatch()
    size = (predictor.input.width, predictor.input.height)
    # A clip's moments share frames; reading is most of the work.
    read = lru_cache(maxsize=2 * predictor.frames)(lambda path: read_frame(path, size))
    for start in range(0, len(moments), batch_size):
        batch = moments[start : start + batch_size]
        begin = time.perf_counter()
        pictures = [[read(frame.path) for frame in moment.frames] for moment in batch]
        pixels = np.stack([np.concatenate([picture for picture, _ in each], axis=2) for each in pictures])
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        stopwatch.reading += time.perf_counter() - begin
        if not start:
            predictor.compute(pixels)
        begin = time.perf_counter()
        heatmaps = predictor.compute(pixels)
        stopwatch.computing += time.perf_counter() - begin
        stopwatch.frames += len(batch)
        for moment, heatmap, each in zip(batch, heatmaps, pictures, strict=True):
            yield Prediction(moment, heatmap, each[-1][1])
