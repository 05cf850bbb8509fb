"""A merged heatmap model as an ONNX file: the same bytes wherever it is exported, and checked against torch."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from lib.errors import ModelmillError, first_line
from lib.heatmap_folder import HeatmapConfig, LoadedHeatmap
from lib.heatmap_model import COLOURS
from lib.heatmap_onnx import INPUT, METADATA, OUTPUT, OnnxHeatmap
from lib.typed import plain

# What torch's translations are written for; its exporter makes any later one of it by conversion.
OPSET = 18
EXPORTERS = ("torch", "onnx", "onnxscript", "onnxruntime")
# What a file can hold, a protobuf message, and what is left for everything but weights.
MOST_BYTES, GRAPH_BYTES = 2**31 - 1, 16 * 2**20
# Of a probability: two libraries add in another order, which moves a logit of 50 by a few hundred-thousandths.
ABSOLUTE, RELATIVE = 1e-5, 1e-3
BATCHES = (1, 3)


class OnnxError(ModelmillError):
    """A model cannot be exported, or its file computes something else."""


class _Probabilities(nn.Module):
    """What the file computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor) -> Tensor:
        return torch.sigmoid(self.model(frames))


def export_onnx(loaded: LoadedHeatmap, path: Path, *, threads: int) -> dict[str, Any]:
    """
    Write a model in float32, and hold what the file computes against the model.

    Args:
        loaded: the model, on the CPU and in float32.
        path: the file.
        threads: of onnxruntime; torch has its own setting.

    Returns:
        Opset, versions of the exporting packages and what was compared, for the file's origin.

    Raises:
        OnnxError: the model is too large, cannot be translated, or the file computes something else.
    """
    _refuse_size(loaded.model)
    model = _Probabilities(loaded.model).eval()
    proto = _translate(model, loaded.config)
    make_canonical(proto)
    _describe(proto, loaded.config)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise OnnxError(f"the exported model does not pass ONNX's own check: {first_line(error)}") from error
    path.write_bytes(proto.SerializeToString(deterministic=True))
    parity = check_parity(model, loaded.config, path, threads=threads)
    versions = {name: version(name).partition("+")[0] for name in EXPORTERS}
    return {"opset": OPSET, "versions": versions, "parity": parity}


def check_parity(model: nn.Module, config: HeatmapConfig, path: Path, *, threads: int) -> dict[str, Any]:
    """
    Compare a file by onnxruntime with the model by torch, on inputs ordinary and extreme.

    Returns:
        What was compared, and the largest difference rounded up to a power of ten: that a processor adds in another
        order is no other file.

    Raises:
        OnnxError: a probability differs by more than ABSOLUTE + RELATIVE of it, or is not finite.
    """
    compared, largest, kinds = OnnxHeatmap(path, threads=threads), 0.0, []
    for kind, frames in _inputs(config):
        with torch.inference_mode():
            expected = model(torch.from_numpy(frames)).numpy()
        found = compared.run(frames)
        if found.shape != expected.shape:
            raise OnnxError(f"{path.name} by onnxruntime gives {found.shape}, torch {expected.shape}")
        difference = np.abs(found - expected)
        beyond = ~(difference <= ABSOLUTE + RELATIVE * np.abs(expected))  # also what is not a number
        if beyond.any():
            at = np.unravel_index(
                np.nanargmax(np.where(beyond, np.nan_to_num(difference, nan=np.inf), -1)), found.shape
            )
            raise OnnxError(
                f"{path.name} by onnxruntime differs from torch by up to {difference[at]:.3g} ({kind}, batch "
                f"{len(frames)}: {found[at]:.6g} instead of {expected[at]:.6g}); at most {ABSOLUTE:g} and {RELATIVE:g} "
                "of it are allowed"
            )
        largest = max(largest, float(difference.max()))
        kinds += [] if kind in kinds else [kind]
    bound = float(f"1e{math.ceil(math.log10(largest))}") if largest else 0.0
    return {
        "inputs": kinds,
        "batches": list(BATCHES),
        "largest_difference_at_most": bound,
        "allowed": {"absolute": ABSOLUTE, "relative": RELATIVE},
    }


