"""
Cards that the jobs of a machine take among themselves, with the memory planned on each.

A claim is a file that the job holds locked; the kernel lets go of it when the job ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import psutil

from lib.console import say
from lib.errors import ModelmillError
from lib.locks import in_turn
from lib.machine import Card, used_by_programs, visible_cards

POLL_SECONDS = 2.0


class CardsError(ModelmillError):
    """There are not as many cards with as much memory, and no job that holds them will end."""


def claim_cards(count: int, memory: int, *, folder: Path) -> list[str]:
    """
    Take cards for this process and what it becomes; waits while other jobs hold them.

    Args:
        count: number of cards.
        memory: bytes planned on each.
        folder: where the claims of this machine's jobs are.

    Returns:
        Their uuids; none where the driver tells of no card, so that the job finds what there is by itself.

    Raises:
        CardsError: what other programs use leaves too little, so that waiting for our own jobs would not help.
    """
    waited = False
    while True:
        with in_turn(folder / "lock"):
            cards = visible_cards()
            if not cards:
                return []
            planned = {card.uuid: _claims(folder, card) for card in cards}
            others = _used_by_others(cards, {process for claims in planned.values() for process in claims})
            free = {card: card.memory - others[card.uuid] - sum(planned[card.uuid].values()) for card in cards}
            # The emptiest first: jobs share a card only where there is none for each.
            fitting = sorted((card for card in cards if free[card] >= memory), key=lambda card: -free[card])
            if len(fitting) >= count:
                return [_claim(folder, card, memory) for card in fitting[:count]]
        asked = f"{count} GPU{'s' * (count > 1)} with {memory / 1e9:.1f} GB free each"
        lacking = f"{asked}; there are: {_describe(free, planned)}"
        if sum(card.memory - others[card.uuid] >= memory for card in cards) < count:
            raise CardsError(
                f"needs {lacking}; end what else uses them, ask for less (train.method, max_length, "
                "per_device_train_batch_size), or set merge.device: cpu where it is a merge"
            )
        if not waited:
            say(f"waiting for {lacking}")
            waited = True
        time.sleep(POLL_SECONDS)


def _describe(free: dict[Card, int], planned: dict[str, dict[int, int]]) -> str:
    return ", ".join(
        f"{card.name} with {max(0, left) / 1e9:.1f} of {card.memory / 1e9:.1f} GB"
        + "".join(f" (job {job} has {size / 1e9:.1f} GB)" for job, size in planned[card.uuid].items())
        for card, left in free.items()
    )


def _claims(folder: Path, card: Card) -> dict[int, int]:
    """The bytes that each living job has planned on a card; claims of dead ones are removed."""
    held = {}
    for file in folder.glob(f"{card.uuid}.*"):
        with file.open() as claim:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held[int(file.suffix[1:])] = int(claim.read())
            else:
                file.unlink()
    return held


def _claim(folder: Path, card: Card, memory: int) -> str:
    file = os.open(folder / f"{card.uuid}.{os.getpid()}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(file, str(memory).encode())
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.set_inheritable(file, True)  # stays open, and so locked, in the program that this process becomes
    return card.uuid


def _used_by_others(cards: list[Card], jobs: set[int]) -> dict[str, int]:
    """What is used on each card, in bytes, but for what the jobs use, whose plans count instead."""
    others = {card.uuid: card.used for card in cards}
    if not jobs:
        return others
    ours = jobs | {child for job in jobs for child in _children(job)}
    for uuid, process, used in used_by_programs():
        if process in ours and uuid in others:
            others[uuid] = max(0, others[uuid] - used)
    return others


def _children(process: int) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(process).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
