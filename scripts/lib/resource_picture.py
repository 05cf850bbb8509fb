"""The picture of what steps asked for and took, and its table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.training_report import BLUE, DOTS_PER_INCH, GREY, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

NOTHING = "–"
# Where axes have their ticks, and end: seconds and bytes.
TIMES = (0.01, 0.1, 1, 10, 60, 600, 3600, 36_000, 360_000, 3_600_000)
SIZES = tuple(10.0**exponent for exponent in range(1, 16))


@dataclass(frozen=True)
class Quantity:
    """Something that steps ask for and take: how it is written and drawn, and where the report has it."""

    title: str
    write: Callable[[float], str]
    ticks: Sequence[float]
    declared: Callable[[dict[str, Any]], float | None]
    measured: Callable[[dict[str, Any]], float | None]

    def of(self, step: dict[str, Any]) -> tuple[float | None, float | None]:
        """What a step declares and what was measured, in bytes or seconds; None where there is nothing to compare."""
        declared = self.declared(step["declared"]) if step["declared"] else None
        measured = self.measured(step["measured"]) if step["measured"] else None
        return declared or None, measured


def write_size(size: float) -> str:
    """Bytes in a unit that keeps the number short."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.99995 * limit:
            return f"{size / limit:.4g} {unit}"
    return f"{size:.0f} B"


def write_time(seconds: float) -> str:
    """Seconds in a unit that keeps the number short."""
    for limit, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 0.9995 * limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _megabytes(key: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda facts: None if facts[key] is None else 1e6 * facts[key]


QUANTITIES = (
    Quantity("RAM", write_size, SIZES, _megabytes("mem_mb"), _megabytes("mem_mb")),
    Quantity(
        "each GPU",
        write_size,
        SIZES,
        lambda declared: 1e6 * declared["gpu_mem_mb"],
        lambda measured: 1e6 * max(measured["gpu_mem_mb"]) if measured["gpu_mem_mb"] else None,
    ),
    Quantity(
        "time",
        write_time,
        TIMES,
        lambda declared: 60 * declared["runtime"],
        lambda measured: measured["seconds"],
    ),
    Quantity("disk", write_size, SIZES, _megabytes("disk_mb"), _megabytes("disk_mb")),
)


def describe_steps(report: dict[str, Any]) -> str:
    """A table for the terminal, a line per step: what was measured of what was declared."""
    shown = _shown(report)
    rows = [("step", *(each.title for each in shown))]
    rows += [(step["step"], *(compare(each, step) for each in shown)) for step in report["steps"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def compare(quantity: Quantity, step: dict[str, Any]) -> str:
    """What was measured of what was declared, in words."""
    declared, measured = quantity.of(step)
    took = NOTHING if measured is None else quantity.write(measured)
    return took if declared is None else f"{took} of {quantity.write(declared)}"


def write_picture(report: dict[str, Any], picture: Path) -> None:
    """Draw the report as a PNG, the same bytes for the same report."""
    from matplotlib import style

    with style.context("default"):  # whatever the user's matplotlibrc says
        draw_resources(report).savefig(picture, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})


def draw_resources(report: dict[str, Any]) -> Figure:
    """Draw each step's needs and what it took on logarithmic axes, and below them the sizes of the artifacts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown, steps, artifacts = _shown(report), report["steps"], report["artifacts"]
    heights = [1.2 + 0.3 * len(steps), 0.7 + 0.3 * len(artifacts)]
    figure = Figure(figsize=(4.2 + 3.2 * len(shown), 1.0 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    figure.suptitle(f"{report['model']}: what each step took of what it asks for", fontweight="bold")
    above, below = figure.subfigures(2, 1, height_ratios=heights) if artifacts else (figure.subfigures(), None)
    panels = above.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, quantity in zip(panels, shown, strict=True):
        _draw_quantity(axes, quantity, steps)
    panels[0].set_yticks(range(len(steps)), [step["step"] for step in steps], fontsize=9)
    panels[0].set_ylim(len(steps) - 0.5, -0.5)
    _draw_legend(above)
    if below:
        _draw_sizes(below.subplots(), artifacts)
    return figure


def _shown(report: dict[str, Any]) -> list[Quantity]:
    """The quantities that any of the steps asks for or takes."""
    return [each for each in QUANTITIES if any(value for step in report["steps"] for value in each.of(step))]


def _draw_quantity(axes: Axes, quantity: Quantity, steps: Sequence[dict[str, Any]]) -> None:
    axes.set_xscale("log")
    for row, step in enumerate(steps):
        declared, measured = quantity.of(step)
        exceeded = declared is not None and measured is not None and measured > declared
        colour = VERMILLION if exceeded else BLUE
        if declared and measured:
            axes.plot([measured, declared], [row, row], color=colour, linewidth=1, alpha=0.5)
        if declared:
            axes.plot(declared, row, marker="|", markersize=11, markeredgewidth=2, color=GREY)
        if measured:
            axes.plot(measured, row, marker="o", markersize=6, color=colour)
        axes.text(
            1.02, row, compare(quantity, step), transform=axes.get_yaxis_transform(), va="center", fontsize=8,
            color=VERMILLION if exceeded else "black",
        )  # fmt: skip
    _set_ticks(axes, quantity, steps)
    axes.set_title(quantity.title, fontsize=11)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _set_ticks(axes: Axes, quantity: Quantity, steps: Sequence[dict[str, Any]]) -> None:
    """Ticks at round numbers, from the last below every value to the first above; every other one of many."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    values = [value for step in steps for value in quantity.of(step) if value]
    below = max((number for number, tick in enumerate(quantity.ticks) if tick <= min(values)), default=0)
    above = min((number for number, tick in enumerate(quantity.ticks) if tick >= max(values)), default=-1)
    ends = quantity.ticks[below], quantity.ticks[above]
    axes.set_xlim(ends[0] / 1.3, ends[1] * 1.3)
    between = [tick for tick in quantity.ticks if ends[0] <= tick <= ends[1]]
    axes.xaxis.set_major_locator(FixedLocator(between if len(between) <= 5 else between[::2]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity.write(value)))
    axes.tick_params(axis="x", labelsize=8)


def _draw_legend(figure: SubFigure) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], linestyle="none", marker="o", color=BLUE, label="measured"),
        Line2D([], [], linestyle="none", marker="o", color=VERMILLION, label="more than asked for"),
        Line2D([], [], linestyle="none", marker="|", markersize=11, markeredgewidth=2, color=GREY, label="asked for"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _draw_sizes(axes: Axes, artifacts: dict[str, int]) -> None:
    from matplotlib.ticker import FuncFormatter

    bars = axes.barh(list(artifacts), list(artifacts.values()), color=BLUE, height=0.6)
    axes.tick_params(axis="y", labelsize=9)
    axes.bar_label(bars, labels=[write_size(size) for size in artifacts.values()], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_title("size of what is there", fontsize=11)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: write_size(size)))
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
