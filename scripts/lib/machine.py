"""What a machine has: cards, memory, cores, disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from lib.cli import usable_cores

MIB, GIB = 1 << 20, 1 << 30
CGROUP = Path("/sys/fs/cgroup")
QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits")
# Where `ollama serve` keeps models: as the service of the installer, and as a user's own program.
STORES = ("/usr/share/ollama/.ollama/models", "~/.ollama/models")
SECONDS = 20.0  # a driver that does not answer is as good as none


@dataclass(frozen=True)
class Card:
    """A GPU; memory in bytes, `used` by others."""

    name: str
    memory: int
    used: int = 0


@dataclass(frozen=True)
class Machine:
    """
    Memory and disk in bytes.

    Attributes:
        cards: in the order of their numbers.
        ram: of the machine, or of the control group that this runs in if that is less.
        available: of it, without swapping.
        swap: in all.
        cores: that may be used; None where the machine is only planned.
        disk: free, by the place that was looked at.
    """

    cards: tuple[Card, ...]
    ram: int
    available: int
    swap: int
    cores: int | None
    disk: dict[str, int]


def this_machine(*places: Path) -> Machine:
    """
    The machine that this runs on.

    Args:
        places: folders whose file systems are looked at; one that is not there stands for the nearest above it.
    """
    memory = psutil.virtual_memory()
    limit = _cgroup_limit()
    ram = min(memory.total, limit or memory.total)
    return Machine(
        cards=tuple(_cards()),
        ram=ram,
        available=min(memory.available, ram),
        swap=psutil.swap_memory().total,
        cores=usable_cores(),
        disk={str(place): shutil.disk_usage(nearest(place)).free for place in places},
    )


def model_store() -> Path:
    """The folder in which an Ollama server on this machine keeps models, or the nearest one above it that is there."""
    named = os.environ.get("OLLAMA_MODELS")
    stores = [Path(place).expanduser() for place in ([named] if named else STORES)]
    return nearest(next((place for place in stores if _is_there(place)), stores[-1]))


def nearest(place: Path) -> Path:
    """A folder, or the nearest one above it that is there and may be looked into."""
    return next(folder for folder in (place, *place.absolute().parents) if _is_folder(folder))


def _is_folder(place: Path) -> bool:
    try:
        return place.is_dir() and os.access(place, os.X_OK)
    except PermissionError:
        return False


def _is_there(place: Path) -> bool:
    """Also a folder of the service's own user, which nobody else may look into."""
    try:
        return place.is_dir()
    except PermissionError:
        return True


def _cards() -> Iterator[Card]:
    try:
        told = subprocess.run(QUERY, capture_output=True, text=True, check=True, timeout=SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return
    for number, line in enumerate(told.splitlines()):
        name, memory, used = (word.strip() for word in line.rsplit(",", 2))
        if memory.isdecimal() and used.isdecimal() and _is_visible(number):
            yield Card(name, int(memory) * MIB, int(used) * MIB)


def _is_visible(number: int) -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves a card; of those that it names otherwise than by number, all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return True
    words = [word.strip() for word in named.split(",") if word.strip()]
    return str(number) in words or any(not word.lstrip("-").isdecimal() for word in words)


def _cgroup_limit() -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = CGROUP / name
        if file.is_file() and (limit := file.read_text().strip()).isdecimal():
            return int(limit)
    return None
