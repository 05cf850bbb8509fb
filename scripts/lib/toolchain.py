"""What compiled things depend on, the compiler and the CPU, and where they are kept."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from lib.errors import ModelmillError


class CompilerError(ModelmillError):
    """There is no C++ compiler."""


def compiler() -> list[str]:
    """
    The words of the C++ compiler's command: CXX, as in "g++ -O2" or "ccache g++", else c++.

    Raises:
        CompilerError: CXX is no command line.
    """
    chosen = os.environ.get("CXX", "").strip() or "c++"
    try:
        return shlex.split(chosen)
    except ValueError as error:
        raise CompilerError(_no_compiler(chosen)) from error


def describe_compiler() -> str:
    """
    The compiler's version, and the words that follow the first in CXX.

    Raises:
        CompilerError: it is not there.
    """
    command = compiler()
    try:
        shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompilerError(_no_compiler(" ".join(command))) from error
    return " ".join([shown.partition("\n")[0], *command[1:]])


def _no_compiler(chosen: str) -> str:
    return (
        f"no C++ compiler ({chosen}) to build llama.cpp with; install one (Debian: apt install g++), "
        "set the variable CXX to one, or set llama_cpp.path to a build of your own"
    )


def cpu_features() -> list[str]:
    """The CPU's instruction sets, by which `-march=native` compiles; empty where the system does not list them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    listed = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return sorted(listed[0]) if listed else []


def cache_folder() -> Path:
    """Where builds are kept: $MODELMILL_CACHE, or modelmill in the user's cache folder. It may be deleted."""
    if chosen := os.environ.get("MODELMILL_CACHE"):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelmill"
