"""Whether a plan fits a machine: what each step needs, what is there, and what to change where it does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lib import estimate, heatmap_estimate
from lib.disk_ledger import Entry, disk_ledger, heatmap_ledger
from lib.estimate import Needs
from lib.heatmap_spec import HeatmapModel
from lib.logits_file import logits_bytes
from lib.machine import GIB, Card, Machine
from lib.quant_types import SOURCE_TYPES
from lib.quantize_path import QuantizedFile, QuantizePaths
from lib.sizes import CONTEXT, CUDA_BYTES, cache_bytes
from lib.software import Software, architecture_of
from lib.spec import Hardware, Model, Project
from lib.step_needs import BASE, SMALL, heatmap_steps, judging_steps, needs_of, planned_steps, read_step

FORMATS = ("fp32", "fp16", "int8", "4-bit")
RUN = "ollama run"
REGISTER = "register_model"
JUDGING = ("measure_types", "measure_tuning", "compare_merges")  # what `quality.chunks` lengthens
LLAMA_CPP = "build_llama_cpp"  # once for all models
# What may be advised of disk.
DIRECT, LET_GO, CHUNKS = "quantize.path: direct", "keep_intermediates: false", "a smaller quality.chunks"


@dataclass(frozen=True)
class Row:
    """
    A step of a plan on a machine.

    Attributes:
        step: the rule's name, with BASE where it is about the untuned base; or RUN.
        needs: what it asks for.
        peak: bytes of disk that the plan takes while it runs; None for what is not built.
        lacks: what is too small, in words; empty if it fits.
        advice: what to change.
        optional: it is not part of the plan unless it is asked for.
    """

    step: str
    needs: Needs
    peak: int | None
    lacks: tuple[str, ...]
    advice: tuple[str, ...]
    optional: bool = False

    @property
    def fits(self) -> bool:
        return not self.lacks


@dataclass(frozen=True)
class Preflight:
    """
    A model's plan on a machine.

    Attributes:
        formats: bytes of its weights in memory, by FORMATS.
        rows: of its steps.
        ledger: how the disk fills by what is planned.
    """

    model: str
    formats: dict[str, int]
    rows: tuple[Row, ...]
    ledger: tuple[Entry, ...]

    @property
    def fits(self) -> bool:
        return all(row.fits or row.optional for row in self.rows)


def planned_machine(hardware: Hardware) -> Machine:
    """The machine that config.yaml plans for, with nothing else on it."""
    cards = tuple(Card("planned", round(size * GIB)) for size in hardware.gpus)
    ram, disk = round(hardware.ram * GIB), round(hardware.disk * GIB)
    return Machine(cards, ram=ram, available=ram, swap=0, cores=None, disk={".": disk})


def preflight(name: str, project: Project, machine: Machine, software: Software | None = None) -> Preflight:
    """
    Hold a model's plan against a machine.

    Args:
        machine: whose first place of disk is the working directory.
        software: what is installed there; None where that is not known.
    """
    if name in project.heatmaps:
        return _preflight_heatmap(name, project, machine, software)
    model = project.models[name]
    direct = QuantizePaths(project, []).is_direct(QuantizedFile(name, "", model.default_quant))
    planned = planned_steps(model, direct=direct)
    ledger = disk_ledger(model, planned, project)
    # What is not planned starts from what the plan leaves.
    judging = judging_steps(model, direct=direct, keep_intermediates=project.keep_intermediates)
    later = [disk_ledger(model, steps, project, held=ledger[-1].held) for steps in ([REGISTER], judging)]
    threads = machine.cores or estimate.THREADS
    needed = [(step, needs, ledger, False) for step, needs in _needed(planned, model, project, threads)]
    needed += [(step, needs, later[0], True) for step, needs in _needed([REGISTER], model, project, threads)]
    needed += [(RUN, _run_needs(model, machine), [], True)]
    needed += [(step, needs, later[1], True) for step, needs in _needed(judging, model, project, threads)]
    free = next(iter(machine.disk.values()))
    rows = []
    for step, needs, entries, optional in needed:
        peak = max((entry.peak for entry in entries if entry.step == step), default=None)
        lacks = [*_lacks(needs, machine), *_lacks_disk(peak, free)]
        lacks += _lacks_software(step, name, model, software) if software else []
        helpful = _spares(model, project, judging if optional else planned, optional=optional)
        helpful += [CHUNKS] if peak and _spends_on_logits(step, model, project, peak - free) else []
        words = (word for lack in lacks for word in _advice(step, lack, model, helpful))
        rows.append(Row(step, needs, peak, tuple(lacks), tuple(dict.fromkeys(words)), optional))
    shape = estimate.shape_of(model)
    formats = {kind: estimate.held_bytes(shape, kind) for kind in FORMATS}
    return Preflight(name, formats, tuple(rows), tuple(ledger))


def _preflight_heatmap(name: str, project: Project, machine: Machine, software: Software | None) -> Preflight:
    model = project.heatmaps[name]
    ledger = heatmap_ledger(model, keep_intermediates=project.keep_intermediates)
    peaks = {entry.step: entry.peak for entry in ledger}
    free = next(iter(machine.disk.values()))
    rows = []
    for step in heatmap_steps(model):
        needs = needs_of(read_step(step), model, project)
        if needs is None or step in SMALL:
            continue
        lacks = [*_lacks(needs, machine), *_lacks_disk(peaks.get(step), free)]
        lacks += _lacks_bitsandbytes(step, model.adapter.train.method, software) if software else []
        advice = tuple(dict.fromkeys(word for lack in lacks for word in _heatmap_advice(step, lack, model)))
        rows.append(Row(step, needs, peaks.get(step), tuple(lacks), advice))
    formats = {kind: heatmap_estimate.held_bytes(model, kind) for kind in FORMATS}
    return Preflight(name, formats, tuple(rows), tuple(ledger))


@dataclass(frozen=True)
class PlannedJob:
    """
    A job of a run that is about to start.

    Attributes:
        name: of its rule, with the model.
        needs: what it asks for.
        removed: bytes of earlier jobs' outputs that are let go after it.
    """

    name: str
    needs: Needs
    removed: int = 0


def too_large(jobs: Sequence[PlannedJob], machine: Machine) -> list[str]:
    """
    What of a run exceeds a machine, whatever else runs there at the moment, in lines.

    Args:
        jobs: in the order in which they run, one at a time.
        machine: whose first place of disk is where the outputs go.
    """
    idle = replace(machine, available=machine.ram, cards=tuple(replace(card, used=0) for card in machine.cards))
    held, fullest, lines = 0, 0, []
    for job in jobs:
        needs = f"needs {job.needs.mem_mb / 1000:.1f} GB of RAM"
        needs += f", {job.needs.gpu} × {job.needs.gpu_mem_mb / 1000:.1f} GB of GPU" if job.needs.gpu else ""
        lines += [f"{job.name} ({needs}): {lack}" for lack in _lacks(job.needs, idle)]
        held += job.needs.disk_mb * 10**6
        fullest = max(fullest, held)
        held -= job.removed
    free = next(iter(machine.disk.values()))
    if fullest > free:
        most = max(jobs, key=lambda job: job.needs.disk_mb)
        lines.append(
            f"disk: all of it takes {fullest / 1e9:.1f} GB, {most.needs.disk_mb / 1e3:.1f} of them {most.name}; "
            f"{free / 1e9:.1f} GB are free"
        )
    return lines


def _needed(steps: Sequence[str], model: Model, project: Project, threads: int) -> Iterator[tuple[str, Needs]]:
    """Those that need more than little; files of several types are made one after the other."""
    found: dict[str, Needs] = {}
    for step in map(read_step, steps):
        needs, name = needs_of(step, model, project, threads), step.rule + step.base
        if needs and step.rule not in (*SMALL, LLAMA_CPP):
            found[name] = found[name].then(needs) if name in found else needs
    yield from found.items()


def _run_needs(model: Model, machine: Machine) -> Needs:
    """The file and the keys and values of a context: on the machine's cards if they hold them, else in RAM."""
    context = model.ollama.parameters.get("num_ctx", CONTEXT)
    cache = cache_bytes(estimate.shape_of(model), context)
    size = estimate.weight_bytes(model, model.default_quant) + cache
    card = min((card.memory for card in machine.cards), default=0) - CUDA_BYTES
    if card <= 0 or size > card * len(machine.cards):
        return Needs(math.ceil(size / 1e6) + 500, disk_mb=0, runtime=0)
    count = math.ceil(size / card)
    each = math.ceil((size / count + CUDA_BYTES) / 1e6)
    return Needs(1000, disk_mb=0, runtime=0, gpu=count, gpu_mem_mb=each)


