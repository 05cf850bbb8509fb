"""Shared fixtures: the pinned llama.cpp, the tiny model's folder, and its whole chain built once."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from lib.cli import usable_cores
from lib.config import schema
from lib.llama_cpp import TOOLS, LlamaCpp, provide_llama_cpp

pytest_plugins = ["hub_model", "slurm_cluster", "tiny_chain", "tiny_gguf"]
# Before torch is imported: threads that spin while they wait made training 14 times slower on two cores of load 6.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A shell that starts pytest in the background lets it ignore SIGINT, and so would every program that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
# What takes minutes, the longest first: begun last, one of these would leave the other cores idle.
LONGEST = ("build_direct", "coming_from", "crashes", "heatmap_chain", "slurm", "faults", "import_adapter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    begun = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: begun.get(item.path.stem, len(begun)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """
    What runs in one process when the tests run in several: a file, and all files about the one GPU.

    pytest-xdist's own groups (`--dist loadgroup`) are void under pytest 9.2 (its issue 1386): every test went to
    whichever process was free, and what the tests of a file share was built in each.
    """
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "gpu" if "/test_gpu_" in file else file

    config.option.loadscopereorder = False  # the order of LONGEST, not by numbers of tests
    return Files(config, log) if config.option.dist == "loadfile" else None


@pytest.fixture(scope="session")
def llama_cpp() -> LlamaCpp:
    """The pinned llama.cpp, built into the user's cache if it is not there."""
    pinned = {key: rule["default"] for key, rule in schema()["properties"]["llama_cpp"]["properties"].items()}
    return provide_llama_cpp(
        version=pinned["version"],
        sha256=pinned["sha256"],
        commit=pinned["commit"],
        cmake_flags=(),
        threads=usable_cores(),
        tools=(*TOOLS, "llama-imatrix", "llama-perplexity", "llama-tokenize"),
    )


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one of the processes makes, in which pytest runs the tests, and that all of them use."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / f"made-once-{name}"
    with folder.with_name(f"{folder.name}.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():
            shutil.rmtree(folder, ignore_errors=True)  # of a process in which it failed
            folder.mkdir()
            make(folder)
            lock.write("made")
    return folder


def run_snakemake(
    folder: Path, *arguments: str, checkout: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the workflow of a checkout in another folder, with the config.yaml that lies there."""
    command = [sys.executable, "-m", "snakemake", "-s", str(checkout / "Snakefile"), "--directory", str(folder)]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=folder, env={**os.environ, **(environment or {})}
    )


def planned_rules(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The rules that a dry run would run, by its table of jobs; `all` is no work."""
    assert done.returncode == 0, done.stderr
    output = done.stdout + done.stderr
    if "Nothing to be done" in output:
        return set()
    table = output.partition("Job stats:\n")[2].partition("\ntotal")[0].splitlines()[2:]
    return {line.split()[0] for line in table} - {"all"}


def copy_checkout(target: Path) -> Path:
    """The parts of this checkout that the workflow is made of, to be edited."""
    for name in ("rules", "scripts", "schemas", "profiles", "envs", "report"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Snakefile", "README.md", "requirements.txt"):
        shutil.copy2(ROOT / name, target / name)
    return target


def write_project(folder: Path, *, base: Path, **changes: object) -> Path:
    """A folder with data and a config.yaml for the model `tiny`; `changes` replace top-level keys."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_data(folder / "train.jsonl")
    (folder / "ask.jsonl").write_text('{"question": "What builds the model?", "expect": [["snakemake"]]}\n')
    config = {
        "models": {
            "tiny": {
                "base": {"path": str(base)},
                "adapter": {"train": tiny.TRAIN},
                "merge": {"max_shard_size": 1},
                "quantize": {"path": "staged"},
                "ollama": {"system": "答えは短く。", "parameters": {"temperature": 0.5, "stop": ["END"]}},
                "smoke": {"questions": "ask.jsonl", "min_gain": 0, "max_tokens": 8},
            }
        },
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base checkpoint."""
    return made_once(tmp_path_factory, "base", lambda place: tiny.write_tiny_base(place / "tiny-llama")) / "tiny-llama"


@pytest.fixture
def project(tmp_path: Path, tiny_base: Path) -> Path:
    """A folder in which the tiny model is configured and nothing is built."""
    return write_project(tmp_path / "project", base=tiny_base)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, llama_cpp: LlamaCpp) -> Path:
    """
    A folder in which the tiny model's whole chain was built by Snakemake, beside a copy of the checkout.

    Tests copy it with `copy_built`; none changes it.
    """

    def make(place: Path) -> None:
        folder = write_project(place / "project", base=tiny_base)
        checkout = copy_checkout(place / "checkout")
        done = run_snakemake(folder, "-j1", "all", "reports/tiny.smoke.json", checkout=checkout)
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "built", make) / "project"


def copy_built(built: Path, target: Path) -> tuple[Path, Path]:
    """Copies of the built folder and of its checkout, times included, and at the same relative place."""
    shutil.copytree(built.parent, target)
    return target / "project", target / "checkout"
