"""The record of a training run: reading and checking it, its summary, and the picture of its curves."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from lib.errors import ModelmillError
from lib.jsonfile import dump_json, read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours (2008), which the colour-blind can tell apart too.
BLUE, ORANGE, GREEN, VERMILLION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"
DOTS_PER_INCH = 120
MARKED_POINTS = 40  # with fewer steps than this each is a dot, since a line of one point cannot be seen
EXPECTED = {str: "a text", int: "a whole number", float: "a finite number"}


class TrainingReportError(ModelmillError):
    """A training run has no record, or one that is damaged or another adapter's."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What is read of one optimizer step."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    speed: float  # in the run's unit per second; the record says which in the name
    micro_batch_size: int
    allocated_gb: float  # of all GPUs together, as is the next
    cached_gb: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The loss on held-out samples after a step."""

    step: int
    loss: float


@dataclasses.dataclass(frozen=True)
class History:
    """What the report reads of a run's record; whatever else the record holds is passed on as it is."""

    method: str
    device: str
    unit: str  # tokens or frames
    seconds: float
    peak_gpu_gb: tuple[float, ...]
    kept: str
    kept_step: int
    adapter_digest: str
    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]


def read_history(path: Path) -> tuple[History, dict[str, Any]]:
    """
    Read the record that a training run left.

    Returns:
        What the report reads of it, and all of it.

    Raises:
        TrainingReportError: it is no record of a training; with every difference, up to five of them.
    """
    try:
        record = read_json(path)
    except ValueError as error:
        raise TrainingReportError(str(error)) from error
    problems: list[str] = []
    unit = record.get("unit") if isinstance(record, dict) else None
    history = _parse(History, record, "", problems, keys={"speed": f"{unit}_per_second"})
    problems = problems or _contradictions(history) or _unwritable(record)
    if problems:
        more = [f"  and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise TrainingReportError("\n".join([f"{path} is no record of a training:", *problems[:5], *more]))
    return history, record


def summarize_history(history: History) -> dict[str, Any]:
    """
    The run in a few numbers.

    Returns:
        `first_loss` and `last_loss`, means of up to five steps; `lowest_held_out`, the first of the lowest, None
        without evaluations; `median_tokens_per_second`, or frames; `micro_batch_size_changes`; `seconds`.
    """
    losses = [step.loss for step in history.steps]
    lowest = min(history.evaluations, key=lambda each: each.loss, default=None)
    return {
        "first_loss": fmean(losses[:5]),
        "last_loss": fmean(losses[-5:]),
        "lowest_held_out": lowest and dataclasses.asdict(lowest),
        f"median_{history.unit}_per_second": median(step.speed for step in history.steps),
        "micro_batch_size_changes": [
            {"step": after.step, "from": before.micro_batch_size, "to": after.micro_batch_size}
            for before, after in pairwise(history.steps)
            if before.micro_batch_size != after.micro_batch_size
        ],
        "seconds": history.seconds,
    }


def describe_run(history: History) -> str:
    """The run in one line, for the picture and the log."""
    summary = summarize_history(history)
    count, epochs = len(history.steps), history.steps[-1].epoch
    steps = f"{count:,} step{'s' * (count != 1)} ({epochs:.3g} epoch{'s' * (epochs != 1)})"
    ends = [summary["first_loss"], summary["last_loss"]]
    if count < 10:  # where these means would share steps
        ends = [step.loss for step in dict.fromkeys((history.steps[0], history.steps[-1]))]
    loss = "loss " + " → ".join(f"{end:.3g}" for end in ends)
    lowest = summary["lowest_held_out"]
    held_out = [f"lowest held-out loss {lowest['loss']:.3g} at step {lowest['step']:,}"] if lowest else []
    speed = f"{summary[f'median_{history.unit}_per_second']:,.0f} {history.unit}/s"
    return ", ".join([f"{steps} in {_duration(history.seconds)}", loss, *held_out, speed])


def write_picture(history: History, *, title: str, path: Path) -> None:
    """Draw the run as a PNG, the same bytes for the same history: it carries no date and no program's name."""
    from matplotlib import style

    with style.context("default"):  # whatever the user's matplotlibrc says
        figure = draw_history(history, title=title)
        figure.savefig(path, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})