def make_canonical(proto: onnx.ModelProto) -> None:
    """
    Leave nothing in a model but what it computes.

    The exporter writes paths and lines of the Python that it followed, names that come from counters, and shapes of
    all that lies between; weights keep their names, everything else is named by its place.
    """
    graph = proto.graph
    proto.producer_name, graph.name = "modelmill", "heatmap"
    for field in ("producer_version", "domain", "doc_string", "model_version"):
        proto.ClearField(field)
    del graph.value_info[:], proto.metadata_props[:]
    if proto.functions or any(_holds_graph(node) for node in graph.node):
        raise OnnxError("the exported model has functions or branches, which TrackNet's models do not need")
    for part in (graph, *graph.input, *graph.output, *graph.initializer, *graph.node):
        part.ClearField("doc_string")
        del part.metadata_props[:]
    _rename(graph)


def _holds_graph(node: onnx.NodeProto) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def _rename(graph: onnx.GraphProto) -> None:
    """Name nodes by their kind and place, values by the node, and constants by the node that first takes them."""
    names = {value.name: value.name for value in (*graph.input, *graph.output)}
    # Weights have dots in their names, as in head.weight; what was folded on the way has none.
    names |= {each.name: each.name for each in graph.initializer if "." in each.name}
    counts: dict[str, int] = defaultdict(int)
    for node in graph.node:
        node.name = f"{node.op_type}_{counts[node.op_type]}"
        counts[node.op_type] += 1
        for number, name in enumerate(node.input):
            # All but the constants have a name already, since nodes come after what they take.
            names.setdefault(name, f"{node.name}/constant_{number}" if name else "")
        for number, name in enumerate(node.output):
            names.setdefault(name, f"{node.name}/output_{number}" if name else "")
        renamed = [names[name] for name in node.input], [names[name] for name in node.output]
        del node.input[:], node.output[:]
        node.input.extend(renamed[0])
        node.output.extend(renamed[1])
        by_name = sorted(node.attribute, key=lambda attribute: attribute.name)
        del node.attribute[:]
        node.attribute.extend(by_name)
    used = {name for node in graph.node for name in node.input}
    constants = {names[each.name]: each for each in graph.initializer if names.get(each.name) in used}
    kept = []
    for name in sorted(constants):
        kept.append(onnx.TensorProto())
        kept[-1].CopyFrom(constants[name])
        kept[-1].name = name
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _translate(model: nn.Module, config: HeatmapConfig) -> onnx.ModelProto:
    """torch's own exporter, without its talk."""
    example = torch.zeros(2, COLOURS * config.heatmap.frames, config.input.height, config.input.width)
    talk = logging.getLogger("torch.onnx")
    level = talk.level
    talk.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
        return program.model_proto
    except torch.onnx.OnnxExporterError as error:
        reason = first_line(error.__cause__ or error)
        raise OnnxError(f"torch's exporter cannot translate this backbone ({_kind(config)}): {reason}") from error
    finally:
        talk.setLevel(level)


def _kind(config: HeatmapConfig) -> str:
    return config.backbone.get("model_type", "unknown")


def _describe(proto: onnx.ModelProto, config: HeatmapConfig) -> None:
    """Write down what a frame has to become, so that the file is enough to run the model."""
    facts = {**plain(config.input), "heatmap_size": config.heatmap.heatmap_size, "frames": config.heatmap.frames}
    onnx.helper.set_model_props(proto, {name: json.dumps(facts[name]) for name in METADATA})


def _refuse_size(model: nn.Module) -> None:
    size = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    if size > MOST_BYTES - GRAPH_BYTES:
        raise OnnxError(
            f"the model's weights take {size / 1e9:.2f} GB in float32, and an ONNX file holds "
            f"{MOST_BYTES / 1e9:.2f} GB at most: choose a smaller heatmap.backbone"
        )


def _inputs(config: HeatmapConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Normalised frames: noise, black, white, and a board of both, which is as sharp as a picture can be."""
    colours = COLOURS * config.heatmap.frames
    mean, std = (
        np.array(values * config.heatmap.frames, np.float32).reshape(1, -1, 1, 1)
        for values in (config.input.mean, config.input.std)
    )
    for batch in BATCHES:
        shape = (batch, colours, config.input.height, config.input.width)
        random = np.random.default_rng(batch)
        yield "normal", random.standard_normal(shape, dtype=np.float32)
        board = (np.indices(shape).sum(axis=0) % 2).astype(np.float32)
        for kind, picture in (("noise", random.random(shape, dtype=np.float32)), ("board", board)):
            yield kind, (picture - mean) / std
        for kind, value in (("black", 0.0), ("white", 1.0)):
            yield kind, np.broadcast_to((np.float32(value) - mean) / std, shape).copy()
