"""Scripts in processes of their own that need not import torch and transformers anew: 8 s less each."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
# Imported, not used: OpenMP's threads, once there are any, do not survive a fork.
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.utils.tensorboard",
        "transformers.trainer",
        "transformers.models.llama.modeling_llama",
        "transformers.models.llama.tokenization_llama",
        "peft",
        "bitsandbytes",
    ]
)
SECONDS = 120.0


@dataclass
class Script:
    """A script that runs, or has run."""

    process: Any
    output: Path

    @property
    def text(self) -> str:
        """What it wrote so far."""
        return self.output.read_text(encoding="utf-8")

    def wait_for(self, what: Callable[[], Any]) -> Any:
        """Wait until something is there."""
        end = time.monotonic() + SECONDS
        while not (found := what()):
            assert self.process.is_alive(), f"ended with {self.process.exitcode}: {self.text}"
            assert time.monotonic() < end, self.text
            time.sleep(0.01)
        return found

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Wait for its end; returns the exit status, or that of the signal below 0."""
        self.process.join(SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running: {self.text}")
        return self.process.exitcode


def start_script(
    name: str, *arguments: str, output: Path, before: Callable[..., None] | None = None, **given: Any
) -> Script:
    """
    Start scripts/NAME with these arguments.

    Args:
        output: file that takes all it writes.
        before: a function of a test module, called with `given` in the new process before the script begins.
    """
    output.touch()
    process = CONTEXT.Process(target=_run, args=(name, arguments, str(output), before, given))
    process.start()
    return Script(process, output)


def run_script(name: str, *arguments: str, output: Path, **given: Any) -> tuple[int, str]:
    """Run scripts/NAME to its end; returns its exit status and what it wrote."""
    script = start_script(name, *arguments, output=output, **given)
    return script.wait(), script.text


def _run(name: str, arguments: tuple[str, ...], output: str, before: Any, given: dict[str, Any]) -> None:
    """In the new process: as `python scripts/NAME ARGUMENTS` does it."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before is not None:
        before(**given)
    path = ROOT / "scripts" / name
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")
