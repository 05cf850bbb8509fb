"""What every script shares: exit statuses, errors without tracebacks, common options."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_disk import small_disk

from lib import cli
from lib.cli import describe_os_error, script_parser, usable_cores

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
FRAME = """
import errno, os, signal
from pathlib import Path
from lib.cli import UsageError, run_script, script_parser
from lib.errors import ModelmillError

def work(arguments):
    {work}

parser = script_parser("Does something.")
parser.add_argument("--output", type=Path)
run_script(parser, work)
"""


def run(folder: Path, work: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a script of ours whose work is the given statement."""
    script = folder / "do_it.py"
    script.write_text(FRAME.format(work=work))
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    return subprocess.run([sys.executable, script, *options], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("work", "status", "said"),
    [
        ("pass", 0, ""),
        ("raise ModelmillError('x: found 1, expected 2')", 1, "do_it.py: x: found 1, expected 2\n"),
        ("raise ModelmillError('a:\\n  b\\n  c')", 1, "do_it.py: a:\n  b\n  c\n"),
        ("raise UsageError('give one of --a and --b')", 2, "do_it.py: give one of --a and --b\n"),
        ("raise KeyboardInterrupt", 130, "do_it.py: interrupted; nothing unfinished has a final name\n"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 130, "do_it.py: interrupted"),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "do_it.py: interrupted"),
        ("raise MemoryError", 1, "do_it.py: out of memory\n"),
        ("raise OSError(errno.ENOSPC, 'No space left on device', 'w.bin')", 1, "the disk is full (writing w.bin)"),
        ("raise OSError(errno.ENOSPC, 'No space left on device')", 1, "the disk is full"),
        ("open('/nowhere/at-all')", 1, "do_it.py: /nowhere/at-all: No such file or directory\n"),
        ("open(os.getcwd(), 'w')", 1, "Is a directory"),
        (
            "{}['lost']",
            1,
            "do_it.py: internal error: KeyError: 'lost' (details in a log: run it again with --log FILE)\n",
        ),
        ("raise ValueError('odd') from OSError('inner')", 1, "internal error: ValueError: odd"),
    ],
)
def test_status_and_message(work: str, status: int, said: str, tmp_path: Path) -> None:
    done = run(tmp_path, work)
    assert done.returncode == status
    assert said in done.stderr
    assert bool(said) == bool(done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_fault_of_ours_is_explained_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "x.log"
    done = run(tmp_path, "1 / 0", "--log", str(log))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(log) in done.stderr
    assert "Traceback (most recent call last)" in log.read_text()
    assert "ZeroDivisionError" in log.read_text()


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run(tmp_path, "pass", "--log", str(tmp_path / "file" / "x.log"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(tmp_path / "file") in done.stderr


@pytest.mark.parametrize("options", [["--thread", "2"], ["--threads", "0"], ["--threads", "two"], ["surplus"]])
def test_wrong_use(options: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, "pass", *options)
    assert done.returncode == 2
    assert options[0].lstrip("-")[:6] in done.stderr
    assert "Traceback" not in done.stderr
    assert "_positive" not in done.stderr, "the name of a function tells the user nothing"


def test_help(tmp_path: Path) -> None:
    done = run(tmp_path, "pass", "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("Does something.", "--log", "--threads"))


def test_no_script_imports_torch_before_it_is_needed() -> None:
    """That takes seconds; a wrong option is told of before them."""
    names = sorted(path.stem for path in SCRIPTS.glob("*.py"))
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name, "torch" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == [f"{name} False" for name in names], done.stderr


def test_threads_can_be_left_out() -> None:
    assert "threads" not in vars(script_parser("x", threads=False).parse_args([]))
    assert script_parser("x").parse_args([]).threads == usable_cores()


@pytest.mark.parametrize(
    ("cores", "slurm", "usable"), [(8, None, 8), (8, "3", 3), (2, "64", 2), (8, "", 8), (8, "x", 8)]
)
def test_usable_cores(cores: int, slurm: str | None, usable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(cli, "Path", lambda _: Path("/nowhere"))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    if slurm is not None:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
    assert usable_cores() == usable


@pytest.mark.parametrize(
    ("quota", "usable"), [("max 100000\n", 8), ("250000 100000\n", 2), ("50000 100000\n", 1), ("1600000 100000\n", 8)]
)
def test_a_containers_quota_counts(quota: str, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cli, "Path", lambda _: tmp_path / "cpu.max")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert usable_cores() == usable


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_a_way_out(number: int) -> None:
    said = describe_os_error(OSError(number, os.strerror(number), "models/x.gguf"))
    assert "models/x.gguf" in said
    assert "free some space and run the same command again" in said


def test_signals_are_as_python_knows_them() -> None:
    """130 is what a shell reports for SIGINT."""
    assert cli.INTERRUPTED == 128 + signal.SIGINT


def test_a_full_disk_is_never_said_of_the_file_that_was_read() -> None:
    copied = OSError(errno.ENOSPC, "No space left on device", "bases/m/LICENSE", None, "models/m/LICENSE")
    assert "(writing models/m/LICENSE)" in describe_os_error(copied)
    assert "bases/m" not in describe_os_error(copied)


def test_a_full_disk_without_a_known_file(tmp_path: Path) -> None:
    """What is free for the output tells the user whether that is the disk."""
    unknown = OSError(errno.ENOSPC, "No space left on device")
    said = describe_os_error(unknown, output=tmp_path / "not/there/yet")
    assert re.search(rf"the disk is full \([\d.]+ MB are free now for {tmp_path}/not/there/yet\)", said)
    assert "writing" not in describe_os_error(unknown)


def test_other_errors_name_what_is_known() -> None:
    assert describe_os_error(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert describe_os_error(OSError(errno.EIO, "Input/output error", "a", None, "b")) == "a → b: Input/output error"
    assert describe_os_error(OSError("of a library")) == "of a library"


@pytest.mark.parametrize("log", ["full/x.log", "x.log"])
@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("import shutil; shutil.copyfile('source', 'full/copy')", "(writing full/copy)"),
        ("open('full/out', 'wb').write(bytes(1 << 21))", "MB are free now for full/out)"),
        (
            "import numpy, safetensors.numpy as tensors; tensors.save_file({'a': numpy.zeros(1 << 19)}, 'full/out')",
            "MB are free now for full/out)",
        ),
    ],
)
def test_a_disk_that_is_full(work: str, said: str, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log may lie there as well: then the message is on the screen alone, without a fault of logging's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").write_bytes(bytes(1 << 21))
    with small_disk(tmp_path / "full"):
        done = run(tmp_path, work, "--log", log, "--output", "full/out")
    assert done.returncode == 1
    assert said in done.stderr
    assert "source" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
