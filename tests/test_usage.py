"""What a step takes: seen of its process and its programs, and read back from its log."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT

from lib.usage import Meter, Usage, read_usage

MB = 10**6
PROGRAM = """
import resource, subprocess, sys, time
sys.path.insert(0, {scripts!r})
from lib import usage
usage.SECONDS = {every}
with usage.Meter() as meter:
    {work}
print(meter.read().ram, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""
CHILD = "import time; held = bytearray(b'x') * {size}; time.sleep({seconds})"


def measure(work: str, *, every: float = 0.05) -> tuple[int, int]:
    """Bytes that a meter saw of a Python that does this, and the largest of its programs by the kernel."""
    program = PROGRAM.format(scripts=str(ROOT / "scripts"), every=every, work=work)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seen, largest = map(int, done.stdout.split())
    return seen, largest


def test_a_peak_between_two_looks_is_seen() -> None:
    seen, _ = measure("held = bytearray(b'x') * (300 * 10**6); del held", every=60)
    assert 300 * MB <= seen < 350 * MB


def test_programs_that_run_together_are_added_up() -> None:
    child = CHILD.format(size=100 * MB, seconds=1.5)
    start = f'subprocess.Popen([sys.executable, "-c", {child!r}])'
    seen, largest = measure(f"both = [{start}, {start}]; [each.wait() for each in both]")
    assert 100 * MB <= largest < 150 * MB
    assert 200 * MB <= seen < 2 * largest + 60 * MB


def test_programs_of_programs_count() -> None:
    child = CHILD.format(size=100 * MB, seconds=0.5)
    seen, _ = measure(f'subprocess.run(["sh", "-c", "$0 -c \\"$1\\"; true", sys.executable, {child!r}])')
    assert 100 * MB <= seen < 200 * MB


def test_programs_that_end_while_they_are_looked_at() -> None:
    """Nothing that `/proc` no longer holds may end a step: one look in a hundred meets such a program here."""
    with ThreadPoolExecutor() as others:
        ended = others.submit(lambda: [subprocess.run(["true"], check=True) for _ in range(1000)])
        looks = 0
        while not ended.done():
            assert Meter().read().ram > MB
            looks += 1
    assert looks > 100


@pytest.mark.gpu
def test_what_pytorch_holds_on_a_gpu() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU on this machine")
    with Meter() as meter:
        held = torch.zeros(10**8, dtype=torch.uint8, device="cuda")
        del held
    assert len(meter.read().gpus) == torch.cuda.device_count()
    assert max(meter.read().gpus) >= 10**8


@pytest.mark.parametrize(
    "usage", [Usage(0.4, 24 * MB), Usage(3601.5, 123_456 * MB, (19_100 * MB, 2 * MB)), Usage(2.0, MB, (0,))]
)
def test_what_is_written_is_read(usage: Usage, tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text(f"2026-01-02 03:04:05 モデル written\n2026-01-02 03:04:06 {usage}\n", encoding="utf-8")
    assert read_usage(log) == usage


@pytest.mark.parametrize("text", ["", "\n", "wrote it\n", "used 1.0 s, at most 2 MB of memory\nfailed\n", "used x s\n"])
def test_a_log_without_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text(text)
    assert read_usage(tmp_path / "x.log") is None
    assert read_usage(tmp_path / "y.log") is None


@pytest.mark.parametrize(("data", "status"), [('{"text": "a"}\n', 0), ("no json\n", 1)])
def test_a_script_that_succeeds_ends_its_log_with_it(data: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(data)
    command = [sys.executable, str(ROOT / "scripts/check_data.py"), "--data", "data.jsonl", "--output", "o.json"]
    done = subprocess.run([*command, "--log", "x.log"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status
    found = read_usage(tmp_path / "x.log")
    assert (found is not None) == (status == 0)
    assert found is None or (10 * MB < found.ram < 200 * MB and found.seconds < 60)
    assert "at most" not in done.stderr
