"""
What the user sees: plain lines on stderr and in the log file, a progress bar on a terminal.

Nothing here can change an artifact's bytes, so `lib.code.code_digest` leaves this module out.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from tqdm import tqdm

LOGGER = logging.getLogger("modelmill")
SECONDS_BETWEEN_LINES = 10.0


class _AboveProgressBar(logging.StreamHandler):
    """Write log lines above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)


def configure_logging(*, log: Path | None) -> None:
    """Send messages to stderr and, when `log` is given, to that file as well."""
    LOGGER.setLevel(logging.INFO)
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    screen = _AboveProgressBar(sys.stderr)
    screen.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.addHandler(screen)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(log, mode="w", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        LOGGER.addHandler(file)


def say(message: str) -> None:
    """Tell the user something, on stderr and in the log."""
    LOGGER.info(message)


def note(message: str) -> None:
    """Write a line to the log file alone: detail that would hide the rest on a terminal."""
    for handler in LOGGER.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.emit(LOGGER.makeRecord(LOGGER.name, logging.INFO, "", 0, message, (), None))


class Progress:
    """A bar on a terminal; elsewhere a line at most every ten seconds; in the log always lines."""

    def __init__(self, *, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done, self._last, self._start = 0, time.monotonic(), time.monotonic()
        self._note, self._lock = "", Lock()
        terminal = sys.stderr.isatty()
        scaled = {"unit_scale": True, "unit_divisor": 1000} if unit == "B" else {}
        self._bar = tqdm(total=total, desc=title, unit=unit, disable=not terminal, leave=False, **scaled)

    def advance(self, amount: int = 1, *, remark: str = "") -> None:
        """Count `amount` more units as done; `remark` is shown beside the bar. Any thread may."""
        with self._lock:
            self._done += amount
            self._note = remark or self._note
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(amount)
            now = time.monotonic()
            if now - self._last >= SECONDS_BETWEEN_LINES and self._done < self._total:
                self._last = now
                self._line()

    def _line(self) -> None:
        share = self._done / self._total
        elapsed = time.monotonic() - self._start
        left = f", {elapsed / share - elapsed:.0f} s left" if share else ""
        remark = f", {self._note}" if self._note else ""
        line = f"{self._title}: {share:.0%}{left}{remark}"
        (note if sys.stderr.isatty() else say)(line)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


@contextmanager
def progress(title: str, *, total: int, unit: str = "it") -> Iterator[Progress]:
    """Show how far a long step is; `unit` "B" counts bytes."""
    shown = Progress(title=title, total=total, unit=unit)
    try:
        yield shown
    finally:
        shown.close()
