"""Heatmap models from an ONNX file alone, by onnxruntime; nothing here needs torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lib.errors import ModelmillError, first_line
from lib.heatmap_settings import InputPlan

INPUT, OUTPUT = "frames", "heatmap"
# What the file's own metadata say, each as JSON.
METADATA = ("width", "height", "mean", "std", "heatmap_size", "frames")
SILENT = 3  # onnxruntime's severity of errors


class OnnxFileError(ModelmillError):
    """A file is no ONNX model of ours, or cannot be run here."""


class OnnxHeatmap:
    """
    A model read from a file.

    Attributes:
        input: how a frame becomes the model's input.
        heatmap_size: width and height.
        frames: how many the model sees at a time.
    """

    def __init__(self, path: Path, *, device: str = "cpu", threads: int = 1) -> None:
        """
        Args:
            device: cpu, or cuda where onnxruntime was built for it.
            threads: on the CPU.

        Raises:
            OnnxFileError: the file is none of ours, or there is no such device.
        """
        import onnxruntime

        if not path.is_file():
            raise OnnxFileError(f"there is no {path}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = SILENT
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
        if provider not in onnxruntime.get_available_providers():
            raise OnnxFileError(
                f"--device {device}: this onnxruntime has no {provider}; take cpu, or the merged model's folder"
            )
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=[provider])
        except Exception as error:  # onnxruntime's own have no common type but this
            raise OnnxFileError(f"{path}: onnxruntime cannot load it ({first_line(error)})") from error
        said = self._session.get_modelmeta().custom_metadata_map
        if missing := [name for name in METADATA if name not in said]:
            raise OnnxFileError(f"{path} is no heatmap model of modelmill's: its metadata lack {', '.join(missing)}")
        facts = {name: json.loads(said[name]) for name in METADATA}
        self.input = InputPlan(facts["width"], facts["height"], mean=tuple(facts["mean"]), std=tuple(facts["std"]))
        self.heatmap_size: tuple[int, int] = tuple(facts["heatmap_size"])
        self.frames: int = facts["frames"]

    def run(self, frames: np.ndarray) -> np.ndarray:
        """Heatmaps (batch, height, width) of normalised frames (batch, 3 · frames, height, width), both float32."""
        return self._session.run([OUTPUT], {INPUT: frames})[0]
