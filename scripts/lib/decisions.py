"""What the plan settles before anything starts, in words: how adapters are trained, and what they are merged into."""

from __future__ import annotations

from lib import estimate
from lib.provenance import BASE_WEIGHTS
from lib.quant_types import SOURCE_TYPES
from lib.quantize_path import QuantizedFile, QuantizePaths
from lib.spec import Model, Project


def training_decisions(project: Project) -> dict[str, str]:
    """What `method: auto` came to, a line per model of which the config leaves it open."""
    trained = {name: model.adapter.train for name, model in project.models.items() if model.adapter}
    return {
        name: f"{name}: trained by {train.method} in {train.precision} on {train.device} ({train.method_reason})"
        for name, train in trained.items()
        if train and train.method_reason.startswith("auto")
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
