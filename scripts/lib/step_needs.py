"""What a step asks for and what it leaves, by the name of its log, as in "quantize_gguf.base.q4_k_m"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib import estimate, heatmap_estimate
from lib.budget import AUTO
from lib.estimate import Needs
from lib.heatmap_spec import HeatmapModel
from lib.quant_types import SOURCE_TYPES
from lib.quantize_path import DIRECT_RULE, JOIN, STAGED_RULE
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
    """
    The steps of `all` for a model, in their order, by the names of their logs.

    Args:
        direct: whether its default file is built directly.
    """
    # One in 16 bits never is, and others beside it may be.
    chain = _Chain(model, direct=direct or model.quantize.path == "direct")
    chain.add("build_llama_cpp", "fetch_base", "check_base")
    if model.adapter:
        chain.add(*["check_data", "train_adapter"] if model.adapter.train else ["import_adapter"])
    chain.add_gguf(model.default_quant)
    if model.quality and model.quality.limits:
        chain.add_measuring()
        chain.add("check_quality")
    chain.add("render_modelfile")
    return chain.steps


def judging_steps(model: Model, *, direct: bool, keep_intermediates: bool) -> list[str]:
    """What a model's report on quality takes after `planned_steps`; nothing where no `quality` is set."""
    if model.quality is None:
        return []
    # The report needs the 16-bit file, so that `auto` makes what is not there yet by that.
    chain = _Chain(model, direct=model.quantize.path == "direct")
    chain.add_measuring()
    if model.quality.base_weights:
        chain.add("compare_merges")
    if model.holds_out:
        chain.add_gguf(model.default_quant, BASE)
        chain.add("render_data", "measure_tuning")
    chain.add("report_quality")
    there = set(planned_steps(model, direct=direct))
    there |= {step.replace(DIRECT_RULE, STAGED_RULE) for step in there}
    if not keep_intermediates and "measure_types" not in there:
        there -= {"merge_adapter", f"convert_gguf.{model.source_type}"}
    return [step for step in chain.steps if step not in there]


class _Chain:
    """The steps that a model's files take, each once and after those that it needs, by the names of their logs."""

    def __init__(self, model: Model, *, direct: bool) -> None:
        self._model = model
        self._direct = direct
        self._steps: dict[str, None] = {}

    @property
    def steps(self) -> list[str]:
        return list(self._steps)

    def add(self, *steps: str) -> None:
        self._steps |= dict.fromkeys(steps)

    def add_gguf(self, quant: str, base: str = "") -> None:
        """A file of the model, or of its base if `base` is BASE."""
        model = self._model
        if quant in SOURCE_TYPES:
            self.add(*([] if base else ["merge_adapter"]), f"convert_gguf{base}.{quant}")
            return
        if not self._direct:
            self.add_gguf(model.source_type, base)
        if quant == AUTO:
            self.add_measuring()
            self.add("choose_type")
        if model.quantize.uses_imatrix(quant):
            self._add_matrix(base)
        self.add(f"{DIRECT_RULE if self._direct else STAGED_RULE}{base}.{quant}")

    def add_measuring(self) -> None:
        """Comparing the model's types with its 16-bit file."""
        quantize = self._model.quantize
        self.add("check_quality_text")
        self.add_gguf(self._model.source_type)
        if not quantize.is_auto:
            for quant in self._model.compared_types:
                self.add_gguf(quant)
        elif quantize.uses_imatrix(AUTO):
            self._add_matrix("")
        self.add("measure_types")

    def _add_matrix(self, base: str) -> None:
        quantize = self._model.quantize
        self.add(*["render_data"] if quantize.imatrix and quantize.imatrix.of_training else [], "check_calibration")
        source = quantize.imatrix_source(directly=self._direct)
        self.add_gguf(self._model.source_type if source == "f16" else source, base)
        self.add(f"compute_imatrix{base}")


def heatmap_steps(model: HeatmapModel) -> list[str]:
    """The steps of a heatmap model's ONNX file and, where clips are held out, its evaluation, in their order."""
    drawn = ["make_clips"] if model.clips.synthetic else []
    held_out = ["evaluate_heatmap"] if model.clips.eval_games else []
    return [*drawn, "check_clips", "fetch_base", "train_heatmap", "merge_heatmap", "export_onnx", *held_out]
