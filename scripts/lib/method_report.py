"""The comparison of training methods as a table and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.training_report import BLUE, DOTS_PER_INCH, GREEN, GREY, ORANGE

NAMES = {"full": "full precision", "lora": "LoRA (bf16)", "int8": "int8", "qlora": "QLoRA (4-bit)"}
COLOURS = {"full": GREY, "lora": BLUE, "int8": ORANGE, "qlora": GREEN}


@dataclass(frozen=True)
class Measure:
    """A figure of each method: where it stands, as a column's head and as an axis' label, and its decimals."""

    key: str
    head: str
    label: str
    decimals: int
    drawn: bool = True


# By the unit that speed is counted in: language models, and heatmap models.
MEASURES = {
    "tokens": (
        Measure("tokens_per_second", "tokens/s", "tokens per second", 0),
        Measure("last_loss", "loss", "", 4, drawn=False),
        Measure("held_out_loss", "held out", "held-out loss (nats per token)", 4),
    ),
    "frames": (
        Measure("frames_per_second", "frames/s", "frames per second, in training", 1),
        Measure("held_out_loss", "held out", "", 3, drawn=False),
        Measure("f1", "F1", "F1 at 5 pixels, held-out clips", 3),
        Measure("mean_error", "error px", "mean error (pixels of 1280×720)", 2),
    ),
}


def memory_of(figures: dict[str, Any]) -> tuple[str, float]:
    """What limits a method: the fullest GPU's peak, or on a CPU run that of the process, in GB (10^9)."""
    if figures["peak_gpu_gb"]:
        return "peak memory of the fullest GPU (GB)", max(figures["peak_gpu_gb"])
    return "peak memory of the process (GB)", figures["peak_ram_gb"]


def describe_methods(report: dict[str, Any]) -> str:
    """A table for the terminal, a line per method."""
    measures = MEASURES[report["unit"]]
    lines = [f"{'method':<14} {'memory GB':>10} " + " ".join(f"{each.head:>10}" for each in measures)]
    for method, figures in report["methods"].items():
        cells = " ".join(f"{_shown(figures[each.key], each.decimals):>10}" for each in measures)
        lines.append(f"{NAMES[method]:<14} {memory_of(figures)[1]:>10.2f} {cells}")
    return "\n".join(lines)


def _shown(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def draw_methods(report: dict[str, Any], picture: Path) -> None:
    """Draw memory, speed and what was learned as bars; the same report gives the same bytes."""
    from matplotlib.figure import Figure

    methods = report["methods"]
    panels = [(memory_of(next(iter(methods.values())))[0], [memory_of(each)[1] for each in methods.values()])]
    panels += [
        (measure.label, [figures[measure.key] or 0.0 for figures in methods.values()])
        for measure in MEASURES[report["unit"]]
        if measure.drawn
    ]
    figure = Figure(figsize=(3.6 * len(panels), 4), layout="constrained")
    figure.suptitle(f"Training methods on {report['base']}, the same steps")
    names = [NAMES[method].replace(" ", "\n") for method in methods]
    for axes, (label, values) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        bars = axes.bar(names, values, color=[COLOURS[method] for method in methods], width=0.6)
        axes.bar_label(bars, fmt=lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}", padding=2)
        axes.set_ylabel(label)
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=DOTS_PER_INCH, metadata={"Software": None})
