"""
What each step of a model took, against what it had asked for; and how large its artifacts are.

Everything is read from what lies there: benchmark files and the last lines of logs, and the sizes of files. What was
not run here, or was cleaned away, has no measurement, and is no reason to run it again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lib.cli import usable_cores
from lib.quantize_path import QuantizedFile, QuantizePaths
from lib.spec import Project
from lib.step_needs import artifacts_of, heatmap_steps, needs_of, planned_steps, read_step
from lib.usage import read_usage

MIB = 1 << 20
REPORTS = ("report_resources", "report_training")  # what it takes to say all this is no part of it
LLAMA_CPP = "build_llama_cpp"  # built once for all models


def report_resources(name: str, project: Project, folder: Path = Path()) -> dict[str, Any]:
    """
    The report on a model.

    Args:
        name: of the model.
        folder: where `logs/`, `models/` and the others lie.

    Returns:
        `steps`, in the order in which they ended and then those of the plan that were not measured: each with
        `declared` (the resources of its rule; None for a rule of an earlier version) and `measured` (None, or
        `seconds`, `mem_mb`, `gpu_mem_mb` of each card, and `disk_mb` of what it left; None for what is not known);
        `artifacts`, with their sizes in bytes.
    """
    model = project.model(name)
    shared = [LLAMA_CPP] if name in project.models else []
    ran = {file.stem: file for file in _benchmarks(folder, name, shared)}
    rules = {read_step(step).rule for step in ran}
    later = [step for step in _planned(name, project) if read_step(step).rule not in rules]
    steps = []
    for called in (*ran, *later):
        step = read_step(called)
        needs = needs_of(step, model, project, usable_cores())
        measured = (
            _measure(ran[called], [folder / path for path in artifacts_of(step, name)]) if called in ran else None
        )
        steps.append({"step": called, "declared": needs and dataclasses.asdict(needs), "measured": measured})
    return {"model": name, "steps": steps, "artifacts": dict(_artifacts(folder, name))}


def _planned(name: str, project: Project) -> list[str]:
    if name in project.heatmaps:
        return heatmap_steps(project.heatmaps[name])
    model = project.models[name]
    direct = QuantizePaths(project, []).is_direct(QuantizedFile(name, "", model.default_quant))
    return planned_steps(model, direct=direct)


def _benchmarks(folder: Path, name: str, shared: Sequence[str]) -> list[Path]:
    """The benchmark files of a model's steps, in the order in which they ended."""
    files = [folder / "logs" / f"{step}.jsonl" for step in shared if (folder / "logs" / f"{step}.jsonl").exists()]
    files += (folder / "logs" / name).glob("*.jsonl")
    counted = (file for file in files if file.stem not in REPORTS)
    return sorted(counted, key=lambda file: (file.stat().st_mtime_ns, file.name))


def _measure(benchmark: Path, artifacts: list[Path]) -> dict[str, Any]:
    """What a step took, by its benchmark file and the log beside it."""
    found = _last_record(benchmark)
    usage = read_usage(benchmark.with_suffix(".log"))
    # The one samples, the other sees no more than the step itself: each may have missed a peak that the other saw.
    memory = [found["max_rss"] * MIB / 1e6] if isinstance(found.get("max_rss"), int | float) else []
    memory += [usage.ram / 1e6] if usage else []
    there = [path for path in artifacts if path.exists()]
    return {
        "seconds": found.get("s", usage.seconds if usage else None),
        "mem_mb": round(max(memory), 1) if memory else None,
        "gpu_mem_mb": [round(size / 1e6) for size in usage.gpus] if usage else [],
        "disk_mb": sum(map(size_of, there)) / 1e6 if there else None,
    }


def _last_record(benchmark: Path) -> dict[str, Any]:
    try:
        record = json.loads(benchmark.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):  # of a run that was killed while it was written
        return {}
    return record if isinstance(record, dict) else {}


def _artifacts(folder: Path, name: str) -> Iterator[tuple[str, int]]:
    paths = [folder / "bases" / name, folder / "adapters" / name, folder / "models" / name / "merged"]
    files = [*sorted((folder / "models").glob(f"{name}.*.gguf")), folder / "models" / f"{name}.onnx"]
    for path in [*paths, *files]:
        if path.exists():
            yield str(path.relative_to(folder)), size_of(path)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all the files in a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.stat().st_size for file in files)
