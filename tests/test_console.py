"""What the user sees and what the log holds."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib import console
from lib.console import LOGGER, SECONDS_BETWEEN_LINES, configure_logging, note, progress, say


class Clock:
    """A clock that tests move."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def log(tmp_path: Path) -> Iterator[Path]:
    """
    Where tests let the log go; afterwards nothing writes there.

    Tests themselves call `configure_logging`: what pytest captures with is another stream while fixtures are made.
    """
    handlers = LOGGER.handlers[:]
    yield tmp_path / "new" / "x.log"
    for handler in set(LOGGER.handlers) - set(handlers):
        handler.close()
    LOGGER.handlers[:] = handlers


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(console, "time", made)
    return made


def test_say_and_note(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log=log)
    say("merged 100% of 語")
    note("detail with %s and %d")
    shown = capsys.readouterr()
    assert shown.err == "merged 100% of 語\n"
    assert shown.out == ""
    first, second = log.read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d merged 100% of 語", first)
    assert second.endswith("detail with %s and %d")


def test_a_log_starts_anew(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log=log)
    say("first run")
    configure_logging(log=log)
    say("second run")
    assert "first run" not in log.read_text()
    assert capsys.readouterr().err == "first run\nsecond run\n"


def test_without_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log=None)
    say("shown")
    note("not shown")
    assert capsys.readouterr().err == "shown\n"


def test_progress_is_a_line_now_and_then(log: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log=log)
    with progress("merging", total=10, unit="B") as bar:
        for second in range(1, 11):
            clock.now = 1000.0 + second * SECONDS_BETWEEN_LINES / 2
            bar.advance(remark="loss 0.5" if second == 4 else "")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "merging: 20%, 40 s left",
        "merging: 40%, 30 s left, loss 0.5",
        "merging: 60%, 20 s left, loss 0.5",
        "merging: 80%, 10 s left, loss 0.5",
    ]
    assert [line[20:] for line in log.read_text().splitlines()] == lines


def test_a_short_step_shows_nothing(log: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(log=log)
    with progress("merging", total=3) as bar:
        bar.advance(3)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_and_the_log_lines(
    log: Path, clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging(log=log)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("merging", total=4) as bar:
        clock.now += 2 * SECONDS_BETWEEN_LINES
        bar.advance(remark="loss 0.5")
        say("a message")
    shown = capsys.readouterr().err
    assert "merging:   0%" in shown
    assert "a message\n" in shown.replace("\r", "\n")
    assert "s left" not in shown
    assert "merging: 25%, 60 s left, loss 0.5" in log.read_text()


def test_progress_of_nothing(log: Path, clock: Clock) -> None:
    configure_logging(log=log)
    with progress("merging", total=0) as bar:
        clock.now += 2 * SECONDS_BETWEEN_LINES
        bar.advance(0)
    assert log.read_text() == ""
