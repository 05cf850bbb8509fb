"""What a step asks for and what it leaves, by the name of its log, as in "quantize_gguf.base.q4_k_m"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib import estimate, heatmap_estimate
from lib.estimate import Needs
from lib.heatmap_spec import HeatmapModel
from lib.quantize_path import JOIN
from lib.spec import Model, Project

SMALL = (
    "check_data",
    "check_clips",
    "check_questions",
    "check_documents",
    "check_calibration",
    "check_quality_text",
    "report_quality",
    "choose_type",
    "check_quality",
)
BASE = ".base"


@dataclass(frozen=True)
class Step:
    """
    A step that ran, or may run.

    Attributes:
        rule: its rule.
        base: BASE where it is about the untuned base, otherwise empty.
        types: of the files that it makes or is about, if it has any.
    """

    rule: str
    base: str = ""
    types: tuple[str, ...] = ()


def read_step(log: str) -> Step:
    """The step that a log is of, by its name without ending."""
    rule, *parts = log.split(".")
    base = BASE if parts[:1] == [BASE[1:]] else ""
    types = parts[-1].split(JOIN) if len(parts) > bool(base) else []
    return Step(rule, base, tuple(types))


def needs_of(
    step: Step, model: Model | HeatmapModel, project: Project, threads: int = estimate.THREADS
) -> Needs | None:
    """What the rules say that a step needs, with so many threads if it is heavy; None of one that is no rule's."""
    if isinstance(model, HeatmapModel):
        return _heatmap_needs(step, model)
    if step.rule in SMALL:
        return estimate.small_needs()
    if step.rule in ("smoke_test", "answer_from_documents"):
        return estimate.answer_needs(model, model.default_quant)
    if step.rule == "quantize_gguf":
        return estimate.quantize_needs(model, step.types[0])
    if step.rule == "merge_adapter":
        return estimate.merge_needs(model, threads)
    if step.rule == "build_direct":
        return estimate.direct_needs(model, step.types, threads)
    of_project = {
        "train_adapter": estimate.train_needs,
        "compute_imatrix": estimate.imatrix_needs,
        "measure_types": estimate.measure_needs,
        "measure_tuning": estimate.measure_tuning_needs,
        "compare_merges": estimate.compare_merges_needs,
    }
    of_model = {
        "fetch_base": estimate.fetch_needs,
        "import_adapter": estimate.import_needs,
        "render_data": estimate.render_needs,
        "convert_adapter": estimate.convert_adapter_needs,
        "convert_gguf": estimate.convert_needs,
        "render_modelfile": estimate.modelfile_needs,
        "register_model": estimate.register_needs,
    }
    of_all = {"build_llama_cpp": estimate.build_needs, "check_base": estimate.check_base_needs}
    if step.rule in of_project:
        return of_project[step.rule](model, project.hardware)
    if step.rule in of_model:
        return of_model[step.rule](model)
    return of_all[step.rule]() if step.rule in of_all else None


def _heatmap_needs(step: Step, model: HeatmapModel) -> Needs | None:
    of_model = {
        "fetch_base": heatmap_estimate.fetch_needs,
        "make_clips": heatmap_estimate.make_clips_needs,
        "check_clips": heatmap_estimate.check_clips_needs,
        "train_heatmap": heatmap_estimate.train_needs,
        "merge_heatmap": heatmap_estimate.merge_needs,
        "export_onnx": heatmap_estimate.export_needs,
        "evaluate_heatmap": heatmap_estimate.evaluate_needs,
    }
    return of_model[step.rule](model) if step.rule in of_model else None


def artifacts_of(step: Step, name: str) -> Sequence[Path]:
    """The files and folders that a step leaves, of a model of that name; none where they are but a few lines."""
    if step.rule in ("train_adapter", "import_adapter", "train_heatmap"):
        return [Path("adapters", name)]
    if step.rule in ("convert_gguf", "quantize_gguf", "build_direct"):
        return [Path("models", f"{name}{step.base}.{quant}.gguf") for quant in step.types]
    places = {
        "fetch_base": Path("bases", name),
        "merge_adapter": Path("models", name, "merged"),
        "compute_imatrix": Path("models", f"{name}{step.base}.imatrix.gguf"),
        "convert_adapter": Path("models", f"{name}.adapter.gguf"),
        "make_clips": Path("work", name, "clips"),
        "merge_heatmap": Path("models", name, "merged"),
        "export_onnx": Path("models", f"{name}.onnx"),
        "evaluate_heatmap": Path("reports", f"{name}.overlays"),
    }
    return [places[step.rule]] if step.rule in places else []


def planned_steps(model: Model, *, direct: bool) -> list[str]:
    """The steps of `all` for a model, in their order, by the names of their logs."""
    quant, steps = model.default_quant, ["build_llama_cpp", "fetch_base", "check_base"]
    measured = ["check_quality_text", "measure_types"]
    if model.adapter:
        steps += ["check_data", "train_adapter"] if model.adapter.train else ["import_adapter"]
    if direct and quant != model.source_type:
        steps += [f"build_direct.{quant}"]
    else:
        steps += ["merge_adapter", f"convert_gguf.{model.source_type}"]
        steps += [*measured, "choose_type"] if model.quantize.is_auto else []
        steps += [f"quantize_gguf.{quant}"] if quant != model.source_type else []
    if model.quality and model.quality.limits:
        steps += [step for step in (*measured, "check_quality") if step not in steps]
    return [*steps, "render_modelfile"]


def heatmap_steps(model: HeatmapModel) -> list[str]:
    """The steps of a heatmap model's ONNX file and, where clips are held out, its evaluation, in their order."""
    drawn = ["make_clips"] if model.clips.synthetic else []
    held_out = ["evaluate_heatmap"] if model.clips.eval_games else []
    return [*drawn, "check_clips", "fetch_base", "train_heatmap", "merge_heatmap", "export_onnx", *held_out]
