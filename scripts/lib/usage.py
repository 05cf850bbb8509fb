"""
What a step takes: its time, and the most memory of its process with the programs that it starts, and of each GPU.

Snakemake's benchmark looks every 30 s after the first 15, so that a peak is soon missed, and never at a GPU. Here the
kernel's own high-water mark of each process counts as well. Nothing here can change an artifact's bytes, so
`lib.code.code_digest` leaves this module out.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

SECONDS = 0.25
PROC = Path("/proc")
LINE = re.compile(r"used ([0-9.]+) s, at most ([0-9]+) MB of memory(?:, of each GPU ([0-9, ]+) MB)?")


@dataclass(frozen=True)
class Usage:
    """
    What a step took.

    Attributes:
        seconds: of the clock.
        ram: bytes, of all its processes at a time.
        gpus: bytes that PyTorch held on each GPU; empty where it used none.
    """

    seconds: float
    ram: int
    gpus: tuple[int, ...] = ()

    def __str__(self) -> str:
        cards = f", of each GPU {', '.join(f'{size / 1e6:.0f}' for size in self.gpus)} MB" if self.gpus else ""
        return f"used {self.seconds:.1f} s, at most {self.ram / 1e6:.0f} MB of memory{cards}"


def read_usage(log: Path) -> Usage | None:
    """What the step that wrote a log took, by its last words; None where there are none, as of one that failed."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found = LINE.search(lines[-1]) if lines else None
    if found is None:
        return None
    cards = tuple(int(size) * 10**6 for size in found[3].split(",")) if found[3] else ()
    return Usage(float(found[1]), int(found[2]) * 10**6, cards)


class Meter:
    """Follows this process and its descendants while a block runs."""

    def __init__(self) -> None:
        self._start, self._ram, self._done = time.monotonic(), 0, Event()
        self._thread = Thread(target=self._follow, name="meter", daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def read(self) -> Usage:
        """What was taken so far."""
        self._look()
        return Usage(time.monotonic() - self._start, self._ram, _held_on_gpus())

    def _follow(self) -> None:
        pause = SECONDS / 16  # at first, for steps that are over at once
        while not self._done.wait(pause):
            self._look()
            pause = min(SECONDS, 2 * pause)

    def _look(self) -> None:
        memory = [found for pid in _family(os.getpid()) if (found := _memory(pid))]
        peaks = [peak for _, peak in memory]
        self._ram = max([self._ram, sum(now for now, _ in memory), *peaks])


def _family(pid: int) -> Iterator[int]:
    """A process and all that it started, as far as they still run."""
    yield pid
    with suppress(OSError):  # ended meanwhile
        for thread in os.scandir(PROC / str(pid) / "task"):
            for child in _children(thread):
                yield from _family(child)


def _children(thread: os.DirEntry[str]) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(thread, "children").read_text().split()]
    return []


def _memory(pid: int) -> tuple[int, int] | None:
    """Resident memory of a process in bytes, now and at its peak; None of one that has ended."""
    try:
        status = (PROC / str(pid) / "status").read_text()
    except OSError:
        return None
    sizes = dict(re.findall(r"(VmRSS|VmHWM):\s+([0-9]+) kB", status))
    return (1024 * int(sizes["VmRSS"]), 1024 * int(sizes["VmHWM"])) if len(sizes) == 2 else None


def _held_on_gpus() -> tuple[int, ...]:
    torch = sys.modules.get("torch")  # not imported here: a step that did not need it has used no GPU
    if torch is None or not torch.cuda.is_initialized():
        return ()
    return tuple(torch.cuda.max_memory_reserved(card) for card in range(torch.cuda.device_count()))
