"""What is asked of Slurm beside a job's needs, and what it says of a job before anything is run."""

from __future__ import annotations

import functools
import math
import re
import subprocess
from collections.abc import Mapping

from lib.errors import ModelmillError

GIB = 1 << 30
# Before what sbatch says on stderr.
SPEAKER = re.compile(r"^(sbatch: )?(error: )?")
LIMIT = re.compile(r"(?:(?P<days>\d+)-)?(?:(?:(?P<hours>\d+):)?(?P<minutes>\d+):)?(?P<seconds>\d+)")


class SlurmError(ModelmillError):
    """What is said of the cluster cannot be understood."""


def cluster_cards(text: str) -> dict[str, float]:
    """
    GiB of each kind of card that a cluster has, from a list like "a5000=24 a100=80".

    Raises:
        SlurmError: it is no such list.
    """
    cards = {}
    for word in text.replace(",", " ").split():
        named = re.fullmatch(r"([\w.]+)=(\d+(?:\.\d+)?)", word)
        if not named or float(named[2]) == 0:
            raise SlurmError(f"MODELMILL_GPUS: expected names and GiB, as in 'a5000=24 a100=80'; found {word!r}")
        cards[named[1]] = float(named[2])
    return cards


def smallest_card(cards: Mapping[str, float], memory_mb: int) -> str | None:
    """The kind of card with the least memory of those that have enough; None if none has."""
    enough = [name for name, size in cards.items() if size * GIB >= memory_mb * 10**6]
    return min(enough, key=lambda name: (cards[name], name), default=None)


@functools.cache
def longest_minutes(partition: str | None) -> float:
    """
    The longest time limit that a partition allows; infinite where Slurm does not say.

    A job that asks for more is taken by sbatch, and then waits for ever.

    Args:
        partition: its name, or several with commas between, of which any will do; None for the default one.
    """
    try:
        told = subprocess.run(["sinfo", "--noheader", "--format=%P %l"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return math.inf
    limits = dict(line.rsplit(maxsplit=1) for line in told.stdout.splitlines() if line.strip())
    default = [name for name in limits if name.endswith("*")]
    # The default partition is marked; a job may name it all the same.
    limits |= {name.removesuffix("*"): limits[name] for name in default}
    asked = partition.split(",") if partition else default
    return max((_minutes(limits[name]) for name in asked if name in limits), default=math.inf)


def _minutes(limit: str) -> float:
    """From "30:00", "4:00:00", "1-00:00:00" or "infinite"."""
    found = LIMIT.fullmatch(limit)
    if not found:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes + seconds // 60


def why_refused(command: str) -> str | None:
    """
    Why Slurm will not take a job; None if it will.

    Args:
        command: sbatch with options, for the shell, but without a script.
    """
    if _sbatch(f"{command} --test-only").returncode == 0:
        return None
    # A test gives but one reason for all that is too large; of a job that does nothing more is said.
    asked = _sbatch(command)
    if asked.returncode == 0:
        subprocess.run(["scancel", asked.stdout.partition(";")[0].strip()], capture_output=True)
        return None
    said = [SPEAKER.sub("", line).strip() for line in asked.stderr.splitlines()]
    return "; ".join(filter(None, said)) or f"sbatch ended with status {asked.returncode}"


def _sbatch(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(f"{command} --wrap true", shell=True, capture_output=True, text=True)