def _lacks(needs: Needs, machine: Machine) -> Iterator[str]:
    large = [card for card in machine.cards if card.memory - card.used >= needs.gpu_mem_mb * 10**6]
    if needs.gpu > len(large):
        yield f"GPU: {len(large)} of {len(machine.cards)} have {needs.gpu_mem_mb / 1000:.1f} GB free"
    if needs.mem_mb * 10**6 > machine.available:
        yield f"RAM: {machine.available / 1e9:.1f} GB available"


def _lacks_disk(peak: int | None, free: int) -> Iterator[str]:
    if peak is not None and peak > free:
        yield f"disk: the plan takes {peak / 1e9:.1f} GB until then, {free / 1e9:.1f} GB free"


def _lacks_software(step: str, name: str, model: Model, software: Software) -> Iterator[str]:
    if step == "check_base":
        if not software.llama_cpp.works:
            yield f"llama.cpp: {software.llama_cpp.text}"
        architecture = architecture_of(Path(model.base.path or f"bases/{name}"))
        if architecture and software.architectures and architecture not in software.architectures:
            yield f"llama.cpp: does not convert {architecture}"
    if model.adapter and model.adapter.train:
        yield from _lacks_bitsandbytes(step, model.adapter.train.method, software)


def _lacks_bitsandbytes(step: str, method: str, software: Software) -> Iterator[str]:
    trains = step in ("train_adapter", "train_heatmap")
    if trains and method in ("int8", "qlora") and not software.bitsandbytes.works:
        yield f"bitsandbytes: {software.bitsandbytes.text}"


