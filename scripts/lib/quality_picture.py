"""The picture of a quality report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.quality_report import GENERAL, NO_MATRIX, PLAIN, type_of
from lib.training_report import BLUE, DOTS_PER_INCH, GREY, ORANGE

COLOURS = {"": BLUE, PLAIN: GREY, GENERAL: ORANGE}


def draw(report: Mapping[str, Any], picture: Path) -> None:
    """Draw divergence and agreement by size; the same report gives the same bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(f"{report['model']}: quantized types beside {type_of(report['reference'])}")
    left, right = figure.subplots(1, 2)
    shown: set[str] = set()
    for row in report["types"]:
        size, colour = row["size"] / 1e9, COLOURS[row["variant"] if row["matrix"] != NO_MATRIX else PLAIN]
        label = f"importance matrix: {row['matrix']}"
        for axes, height in ((left, row["mean_kld"]), (right, 100 * row["top1"])):
            axes.plot(size, height, "o", color=colour, label=None if label in shown else label)
            axes.annotate(row["type"], (size, height), xytext=(5, 4), textcoords="offset points", fontsize=8)
        shown.add(label)
    left.set_yscale("log")
    left.set_ylabel("mean KL divergence (nats a token)")
    right.set_ylabel("same likeliest token (%)")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("size (GB)")
        axes.margins(x=0.15, y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=DOTS_PER_INCH, metadata={"Software": None}, format="png")
