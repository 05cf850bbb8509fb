"""What a machine has: cards, memory, cores, disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from lib.cli import usable_cores

MIB, GIB = 1 << 20, 1 << 30
CGROUP = Path("/sys/fs/cgroup")
CARDS = "--query-gpu=name,uuid,memory.total,memory.used"
PROGRAMS = "--query-compute-apps=gpu_uuid,pid,used_memory"
# Where `ollama serve` keeps models: as the service of the installer, and as a user's own program.
STORES = ("/usr/share/ollama/.ollama/models", "~/.ollama/models")
SECONDS = 20.0  # a driver that does not answer is as good as none


@dataclass(frozen=True)
class Card:
    """A GPU; memory in bytes, `used` by whatever runs on it."""

    name: str
    memory: int
    used: int = 0
    uuid: str = ""


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
        cards=tuple(visible_cards()),
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


def visible_cards() -> list[Card]:
    """The GPUs that the driver tells of and CUDA_VISIBLE_DEVICES leaves, in the driver's order."""
    cards = []
    for number, line in enumerate(_ask_driver(CARDS)):
        name, uuid, memory, used = (word.strip() for word in line.rsplit(",", 3))
        if memory.isdecimal() and used.isdecimal() and _is_visible(number, uuid):
            cards.append(Card(name, int(memory) * MIB, int(used) * MIB, uuid))
    return cards


def used_by_programs() -> list[tuple[str, int, int]]:
    """The uuid of a card, the process on it and the bytes it holds; in a container the driver may tell none."""
    found = ([word.strip() for word in line.split(",")] for line in _ask_driver(PROGRAMS))
    return [
        (uuid, int(process), int(used) * MIB)
        for uuid, process, used in found
        if process.isdecimal() and used.isdecimal()
    ]


def _ask_driver(query: str) -> list[str]:
    command = ("nvidia-smi", query, "--format=csv,noheader,nounits")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _is_visible(number: int, uuid: str) -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves a card; of parts of cards (MIG) nothing is known, so that all are left."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return True
    words = [word.strip() for word in named.split(",") if word.strip()]
    return str(number) in words or any(word.startswith("MIG") or uuid.startswith(word) for word in words)


def _cgroup_limit() -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = CGROUP / name
        if file.is_file() and (limit := file.read_text().strip()).isdecimal():
            return int(limit)
    return None
