"""The record of a training run: its checks, its summary against numbers worked out by hand, and its picture."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lib.training_report import (
    History,
    TrainingReportError,
    describe_run,
    draw_history,
    read_history,
    smoothed,
    summarize_history,
    write_picture,
)

DIGEST = "ab" * 32


def record_of(count: int, *, device: str = "cpu", **changes: Any) -> dict[str, Any]:
    """A record as the trainer writes it, of `count` steps whose loss falls from 3 towards 1."""
    held = 1.5 if device == "cuda" else 0.0
    steps = [
        {
            "step": i,
            "epoch": 2 * i / count,
            "loss": 1 + 2 / i,
            "learning_rate": 2e-4 * (1 - i / (count + 1)),
            "grad_norm": 0.5,
            "tokens_per_second": 800.0 + i % 7,
            "micro_batch_size": 4,
            "allocated_gb": held,
            "cached_gb": 2 * held,
        }
        for i in range(1, count + 1)
    ]
    record = {
        "method": "qlora",
        "method_reason": "lora does not fit",
        "device": device,
        "seconds": 125.4,
        "unit": "tokens",
        "tokens": 12345,
        "samples": {"samples": 90, "tokens": 1, "learned_tokens": 1, "cut_samples": 0, "cut_tokens": 0},
        "peak_gpu_gb": [3.25, 2.5] if device == "cuda" else [],
        "kept": "last",
        "kept_step": count,
        "adapter_digest": DIGEST,
        "steps": steps,
        "evaluations": [],
    }
    return {**record, **changes}


def history_of(record: dict[str, Any], folder: Path) -> History:
    (folder / "training.json").write_text(json.dumps(record), encoding="utf-8")
    return read_history(folder / "training.json")[0]


def with_values(record: dict[str, Any], key: str, values: list[Any]) -> dict[str, Any]:
    for step, value in zip(record["steps"], values, strict=True):
        step[key] = value
    return record


def test_summary(tmp_path: Path) -> None:
    record = record_of(7, evaluations=[{"step": 3, "loss": 1.5}, {"step": 5, "loss": 1.25}, {"step": 7, "loss": 1.25}])
    with_values(record, "loss", [8, 6.0, 4.0, 3.0, 2.0, 1.0, 0.5])
    with_values(record, "tokens_per_second", [10.0, 900.0, 910.0, 890.0, 920.0, 880.0, 905.0])
    with_values(record, "micro_batch_size", [8, 8, 4, 4, 2, 2, 4])
    assert summarize_history(history_of(record, tmp_path)) == {
        "first_loss": pytest.approx(23 / 5),
        "last_loss": pytest.approx(10.5 / 5),
        "lowest_held_out": {"step": 5, "loss": 1.25},
        "median_tokens_per_second": 900.0,
        "micro_batch_size_changes": [
            {"step": 3, "from": 8, "to": 4},
            {"step": 5, "from": 4, "to": 2},
            {"step": 7, "from": 2, "to": 4},
        ],
        "seconds": 125.4,
    }


def test_summary_of_one_step(tmp_path: Path) -> None:
    assert summarize_history(history_of(record_of(1), tmp_path)) == {
        "first_loss": 3.0,
        "last_loss": 3.0,
        "lowest_held_out": None,
        "median_tokens_per_second": 801.0,
        "micro_batch_size_changes": [],
        "seconds": 125.4,
    }


@pytest.mark.parametrize(
    ("count", "changes", "said"),
    [
        (1, {"seconds": 9.6}, "1 step (2 epochs) in 10 s, loss 3, 801 tokens/s"),
        (4, {}, "4 steps (2 epochs) in 2 min 05 s, loss 3 → 1.5, 802 tokens/s"),
        (
            20,
            {"seconds": 7384, "evaluations": [{"step": 20, "loss": 1.23456}]},
            "20 steps (2 epochs) in 2 h 03 min, loss 1.91 → 1.11, lowest held-out loss 1.23 at step 20, 803 tokens/s",
        ),
    ],
)
def test_a_run_in_one_line(count: int, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    """With fewer than ten steps, the losses of the first and the last: means of five would share steps."""
    assert describe_run(history_of(record_of(count, **changes), tmp_path)) == said


def test_smoothed() -> None:
    assert smoothed([6.0, 0.0, 3.0, 9.0], window=3) == [3.0, 3.0, 4.0, 6.0]
    assert smoothed([6.0, 0.0, 3.0, 9.0, 1.0], window=3, middle=max) == [6.0, 6.0, 9.0, 9.0, 9.0]


def edited(edit: Callable[[dict[str, Any]], Any]) -> str:
    record = record_of(3)
    edit(record)
    return json.dumps(record)


DAMAGED = {
    "half of it": ('{"method": "qlo', ["is no valid JSON"]),
    "a list": ("[]", ["all of it: expected a mapping, found []"]),
    "nothing in it": ("{}", ["method: expected a text, found nothing", "and 5 more"]),
    "no steps": (edited(lambda record: record.update(steps=[])), ["steps: expected at least one"]),
    "steps that are no list": (edited(lambda record: record.update(steps={})), ["steps: expected a list, found {}"]),
    "a step that is no mapping": (
        edited(lambda record: record["steps"].insert(1, 5)),
        ["steps[1]: expected a mapping, found 5"],
    ),
    "a loss that is missing": (
        edited(lambda record: record["steps"][2].pop("loss")),
        ["steps[2].loss: expected a finite number, found nothing"],
    ),
    "a loss that is no number": (
        edited(lambda record: record["steps"][0].update(loss=float("nan"))),
        ["steps[0].loss: expected a finite number, found nan"],
    ),
    "a value not read that is no number": (
        edited(lambda record: record["steps"][0].update(grad_norm=float("inf"))),
        ["Out of range float values"],
    ),
    "half a batch": (
        edited(lambda record: record["steps"][0].update(micro_batch_size=2.5)),
        ["steps[0].micro_batch_size: expected a whole number, found 2.5"],
    ),
    "a step twice": (edited(lambda record: record["steps"][1].update(step=1)), ["steps: expected numbers that rise"]),
    "a step kept that never was": (
        edited(lambda record: record.update(kept_step=4)),
        ["kept_step: expected a step up to 3, found 4"],
    ),
    "another unit": (
        edited(lambda record: record.update(unit="words")),
        ["steps[0].words_per_second: expected a finite number, found nothing"],
    ),
    "kept for another reason": (
        edited(lambda record: record.update(kept="first")),
        ["kept: expected last or best, found 'first'"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_records_are_refused(damage: str, tmp_path: Path) -> None:
    text, parts = DAMAGED[damage]
    path = tmp_path / "training.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TrainingReportError) as caught:
        read_history(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert [part for part in parts if part not in message] == []
    assert len(message.splitlines()) <= 7


def test_keys_of_later_versions_are_no_damage(tmp_path: Path) -> None:
    record = record_of(2, optimizer="adamw")
    record["steps"][0]["something"] = "new"
    (tmp_path / "training.json").write_text(json.dumps(record))
    assert read_history(tmp_path / "training.json")[1] == record


def panels_of(history: History) -> list[Any]:
    return draw_history(history, title="tiny").axes


def legend_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(("device", "memory"), [("cpu", []), ("cuda", ["GPU memory\n(GB, summed)"])])
def test_panels(device: str, memory: list[str], tmp_path: Path) -> None:
    panels = panels_of(history_of(record_of(50, device=device), tmp_path))
    assert [axes.get_ylabel() for axes in panels] == [
        "loss",
        "learning rate\n(× 10$^{-4}$)",
        "speed\n(tokens/s)",
        *memory,
    ]
    assert [axes.get_xlabel() for axes in panels] == [""] * (len(panels) - 1) + ["optimizer step"]
    assert len({axes.get_xlim() for axes in panels}) == 1


def test_what_the_loss_panel_shows(tmp_path: Path) -> None:
    evaluations = [{"step": 25, "loss": 1.5}, {"step": 50, "loss": 1.75}]
    record = record_of(50, evaluations=evaluations, kept="best", kept_step=25)
    history = history_of(record, tmp_path)
    axes = panels_of(history)[0]
    each, mean, held_out, kept = axes.get_lines()
    assert legend_of(axes) == ["loss of each step", "mean of 5 steps", "held-out loss", "kept: step 25 (best)"]
    assert list(each.get_ydata()) == [step["loss"] for step in record["steps"]]
    assert mean.get_ydata()[10] == pytest.approx(sum(1 + 2 / i for i in range(9, 14)) / 5)
    assert (list(held_out.get_xdata()), list(held_out.get_ydata())) == ([25, 50], [1.5, 1.75])
    assert held_out.get_marker() != "None"
    assert list(kept.get_xdata()) == [25, 25]
    assert mean.get_linewidth() > each.get_linewidth()


def test_what_the_memory_and_speed_panels_show(tmp_path: Path) -> None:
    record = record_of(6, device="cuda")
    with_values(record, "micro_batch_size", [8, 8, 4, 4, 2, 2])
    *_, speed, memory = panels_of(history_of(record, tmp_path))
    assert legend_of(speed) == ["speed of each step", "micro-batch size 8 → 4 → 2"]
    assert [line[:, 0].tolist() for line in speed.collections[0].get_segments()] == [[3, 3], [5, 5]]
    assert legend_of(memory) == ["held by PyTorch", "in use after each step", "peak in use of each GPU: 3.25, 2.5"]
    held, used, _ = memory.get_lines()
    assert (set(held.get_ydata()), set(used.get_ydata())) == ({3.0}, {1.5})


@pytest.mark.parametrize(
    ("losses", "label"),
    [
        ([2.0, 1.0, 0.5, 0.2], "loss"),
        ([2.0, 1.0, 0.5, 0.05], "loss (log scale)"),
        ([2.0, 1.0, 0.5, 0.0], "loss"),
    ],
)
def test_log_scale_only_where_it_helps(losses: list[float], label: str, tmp_path: Path) -> None:
    axes = panels_of(history_of(with_values(record_of(4), "loss", losses), tmp_path))[0]
    assert axes.get_ylabel() == label
    assert axes.get_yscale() == ("log" if "log" in label else "linear")


def drawn(figure: Any) -> list[tuple[str, Any]]:
    """Every text of the figure with the box in which it is drawn."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    texts = [figure._suptitle, *(subfigure._suptitle for subfigure in figure.subfigs)]
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, *axes.get_legend().get_texts()]
        low, high = axes.get_ylim()
        ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        texts += [label for place, label in ticks if low <= place <= high]
    left, right = figure.axes[-1].get_xlim()
    ticks = zip(figure.axes[-1].get_xticks(), figure.axes[-1].get_xticklabels(), strict=True)
    texts += [label for place, label in ticks if left <= place <= right]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]


