"""What steps took against what they ask for: read from what lies there, as numbers, as text and as a picture."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axis import Axis
from matplotlib.text import Text
from tiny import SHAPE

from lib import estimate
from lib.cli import usable_cores
from lib.resource_picture import describe_steps, draw_resources, write_picture, write_size, write_time
from lib.resource_report import report_resources
from lib.spec import Project, resolve_project
from lib.usage import Usage

MIB = 1 << 20
LONG = "a-model-whose-name-is-as-long-as-the-schema-allows-it-at-63-of-63"[:63]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    Path("talks.jsonl").write_text("{}\n")
    base = {"hub": "maker/model", "revision": "main", "shape": SHAPE}
    tuned = {"base": base, "adapter": {"train": {"data": "talks.jsonl"}}, "quantize": {"path": "staged"}}
    return resolve_project({"models": {"m": tuned, "m2": tuned, "plain": {"base": base}}})


def write_file(name: str, content: bytes | str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_step(name: str, *, record: Any = None, usage: Usage | None = None, ended: int = 0) -> None:
    """A step's benchmark file, of two runs, and its log."""
    lines = ['{"s": 9999.0, "max_rss": 99999.0}', json.dumps(record)]
    os.utime(write_file(f"logs/{name}.jsonl", "\n".join(lines) + "\n"), (ended, ended))
    write_file(f"logs/{name}.log", f"wrote it\n{usage}\n" if usage else "wrote it\n")


def steps_of(project: Project, name: str = "m") -> dict[str, Any]:
    return {step["step"]: step for step in report_resources(name, project)["steps"]}


def test_figures_are_those_of_benchmark_and_log(project: Project) -> None:
    write_step("m/train_adapter", record={"s": 61.5, "max_rss": 500.0}, usage=Usage(60.0, 700 * 10**6), ended=2)
    write_step("m/merge_adapter", record={"s": 2.5, "max_rss": 500.0}, usage=Usage(2.0, 400 * 10**6), ended=1)
    write_step("m/convert_gguf.f16", record={"s": 0.5, "max_rss": "NA"}, usage=Usage(0.4, 24 * 10**6, (7, 10**9)))
    write_step("m2/quantize_gguf.q4_k_m", record={"s": 1.0})
    write_file("models/m/merged/model.safetensors", bytes(3000))
    write_file("models/m/merged/MANIFEST.json", bytes(96))
    found = steps_of(project)
    assert list(found)[:3] == ["convert_gguf.f16", "merge_adapter", "train_adapter"], "in the order in which they ended"
    assert found["train_adapter"]["measured"] == {"seconds": 61.5, "mem_mb": 700, "gpu_mem_mb": [], "disk_mb": None}
    merge = {"seconds": 2.5, "mem_mb": round(500 * MIB / 1e6, 1), "gpu_mem_mb": [], "disk_mb": 0.003096}
    assert found["merge_adapter"]["measured"] == merge
    assert found["convert_gguf.f16"]["measured"]["mem_mb"] == 24
    assert found["convert_gguf.f16"]["measured"]["gpu_mem_mb"] == [0, 1000]
    needs = estimate.merge_needs(project.models["m"], usable_cores())
    declared = {"mem_mb": needs.mem_mb, "disk_mb": needs.disk_mb, "runtime": needs.runtime, "gpu": 0, "gpu_mem_mb": 0}
    assert found["merge_adapter"]["declared"] == declared


def test_what_did_not_run_here_is_said_and_no_error(project: Project) -> None:
    later = ["build_llama_cpp", "fetch_base", "check_base", "check_data", "train_adapter", "merge_adapter"]
    later += ["convert_gguf.f16", "quantize_gguf.q4_k_m", "render_modelfile"]
    found = steps_of(project)
    assert list(found) == later
    assert all(step["measured"] is None and step["declared"]["mem_mb"] for step in found.values())
    assert report_resources("m", project)["artifacts"] == {}
    write_step("build_llama_cpp", record={"s": 300.0, "max_rss": 900.0})
    found = steps_of(project, "plain")
    assert found["build_llama_cpp"]["measured"]["seconds"] == 300
    assert list(found)[1:] == ["fetch_base", "check_base", "build_direct.q4_k_m", "render_modelfile"]


@pytest.mark.parametrize("content", ["", "{damaged", "[1]\n", "null\n", "\xff"])
def test_a_damaged_benchmark_is_no_measurement(content: str, project: Project) -> None:
    write_file("logs/m/fetch_base.jsonl", content.encode("latin-1"))
    none = {"seconds": None, "mem_mb": None, "gpu_mem_mb": [], "disk_mb": None}
    assert steps_of(project)["fetch_base"]["measured"] == none
    write_file("logs/m/fetch_base.log", f"{Usage(2.0, 10**9)}\n")
    assert steps_of(project)["fetch_base"]["measured"] == {**none, "seconds": 2.0, "mem_mb": 1000}


