"""A chain that is killed at any moment goes on with the same command, and ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import yaml
from conftest import ROOT
from fake_hub import FakeHub
from other_run import WRITER, other_run
from tiny_adapter import write_constants

from lib.llama_cpp import LlamaCpp
from lib.locks import writer_of

pytestmark = pytest.mark.slow

REPO = "maker/tiny"
SECONDS = 300.0


@dataclass(frozen=True)
class Leg:
    """
    A part of the chain, of less than fifteen seconds on two cores that do nothing else.

    Attributes:
        targets: what is asked for.
        kills: how often it is killed, twenty times in all.
        start: the folder before it, not to be changed.
        end: every file after it, with its digest.
        seconds: from its first job to its end, when nothing happens.
    """

    targets: tuple[str, ...]
    kills: int
    start: Path
    end: dict[str, str]
    seconds: float


FIRST, SECOND = "fetch, import", "merge, convert, quantize, Modelfile"
LEGS = {FIRST: (("adapters/tiny/MANIFEST.json",), 6), SECOND: (("all",), 14)}
# Before each part, undisturbed: what the lines above do not name takes as long again.
CHECKED = {FIRST: "work/llama_cpp.json", SECOND: "work/tiny/base.json"}
LATEST = 0.8  # share of a part's time; what comes later is killed in a run that goes on


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the workflow in a process group of its own; what it says goes to a file beside the folder."""
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "-j1", *arguments]
    temporary = folder.with_name("tmp")
    temporary.mkdir(exist_ok=True)
    with said(folder).open("w") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(temporary)},
        )


def said(folder: Path) -> Path:
    return folder.with_name("said.txt")


def run(folder: Path, *arguments: str) -> str:
    """Run the workflow to its end, and return what it said."""
    assert start(folder, *arguments).wait(SECONDS) == 0, said(folder).read_text()
    return said(folder).read_text()


def wait_for_a_job(process: subprocess.Popen[str], folder: Path) -> None:
    """Until a run has begun with its first job, or is over."""
    while process.poll() is None and "Execute 1 jobs..." not in said(folder).read_text():
        time.sleep(0.01)