EVALUATED = {"evaluations": [{"step": 1, "loss": 1.0}, {"step": 9_999, "loss": 0.1}], "kept": "best"}


@pytest.mark.parametrize("count", [1, 2, 30, 10_000])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_text_overlaps_or_is_cut(count: int, device: str, tmp_path: Path) -> None:
    record = record_of(count, device=device, peak_gpu_gb=[139.25] * 8, seconds=360_000.0)
    if count == 10_000:
        record |= EVALUATED
        with_values(record, "micro_batch_size", [1 + i % 2 for i in range(count)])
        with_values(record, "tokens_per_second", [123_456.7] * count)
    figure = draw_history(history_of(record, tmp_path), title="m" * 63)
    texts = drawn(figure)
    assert len(texts) > 12
    for i, (text, place) in enumerate(texts):
        assert place.x0 >= 0 and place.y0 >= 0, text
        assert place.x1 <= figure.bbox.width and place.y1 <= figure.bbox.height, text
        assert [other for other, its in texts[:i] if place.overlaps(its)] == [], text


def test_a_title_is_no_formula(tmp_path: Path) -> None:
    write_picture(history_of(record_of(1), tmp_path), title="a$b$\\c", path=tmp_path / "x.png")


@pytest.mark.parametrize("count", [1, 60])
def test_the_same_history_gives_the_same_bytes(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user's own settings for matplotlib are."""
    import matplotlib

    history = history_of(record_of(count, device="cuda"), tmp_path)
    write_picture(history, title="tiny", path=tmp_path / "first.png")
    with matplotlib.rc_context({"font.size": 20, "savefig.transparent": True, "axes.facecolor": "black"}):
        write_picture(history, title="tiny", path=tmp_path / "second.png")
    picture = (tmp_path / "first.png").read_bytes()
    assert picture == (tmp_path / "second.png").read_bytes()
    assert struct.unpack(">II", picture[16:24]) == (1200, 1176)
    assert not any(chunk in picture for chunk in (b"tEXt", b"tIME", b"iTXt"))
