"""How the disk fills while a model is built: what is there after each step, and what it takes meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lib import estimate, heatmap_estimate
from lib.heatmap_spec import HeatmapModel
from lib.spec import Model, Project
from lib.step_needs import Step, needs_of, read_step

MEASURING = ("compute_imatrix", "measure_types", "measure_tuning", "compare_merges")
READ_SOURCE = ("quantize_gguf", "compute_imatrix", "measure_types")


@dataclass(frozen=True)
class Entry:
    """
    A step of a plan. Sizes in bytes.

    Attributes:
        step: the rule's name, with BASE where it is about the untuned base.
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


def disk_ledger(model: Model, steps: Sequence[str], project: Project, *, held: int = 0) -> list[Entry]:
    """
    The disk that a model's files take on their way, a base that is there already left out.

    Args:
        steps: by the names of their logs, in their order.
        project: that the model is of.
        held: bytes of files that are there before.
    """
    return _fill(_sizes(model, [read_step(step) for step in steps], project), held)


def heatmap_ledger(model: HeatmapModel, *, keep_intermediates: bool) -> list[Entry]:
    """The disk that a heatmap model takes on its way, clips and a base that are there already left out."""
    return _fill(_heatmap_steps(model, keep_intermediates))


def _fill(steps: Iterator[tuple[str, int, int, int]], held: int = 0) -> list[Entry]:
    entries = []
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


def _sizes(model: Model, steps: Sequence[Step], project: Project) -> Iterator[tuple[str, int, int, int]]:
    """Each step with what it adds, what is removed after it, and what it needs beside that while it runs."""
    # A 16-bit file that is made is let go after the last step that reads it, a merged folder after its conversion.
    made = {step.base for step in steps if step.rule == "convert_gguf"}
    last = {step.base: place for place, step in enumerate(steps) if step.rule in READ_SOURCE and step.base in made}
    for place, step in enumerate(steps):
        added, passing = _size(step, model, project)
        removed = 0
        if not project.keep_intermediates:
            removed += _merged_bytes(model) if step.rule == "convert_gguf" and not step.base else 0
            removed += round(estimate.weight_bytes(model, model.source_type)) if last.get(step.base) == place else 0
        if added or removed or passing:
            yield step.rule + step.base, added, removed, passing


def _size(step: Step, model: Model, project: Project) -> tuple[int, int]:
    """What a step adds, and what it needs beside that while it runs; nothing for one that leaves no large file."""
    if step.rule == "fetch_base":
        fetched = 0 if model.base.path else round(estimate.weight_bytes(model, "f16"))
        # Beside a checkpoint that is imported from a GGUF lies that file.
        return fetched, round(0.6 * fetched) if model.base.gguf or model.base.pypi else 0
    if step.rule in ("train_adapter", "import_adapter"):
        return estimate.adapter_bytes(model), 0
    if step.rule == "merge_adapter":
        return _merged_bytes(model), 0
    if step.rule in ("convert_gguf", "quantize_gguf", "build_direct"):
        return round(estimate.weight_bytes(model, step.types[0])), 10**8 if step.rule == "build_direct" else 0
    if step.rule == "register_model":
        # Upload, the copy that the server writes, and the layer; one of them stays.
        quantized = round(estimate.weight_bytes(model, model.default_quant))
        return quantized, 3 * quantized
    if step.rule in MEASURING:
        needs = needs_of(step, model, project)
        return 0, 10**6 * needs.disk_mb if needs else 0
    return 0, 0


def _merged_bytes(model: Model) -> int:
    return round(estimate.weight_bytes(model, "f32" if model.merge.dtype == "float32" else "f16"))
