"""The comparison of training methods as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.training_report import BLUE, DOTS_PER_INCH, GREEN, ORANGE

NAMES = {"lora": "LoRA (bf16)", "int8": "int8", "qlora": "QLoRA (4-bit)"}
COLOURS = {"lora": BLUE, "int8": ORANGE, "qlora": GREEN}


def memory_of(figures: dict[str, Any]) -> tuple[str, float]:
    """What limits a method: the fullest GPU's peak, or on a CPU run that of the process, in GB (10^9)."""
    if figures["peak_gpu_gb"]:
        return "peak memory of the fullest GPU (GB)", max(figures["peak_gpu_gb"])
    return "peak memory of the process (GB)", figures["peak_ram_gb"]


def describe_methods(report: dict[str, Any]) -> str:
    """A table for the terminal, a line per method."""
    lines = [f"{'method':<14} {'memory GB':>10} {'tokens/s':>10} {'loss':>8} {'held out':>9}"]
    for method, figures in report["methods"].items():
        lines.append(
            f"{NAMES[method]:<14} {memory_of(figures)[1]:>10.2f} {figures['tokens_per_second']:>10.0f} "
            f"{figures['last_loss']:>8.4f} {figures['held_out_loss']:>9.4f}"
        )
    return "\n".join(lines)


def draw_methods(report: dict[str, Any], picture: Path) -> None:
    """Draw memory, speed and held-out loss as bars; the same report gives the same bytes."""
    from matplotlib.figure import Figure

    methods = report["methods"]
    panels = [
        (memory_of(next(iter(methods.values())))[0], [memory_of(each)[1] for each in methods.values()]),
        ("tokens per second", [each["tokens_per_second"] for each in methods.values()]),
        ("held-out loss (nats per token)", [each["held_out_loss"] for each in methods.values()]),
    ]
    figure = Figure(figsize=(11, 4), layout="constrained")
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
