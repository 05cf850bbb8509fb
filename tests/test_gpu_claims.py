"""Jobs that take cards among themselves, with a driver that is a script and jobs that are processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

GB = 1000  # MB
# What a job does: it writes its cards to a file, and ends when another file is there.
JOB = "import os, pathlib, sys, time; mine = pathlib.Path(sys.argv[1]);"
JOB += "mine.write_text(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'));"
JOB += "end = mine.with_suffix('.end')\nwhile not end.exists(): time.sleep(0.02)"


class Cards:
    """Two cards of 24 GB, and jobs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: dict[str, subprocess.Popen[str]] = {}
        self.use()
        driver = folder / "bin/nvidia-smi"
        driver.parent.mkdir()
        driver.write_text(f"#!/bin/sh\ncase $1 in --query-gpu*) cat {folder}/cards;; *) cat {folder}/programs;; esac\n")
        driver.chmod(0o755)

    def use(self, first: int = 0, second: int = 0, *, by: str = "") -> None:
        """What is used of the cards, in MiB."""
        (self.folder / "cards").write_text(f"A, GPU-a, 24000, {first}\nB, GPU-b, 24000, {second}\n")
        (self.folder / "programs").write_text(by)

    def start(self, name: str, gpus: int, memory: int, **environment: str) -> None:
        command = [sys.executable, ROOT / "scripts/with_gpus.py", f"--gpus={gpus}", f"--gpu-mem-mb={memory}"]
        command += ["--", sys.executable, "-c", JOB, self.folder / name]
        inherited = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        variables = {**inherited, "PATH": path, "MODELMILL_CACHE": str(self.folder / "cache"), **environment}
        self.started[name] = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)

    def taken(self, name: str, *, within: float = 20.0) -> str:
        """The cards that a job has been given, once it runs."""
        deadline = time.monotonic() + within
        while not (self.folder / name).exists() or not (self.folder / name).read_text():
            assert time.monotonic() < deadline and self.started[name].poll() is None, f"{name} does not run"
            time.sleep(0.02)
        return (self.folder / name).read_text()

    def told(self, name: str) -> str:
        """The next line that a job tells."""
        stream = self.started[name].stderr
        assert stream is not None
        return stream.readline()

    def end(self, name: str) -> int:
        (self.folder / f"{name}.end").touch()
        return self.started[name].wait(timeout=20)


@pytest.fixture
def cards(tmp_path: Path) -> Iterator[Cards]:
    found = Cards(tmp_path)
    yield found
    for job in found.started.values():
        job.kill()
        job.communicate()


def test_jobs_take_a_card_each_and_then_share_what_is_left(cards: Cards) -> None:
    cards.start("one", 1, 15 * GB)
    first = cards.taken("one")
    cards.start("two", 1, 12 * GB)
    second = cards.taken("two")
    assert {first, second} == {"GPU-a", "GPU-b"}
    cards.start("three", 1, 13 * GB)
    assert cards.taken("three") == second


def test_a_job_waits_for_cards_and_takes_them_when_they_are_free(cards: Cards) -> None:
    cards.start("one", 1, 20 * GB)
    cards.taken("one")
    cards.start("both", 2, 10 * GB)
    assert cards.told("both").startswith("waiting for 2 GPUs with 10.0 GB free each")
    assert not (cards.folder / "both").exists()
    assert cards.end("one") == 0
    assert cards.taken("both") == "GPU-a,GPU-b"


def test_a_killed_jobs_claim_is_void(cards: Cards) -> None:
    cards.start("one", 2, 20 * GB)
    cards.taken("one")
    cards.started["one"].send_signal(signal.SIGKILL)
    cards.started["one"].wait()
    cards.start("two", 2, 20 * GB)
    assert cards.taken("two") == "GPU-a,GPU-b"
    assert len(list((cards.folder / "cache/gpus").glob("GPU-*"))) == 2


def test_other_programs_cards_are_left_alone(cards: Cards) -> None:
    cards.use(first=9000)
    cards.start("one", 1, 20 * GB)
    assert cards.taken("one") == "GPU-b"


def test_waiting_for_other_programs_is_refused(cards: Cards) -> None:
    cards.use(first=9000, second=9000)
    cards.start("one", 1, 20 * GB)
    told = cards.told("one")
    assert told.startswith("with_gpus.py: needs 1 GPU with 20.0 GB free each; there are: A with 15.7 of 25.2 GB, B")
    assert cards.started["one"].wait() == 1


def test_what_our_jobs_use_counts_once(cards: Cards) -> None:
    cards.start("one", 1, 10 * GB)
    cards.taken("one")
    cards.use(first=9000, second=20000, by=f"GPU-a, {cards.started['one'].pid}, 9000\n")
    cards.start("two", 1, 14 * GB)
    assert cards.taken("two") == "GPU-a"


def test_cards_that_are_left_by_the_environment(cards: Cards) -> None:
    cards.start("one", 1, 10 * GB, CUDA_VISIBLE_DEVICES="1")
    assert cards.taken("one") == "GPU-b"


def test_without_a_driver_the_program_finds_out_by_itself(cards: Cards) -> None:
    (cards.folder / "cards").unlink()
    cards.start("one", 1, 10 * GB, CUDA_VISIBLE_DEVICES="0,1")
    assert cards.taken("one") == "0,1"


def test_the_status_is_the_programs(cards: Cards) -> None:
    command = [sys.executable, ROOT / "scripts/with_gpus.py", "--gpus=1", "--gpu-mem-mb=1", "--", "sh", "-c", "exit 7"]
    assert subprocess.run(command, check=False).returncode == 7