def contents(folder: Path) -> dict[str, str]:
    """Every file of a project with its digest, hidden ones too; but logs, and what Snakemake keeps for itself."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".snakemake_timestamp")
    named = {path.relative_to(folder).as_posix(): path for path in files}
    kept = {name: path for name, path in named.items() if not name.startswith((".snakemake/", "logs/"))}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in kept.items()}


def finished(found: dict[str, str]) -> dict[str, str]:
    """The files whose name says that they are whole."""
    return {name: digest for name, digest in found.items() if "/." not in name}


def unfinished(found: dict[str, str]) -> set[str]:
    """Partial files, locks and the like; the record of a download stays with what was downloaded."""
    return {name for name in found if "/." in name and "/.hub/" not in name}


@pytest.fixture(scope="module")
def hub(tiny_base: Path) -> Iterator[None]:
    """The tiny base on a Hub on the loopback interface."""
    with FakeHub() as server, pytest.MonkeyPatch.context() as patch:
        server.add(REPO, {path.name: path.read_bytes() for path in tiny_base.iterdir()})
        patch.setenv("HF_ENDPOINT", server.endpoint)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def legs(hub: None, llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Leg]:
    """Both parts, one after the other and undisturbed."""
    place = tmp_path_factory.mktemp("undisturbed")
    folder = place / "project"
    write_constants(folder / "own", value=0.01)
    base = {"hub": REPO, "revision": "main", "shape": tiny.SHAPE}
    model = {"base": base, "adapter": {"path": "own"}, "merge": {"max_shard_size": 1}, "quantize": {"path": "staged"}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"models": {"tiny": model}}))
    done = {}
    for name, (targets, kills) in LEGS.items():
        run(folder, CHECKED[name])
        before = Path(shutil.copytree(folder, place / f"before-{len(done)}"))
        undisturbed = start(folder, *targets)
        wait_for_a_job(undisturbed, folder)
        begun = time.monotonic()
        assert undisturbed.wait(SECONDS) == 0, said(folder).read_text()
        done[name] = Leg(targets, kills, before, contents(folder), time.monotonic() - begun)
    return done


def copy(leg: Leg, place: Path) -> Path:
    return Path(shutil.copytree(leg.start, place / "project"))


def test_twenty_kills(legs: dict[str, Leg]) -> None:
    assert sum(leg.kills for leg in legs.values()) == 20


@pytest.mark.parametrize("name", LEGS)
def test_kill_9_of_everything_at_any_moment(name: str, legs: dict[str, Leg], tmp_path: Path) -> None:
    """Again and again, until a run gets to its end, and then from the beginning."""
    leg, moments = legs[name], random.Random(name)
    kills, attempt, cut_short = 0, 0, set()
    while kills < leg.kills:
        attempt += 1
        assert attempt <= 5 * leg.kills, "the runs end before they are killed"
        folder = copy(leg, tmp_path / str(attempt))
        while True:
            run_of_it = start(folder, *leg.targets)
            wait_for_a_job(run_of_it, folder)
            try:
                # The last one runs to its end.
                moment = moments.uniform(0, LATEST) * leg.seconds
                status = run_of_it.wait(SECONDS if kills == leg.kills else moment)
            except subprocess.TimeoutExpired:
                os.killpg(run_of_it.pid, signal.SIGKILL)
                run_of_it.wait()
                kills += 1
                found = contents(folder)
                cut_short |= unfinished(found)
                assert finished(found).items() <= leg.end.items(), "half a file under its final name"
                continue
            assert status == 0, said(folder).read_text()
            break
        assert contents(folder) == leg.end
        # Snakemake's own: empty folders, and what its solver was killed over (which jobs are next).
        left = [path for path in folder.with_name("tmp").rglob("*") if path.is_file()]
        assert not [path for path in left if "-pulp." not in path.name]
    assert cut_short or name == FIRST, "no kill met a job at work, though one of these takes several seconds"
    assert "Nothing to be done" in run(folder, *leg.targets)


def orphaned(folder: Path, *targets: str, output: str) -> subprocess.Popen[str]:
    """A run whose Snakemake was killed while that output is being written; the job itself stands still."""
    killed = start(folder, *targets)
    end = time.monotonic() + SECONDS
    while not writer_of(folder / output):
        assert killed.poll() is None and time.monotonic() < end, said(folder).read_text()
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    os.killpg(killed.pid, signal.SIGSTOP)
    killed.wait()
    return killed


def test_a_job_that_outlives_its_snakemake(legs: dict[str, Leg], tmp_path: Path) -> None:
    """The converter, which is a program of a script's, goes on; two more calls come, the second without our check."""
    leg, output = legs[SECOND], "models/tiny.f16.gguf"
    folder = copy(leg, tmp_path)
    killed = orphaned(folder, *leg.targets, output=output)
    try:
        before = contents(folder)
        told = f"{output} is being written by another run (process "
        for options, wanted in [((), "(nothing was run)"), (("--no-hooks",), "; wait for it or end it")]:
            status = start(folder, *leg.targets, *options).wait(SECONDS)
            assert status == 1
            assert told in said(folder).read_text() and wanted in said(folder).read_text(), said(folder).read_text()
            assert contents(folder) == before, "the second run has touched what the first is making"
    finally:
        os.killpg(killed.pid, signal.SIGCONT)
    end = time.monotonic() + SECONDS
    while writer_of(folder / output):
        assert time.monotonic() < end, "the job does not end"
        time.sleep(0.05)
    found = contents(folder)
    assert (folder / output).exists()
    assert not unfinished(found) and found.items() <= leg.end.items()
    run(folder, *leg.targets)
    assert contents(folder) == leg.end


def test_a_folder_that_is_being_written(legs: dict[str, Leg], tmp_path: Path) -> None:
    """Its files are the job's outputs, and the folder is what is locked."""
    folder = copy(legs[FIRST], tmp_path)
    with other_run(folder / "bases/tiny"):
        before = contents(folder)
        assert start(folder, *legs[FIRST].targets).wait(SECONDS) == 1
        assert f"bases/tiny is being written by another run ({WRITER})" in said(folder).read_text()
        assert "rule fetch_base" not in said(folder).read_text()
        assert contents(folder) == before