def draw_history(history: History, *, title: str) -> Figure:
    """
    Draw loss, learning rate, speed and, for a run on GPUs, memory over the steps.

    Not by pyplot, which keeps figures in a global list and looks for a display.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    painters = [_draw_loss, _draw_learning_rate, _draw_speed, *([_draw_memory] if history.device == "cuda" else [])]
    heights = [2.2] + [1.0] * (len(painters) - 1)
    figure = Figure(figsize=(10, 2.0 + 1.5 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    body = figure.subfigures()  # so that the line under the title is one of its own
    panels = body.subplots(len(painters), sharex=True, height_ratios=heights)
    for axes, paint in zip(panels, painters, strict=True):
        paint(axes, history)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        # Above the panel, where it can hide no curve.
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=9, borderaxespad=0.2, borderpad=0
        )
    body.align_ylabels(panels)
    panels[-1].set_xlabel("optimizer step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(_plain))
    panels[-1].set_xlim(*_step_limits(history))
    # 50 letters fit, however wide they are.
    name = textwrap.fill(f"{title}: trained by {history.method} on {history.device}", 50)
    figure.suptitle(name, fontsize=13, fontweight="bold", parse_math=False)
    body.suptitle(describe_run(history), fontsize=10, parse_math=False)
    return figure


def _draw_loss(axes: Axes, history: History) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    losses = [step.loss for step in history.steps]
    smooth = _draw_values(axes, history, losses, label="loss of each step", middle=fmean)
    if history.evaluations:
        axes.plot(
            [each.step for each in history.evaluations],
            [each.loss for each in history.evaluations],
            color=VERMILLION, marker="D", markersize=4.5, linewidth=0.8, label="held-out loss", zorder=4,
        )  # fmt: skip
    kept = f"kept: step {history.kept_step:,} ({history.kept})"
    axes.axvline(history.kept_step, color=GREEN, linestyle="--", label=kept, zorder=1.5)
    axes.set_ylabel("loss")
    if _wants_log_scale([*smooth, *(each.loss for each in history.evaluations)], losses):
        axes.set_yscale("log")
        axes.set_ylabel("loss (log scale)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_learning_rate(axes: Axes, history: History) -> None:
    from matplotlib.ticker import FuncFormatter

    rates = [step.learning_rate for step in history.steps]
    exponent = math.floor(math.log10(max(rates))) if max(rates) > 0 else 0
    label = f"learning rate, at most {max(rates):.3g}"
    axes.plot(*_over_steps(history, rates), color=ORANGE, label=label, **_marks(len(rates)))
    axes.set_ylim(0, 1.1 * max(rates) or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate / 10**exponent:.3g}"))
    axes.set_ylabel("learning rate" + (f"\n(× 10$^{{{exponent}}}$)" if exponent else ""))


def _draw_speed(axes: Axes, history: History) -> None:
    from matplotlib.ticker import FuncFormatter

    speeds = [step.speed for step in history.steps]
    # By the median, which shows a sudden change as sudden, and no slow first step.
    _draw_values(axes, history, speeds, label="speed of each step", middle=median)
    _mark_micro_batches(axes, history)
    axes.set_ylim(0, 1.1 * max(speeds) or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.set_ylabel(f"speed\n({history.unit}/s)")


def _draw_memory(axes: Axes, history: History) -> None:
    marks = _marks(len(history.steps))
    cached = [step.cached_gb for step in history.steps]
    allocated = [step.allocated_gb for step in history.steps]
    axes.plot(*_over_steps(history, cached), color=ORANGE, linewidth=1.2, label="held by PyTorch", **marks)
    axes.plot(*_over_steps(history, allocated), color=BLUE, linewidth=1.2, label="in use after each step", **marks)
    if history.peak_gpu_gb:
        peaks = ", ".join(f"{peak:.3g}" for peak in history.peak_gpu_gb)
        axes.plot([], [], linestyle="none", label=f"peak in use of each GPU: {peaks}")
    axes.set_ylim(0, 1.1 * max(*cached, *allocated) or 1)
    axes.set_ylabel("GPU memory\n(GB" + (", summed)" if len(history.peak_gpu_gb) > 1 else ")"))


def _draw_values(
    axes: Axes, history: History, values: list[float], *, label: str, middle: Callable[[Sequence[float]], float]
) -> list[float]:
    """Draw noisy values thin, and their running mean or median over it; gives what the eye follows of the two."""
    window = _window(len(values))
    faint = {"linewidth": 0.7, "alpha": 0.45} if window > 1 else {"linewidth": 1.2}
    axes.plot(*_over_steps(history, values), color=BLUE, label=label, **faint, **_marks(len(values)))
    if window == 1:
        return values
    smooth = smoothed(values, window=window, middle=middle)
    name = {fmean: "mean", median: "median"}[middle]
    axes.plot(*_over_steps(history, smooth), color=BLUE, linewidth=1.8, label=f"{name} of {window} steps", zorder=3)
    return smooth


def _mark_micro_batches(axes: Axes, history: History) -> None:
    changes = summarize_history(history)["micro_batch_size_changes"]
    if not changes:
        return
    sizes = [changes[0]["from"], *(change["to"] for change in changes)]
    shown = " → ".join(map(str, sizes)) if len(sizes) <= 6 else f"{sizes[0]} → … → {sizes[-1]}, {len(changes)} changes"
    axes.vlines(
        [change["step"] for change in changes], 0, 1, transform=axes.get_xaxis_transform(),
        colors=GREY, linestyles=":", label=f"micro-batch size {shown}",
    )  # fmt: skip


def _window(count: int) -> int:
    """Steps of the running mean: a 25th of the run, odd, at least 5; 1 where a run is too short for one."""
    return max(5, count // 25 | 1) if count >= 15 else 1


def smoothed(
    values: Sequence[float], *, window: int, middle: Callable[[Sequence[float]], float] = fmean
) -> list[float]:
    """The mean or median of `window` values around each one; at the ends of those that are there."""
    half = window // 2
    return [middle(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _wants_log_scale(followed: Sequence[float], all_values: Sequence[float]) -> bool:
    """Where the curve falls to less than a 20th, a linear axis would show its later part as zero."""
    return min(*followed, *all_values) > 0 and max(followed) > 20 * min(followed)


def _over_steps(history: History, values: Sequence[float]) -> tuple[list[int], Sequence[float]]:
    return [step.step for step in history.steps], values


def _marks(count: int) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3.5} if count < MARKED_POINTS else {}


def _step_limits(history: History) -> tuple[float, float]:
    """From the first step to the last, with a margin, so that a line at either end can be seen."""
    shown = [step.step for step in history.steps] + [each.step for each in history.evaluations] + [history.kept_step]
    margin = max(0.5, 0.015 * (max(shown) - min(shown)))
    return min(shown) - margin, max(shown) + margin


def _plain(value: float, _: int) -> str:
    """A tick's number without an exponent or a rest of binary arithmetic."""
    return f"{value:,.6g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _parse(kind: Any, value: Any, where: str, problems: list[str], *, keys: Mapping[str, str]) -> Any:
    """Make an object of `kind` from JSON, and add to `problems` what does not fit; `keys` are those of other names."""
    if get_origin(kind) is tuple:
        if isinstance(value, list):
            one = get_args(kind)[0]
            return tuple(_parse(one, each, f"{where}[{i}]", problems, keys=keys) for i, each in enumerate(value))
    elif dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            fields = {}
            for name, hint in _hints(kind).items():
                key = keys.get(name, name)
                fields[name] = _parse(hint, value.get(key), f"{where}.{key}".lstrip("."), problems, keys=keys)
            return kind(**fields)
    elif type(value) is kind and (kind is not float or math.isfinite(value)):
        return value
    elif kind is float and type(value) is int:
        return float(value)
    expected = EXPECTED.get(kind, "a list" if get_origin(kind) is tuple else "a mapping")
    problems.append(f"  {where or 'all of it'}: expected {expected}, found {_shorten(value)}")
    return None


_hints = cache(get_type_hints)


def _shorten(value: Any) -> str:
    return "nothing" if value is None else textwrap.shorten(repr(value), 60, placeholder="…")


def _contradictions(history: History) -> list[str]:
    """What cannot be true of a run, in a record whose form is right."""
    numbers = [step.step for step in history.steps]
    if not numbers:
        return ["  steps: expected at least one, found none"]
    found = []
    if any(after <= before for before, after in pairwise(numbers)):
        found.append("  steps: expected numbers that rise, found one that does not")
    if not 0 <= history.kept_step <= numbers[-1]:
        found.append(f"  kept_step: expected a step up to {numbers[-1]}, found {history.kept_step}")
    if history.unit not in ("tokens", "frames"):
        found.append(f"  unit: expected tokens or frames, found {history.unit!r}")
    if history.kept not in ("last", "best"):
        found.append(f"  kept: expected last or best, found {history.kept!r}")
    return found


def _unwritable(record: Any) -> list[str]:
    """NaN and Infinity in what is passed on unread: Python reads them, but JSON does not have them."""
    try:
        dump_json(record)
    except ValueError as error:
        return [f"  {error}"]
    return []