def test_a_step_of_an_earlier_version_and_reports(project: Project) -> None:
    for step in ("import_model", "report_training", "report_resources"):
        write_step(f"m/{step}", record={"s": 1.0})
    found = steps_of(project)
    assert found["import_model"]["declared"] is None
    assert not {"report_training", "report_resources"} & found.keys(), "else every report would change the next"


def test_artifacts_are_those_of_the_model(project: Project) -> None:
    for name, size in {"adapters/m/a": 5, "models/m.q4_k_m.gguf": 7, "models/m.base.f16.gguf": 9}.items():
        write_file(name, bytes(size))
    for other in ("adapters/m2/a", "models/m2.q4_k_m.gguf", "models/m.q4_k_m.gguf.json"):
        write_file(other, bytes(1))
    sizes = {"adapters/m": 5, "models/m.base.f16.gguf": 9, "models/m.q4_k_m.gguf": 7}
    assert report_resources("m", project)["artifacts"] == sizes


def needs(mem_mb: int, disk_mb: int, runtime: int, gpu_mem_mb: int = 0) -> dict[str, int]:
    return {"mem_mb": mem_mb, "disk_mb": disk_mb, "runtime": runtime, "gpu": 2, "gpu_mem_mb": gpu_mem_mb}


def took(seconds: float, mem_mb: float | None, disk_mb: float | None, *gpus: int) -> dict[str, Any]:
    return {"seconds": seconds, "mem_mb": mem_mb, "disk_mb": disk_mb, "gpu_mem_mb": list(gpus)}


# Of a 32B: with cards, a step that took more than it asked for, one of another version, one that did not run here.
LARGE = {
    "model": LONG,
    "steps": [
        {"step": step, "declared": declared, "measured": measured}
        for step, declared, measured in [
            ("fetch_base", needs(800, 65_500, 60), took(3500, 410.25, 65_527.8)),
            ("train_adapter", needs(8900, 1000, 240, 19_100), took(32_400, None, None, 12_700, 19_800)),
            ("build_direct.q4_k_m_and_q8_0_and_iq4_xs", needs(2000, 20_100, 15), took(431, 1210, 55_000)),
            ("import_model", None, took(0.0, None, 0)),
            ("render_modelfile", needs(2300, 1, 6), None),
        ]
    ],
    "artifacts": {f"bases/{LONG}": 65_527_800_000, f"models/{LONG}.base.q4_k_m.gguf": 19_851_336_000},
}


def test_the_table() -> None:
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in describe_steps(LARGE).splitlines()}
    assert rows == {
        "step": "RAM each GPU time disk",
        "fetch_base": "410.2 MB of 800 MB – 58.3 min of 1 h 65.53 GB of 65.5 GB",
        "train_adapter": "– of 8.9 GB 19.8 GB of 19.1 GB 9 h of 4 h – of 1 GB",
        "build_direct.q4_k_m_and_q8_0_and_iq4_xs": "1.21 GB of 2 GB – 7.18 min of 15 min 55 GB of 20.1 GB",
        "import_model": "– – 0 s 0 B",
        "render_modelfile": "– of 2.3 GB – – of 6 min – of 1 MB",
    }


@pytest.mark.parametrize("changes", [{}, {"artifacts": {}}, {"steps": LARGE["steps"][-1:], "artifacts": {}}])
def test_nothing_in_the_picture_is_cut_or_lies_on_something(changes: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that has no room
        figure = draw_resources({**LARGE, **changes})
        figure.canvas.draw()
    hidden = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in _beyond(axis)}
    texts = {text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()} - hidden
    shown = {text: text.get_window_extent() for text in texts}
    assert {"RAM", "time", "disk"} <= {text.get_text() for text in texts}
    for text, box in shown.items():
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (one, first), (other, second) in itertools.combinations(shown.items(), 2):
        assert not first.overlaps(second), (one, other)


def _beyond(axis: Axis) -> Iterator[Text]:
    """Labels of ticks beyond the ends of an axis: they are there, and not drawn."""
    low, high = sorted(axis.get_view_interval())
    for tick in axis.majorTicks:
        if not low <= tick.get_loc() <= high:
            yield from (tick.label1, tick.label2)


def test_the_same_report_gives_the_same_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_picture(LARGE, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "size", "time"),
    [
        (0, "0 B", "0 s"),
        (0.3462, "0 B", "0.35 s"),
        (59.99, "60 B", "1 min"),
        (999.96, "1 kB", "16.7 min"),
        (86_400, "86.4 kB", "1 d"),
        (999_960_000, "1 GB", "1.16e+04 d"),
    ],
)
def test_numbers_are_short(value: float, size: str, time: str) -> None:
    assert (write_size(value), write_time(value)) == (size, time)
