"""How the disk fills while a model is built: what is there after each step, and what it takes meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lib import estimate, heatmap_estimate
from lib.heatmap_spec import HeatmapModel
from lib.spec import Model


@dataclass(frozen=True)
class Entry:
    """
    A step of a plan. Sizes in bytes.

    Attributes:
        step: the rule's name.
        added: what it leaves.
        removed: what is let go after it.
        held: what all files of the plan take afterwards.
        peak: what they take while it runs.
    """

    step: str
    added: int
    removed: int
    held: int
    peak: int


def disk_ledger(model: Model, *, direct: bool, keep_intermediates: bool, registered: bool = False) -> list[Entry]:
    """
    The disk that a model's default GGUF takes on its way, a base that is there already left out.

    Args:
        direct: it is built from base and adapter alone.
        keep_intermediates: as the config says.
        registered: it is then registered in a server that keeps its models on the same disk.
    """
    return _fill(_steps(model, direct, keep_intermediates, registered))


def heatmap_ledger(model: HeatmapModel, *, keep_intermediates: bool) -> list[Entry]:
    """The disk that a heatmap model takes on its way, clips and a base that are there already left out."""
    return _fill(_heatmap_steps(model, keep_intermediates))


def _fill(steps: Iterator[tuple[str, int, int, int]]) -> list[Entry]:
    entries, held = [], 0
    for step, added, removed, passing in steps:
        peak = held + added + passing
        held += added - removed
        entries.append(Entry(step, added=added, removed=removed, held=held, peak=peak))
    return entries


def _heatmap_steps(model: HeatmapModel, keep: bool) -> Iterator[tuple[str, int, int, int]]:
    if model.clips.synthetic:
        yield "make_clips", 10**6 * heatmap_estimate.make_clips_needs(model).disk_mb, 0, 0
    if model.base.path is None:
        yield "fetch_base", 4 * heatmap_estimate.backbone_of(model).parameters, 0, 0
    trained = 4 * heatmap_estimate.trained_parameters(model)
    # Checkpoints go when the training ends.
    yield "train_heatmap", trained, 0, 10**6 * heatmap_estimate.train_needs(model).disk_mb - trained
    written = heatmap_estimate.written_bytes(model)
    yield "merge_heatmap", written, 0, 0
    yield "export_onnx", written, 0, written
    overlays = 10**6 * heatmap_estimate.evaluate_needs(model).disk_mb
    yield "evaluate_heatmap", overlays, 0 if keep else written, 0


def _steps(model: Model, direct: bool, keep: bool, registered: bool) -> Iterator[tuple[str, int, int, int]]:
    """Each step with what it adds, what is removed after it, and what it needs beside that while it runs."""
    quant, base = model.default_quant, model.base
    merged = round(estimate.weight_bytes(model, "f32" if model.merge.dtype == "float32" else "f16"))
    source, quantized = (round(estimate.weight_bytes(model, kind)) for kind in (model.source_type, quant))
    if base.path is None:
        fetched = round(estimate.weight_bytes(model, "f16"))
        # Beside a checkpoint that is imported from a GGUF lies that file.
        yield "fetch_base", fetched, 0, round(0.6 * fetched) if base.gguf or base.pypi else 0
    if model.adapter:
        step = "train_adapter" if model.adapter.train else "import_adapter"
        yield step, estimate.adapter_bytes(model), 0, 0
    if direct and quant != model.source_type:
        yield "build_direct", quantized, 0, 10**8
    else:
        yield "merge_adapter", merged, 0, 0
        yield "convert_gguf", source, 0 if keep else merged, 0
        judged = model.quality is not None and bool(model.quality.limits)
        if model.quantize.is_auto:
            yield "measure_types", 0, 0, estimate.measuring_bytes(model)
        if quant != model.source_type:
            yield "quantize_gguf", quantized, 0 if keep or (judged and not model.quantize.is_auto) else source, 0
        if judged and not model.quantize.is_auto:
            yield "measure_types", 0, 0 if keep else source, estimate.measuring_bytes(model)
    if registered:
        # Upload, the copy that the server writes, and the layer; one of them stays.
        yield "register_model", quantized, 0, 3 * quantized
