"""What the plan settles before anything starts, in words: trainings, what adapters are merged into, types to try."""

from __future__ import annotations

from lib import estimate
from lib.budget import AUTO
from lib.heatmap_spec import HeatmapModel
from lib.provenance import BASE_WEIGHTS
from lib.quant_types import SOURCE_TYPES
from lib.quantize_path import QuantizedFile, QuantizePaths
from lib.spec import Model, Project


def training_decisions(project: Project) -> dict[str, str]:
    """How models are trained: language models of which the config leaves it open, and heatmap models."""
    trained = {name: model.adapter.train for name, model in project.models.items() if model.adapter}
    heatmaps = {name: f"{name}: {_heatmap_training(model)}" for name, model in project.heatmaps.items()}
    return heatmaps | {
        name: f"{name}: trained by {train.method} in {train.precision} on {train.device} ({train.method_reason})"
        for name, train in trained.items()
        if train and train.method_reason.startswith("auto")
    }


# Why a heatmap model is trained by a method, after TrackNet's own table.
METHOD_REASONS = {
    "full": "every weight, without an adapter",
    "lora": "an adapter on the backbone's weights as they are",
    "int8": "an adapter on 8-bit weights of the backbone",
    "qlora": "an adapter on 4-bit weights of the backbone",
}
FROZEN = "the backbone stays as it is in 8 bits"


def _heatmap_training(model: HeatmapModel) -> str:
    train = model.adapter.train
    reason = METHOD_REASONS[train.method] if train.lora.enabled else FROZEN
    always = "" if train.method == "full" else "; decoder and head in full"
    return f"trained by {train.method} in {train.precision} on {train.device} (as configured: {reason}{always})"


def type_decisions(project: Project) -> dict[str, str]:
    """Which types are measured, of models whose type is the best of those that fit a budget."""
    return {
        name: f"{name}: {AUTO} will be the best, as measured, of {', '.join(model.quantize.candidates)} that fits"
        for name, model in project.models.items()
        if model.quantize.is_auto
    }


def merge_decisions(project: Project, paths: QuantizePaths) -> dict[str, str]:
    """
    What each adapter is merged into, and in how much memory, a line per model with an adapter.

    Others load the whole base in 16 bits, and in 4 where that fails; here no merge holds it, so that it needs neither.
    """
    return {name: f"{name}: {_merge_of(name, model, paths)}" for name, model in project.models.items() if model.adapter}


def _merge_of(name: str, model: Model, paths: QuantizePaths) -> str:
    quant = model.default_quant
    direct = quant not in SOURCE_TYPES and paths.is_direct(QuantizedFile(name, "", quant))
    needs = estimate.direct_needs(model, [quant]) if direct else estimate.merge_needs(model)
    card = f" and {needs.gpu_mem_mb / 1000:.1f} GB of a GPU" if needs.gpu else ""
    whole = estimate.held_bytes(estimate.shape_of(model), "fp16") / 1e9
    return (
        f"merged onto {BASE_WEIGHTS[model.merge.base_weights]}, by blocks of rows: {needs.mem_mb / 1000:.1f} GB of RAM"
        f"{card}, where the whole of them in FP16 takes {whole:.1f} GB; no fallback to 4 bits"
    )
