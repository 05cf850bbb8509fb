"""The compiler, what its results depend on beside it, and where they are kept."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from lib.errors import ModelmillError
from lib.jsonfile import digest_json

# For loops whose bits are defined: no contraction of a product and a sum into one rounding, and no other order of
# operations, whatever CXX says.
EXACT_FLAGS = ("-O3", "-march=native", "-fno-fast-math", "-ffp-contract=off", "-shared", "-fPIC")


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


def compiled_library(name: str, sources: Mapping[str, str], flags: Sequence[str]) -> ctypes.CDLL:
    """
    Compile a library of our own if the cache does not hold it, and load it.

    Args:
        name: of its folder in the cache.
        sources: texts by file name; the first is the one that is compiled.

    Raises:
        CompilerError: there is no compiler, or it cannot compile this.
        OSError: the cache cannot be written, or the library not loaded.
    """
    key = digest_json([dict(sources), list(flags), describe_compiler(), cpu_features()])[:16]
    library = cache_folder() / name / f"{key}.so"
    if not library.is_file():
        _compile(library, sources, flags)
    return ctypes.CDLL(str(library))


def _compile(library: Path, sources: Mapping[str, str], flags: Sequence[str]) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=library.parent) as folder:
        for name, text in sources.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        built = Path(folder, library.name)
        command = [*compiler(), *flags, Path(folder, next(iter(sources))), "-o", built]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except subprocess.CalledProcessError as error:
            raise CompilerError(error.stderr) from error
        os.replace(built, library)  # whole or not at all, also with several at once


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