def _spares(model: Model, project: Project, steps: Sequence[str], *, optional: bool) -> list[str]:
    """Which settings would spare 16-bit files that these steps make, or let them go."""
    if model.default_quant in SOURCE_TYPES or not any(read_step(step).rule == "convert_gguf" for step in steps):
        return []
    # Judging reads the 16-bit file, however the others are built; and mixtures of experts are not built directly.
    needed = optional or "measure_types" in steps or estimate.shape_of(model).num_experts
    spared = [] if needed or model.quantize.path == "direct" else [DIRECT]
    return [*spared, *([LET_GO] if project.keep_intermediates else [])]


def _spends_on_logits(step: str, model: Model, project: Project, lacking: int) -> bool:
    """Whether logits are half of what is lacking at least."""
    if step not in JUDGING or model.quality is None or model.quality.chunks == 1:
        return False
    return 2 * logits_bytes(vocabulary=estimate.shape_of(model).vocab_size, chunks=model.quality.chunks) >= lacking


def _advice(step: str, lack: str, model: Model, helpful: Sequence[str]) -> Iterator[str]:
    """What to change for a step that does not fit; `helpful` are settings by which it takes less disk."""
    what, step = lack.partition(":")[0], step.removesuffix(BASE)
    if what == "llama.cpp":
        yield "llama_cpp.path: a llama.cpp that works here and knows the base"
    elif what == "bitsandbytes":
        yield "train.method: lora, or mend what bitsandbytes lacks"
    elif what == "disk" and step == REGISTER:
        yield "have the server keep its models on another disk (OLLAMA_MODELS)"
    elif what == "disk":
        yield from helpful
        yield "free some disk"
    elif step == "train_adapter" and model.adapter and model.adapter.train:
        train = model.adapter.train
        if train.method != "qlora":
            yield "train.method: qlora"
        if not train.gradient_checkpointing:
            yield "train.gradient_checkpointing: true"
        yield "a smaller train.max_length or train.per_device_train_batch_size"
        yield "train.offload.use_cpu_offload: true" if what == "GPU" else "close other programs"
    elif step == RUN:
        yield "a smaller ollama.parameters.num_ctx, or a smaller type in quantize.types"
    elif what == "GPU" and step in JUDGING:
        yield "quality.base_weights: false" if step == "compare_merges" else "quality.device: cpu"
    elif what == "GPU":
        yield "merge.device: cpu"
    elif step in ("merge_adapter", "convert_gguf", "quantize_gguf") and DIRECT in helpful:
        yield DIRECT
    else:
        yield "close other programs"


def _heatmap_advice(step: str, lack: str, model: HeatmapModel) -> Iterator[str]:
    """What to change for a step of a heatmap model that does not fit, in the order of TrackNet's advice."""
    what, train = lack.partition(":")[0], model.adapter.train
    if what == "bitsandbytes":
        yield "train.method: lora or full, or mend what bitsandbytes lacks"
    elif what == "disk":
        yield "free some disk"
    elif step == "train_heatmap":
        if train.per_device_train_batch_size > 1:
            yield "a smaller train.per_device_train_batch_size"
        if not train.gradient_checkpointing:
            yield "train.gradient_checkpointing: true"
        if train.method != "qlora":
            yield "train.method: qlora"
        if what == "GPU":
            yield "train.offload.use_cpu_offload: true"
        yield "a smaller heatmap.input_size, or smaller heatmap.channels"
    elif what == "GPU":
        yield "train.device: cpu, which evaluates there as well"
    else:
        yield "close other programs"
