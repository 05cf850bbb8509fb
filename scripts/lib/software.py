"""What is installed of the programs and packages that the steps use, and whether it works on this machine."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lib.jsonfile import read_json
from lib.llama_cpp import LlamaCpp, LlamaCppError, find_llama_cpp, use_llama_cpp
from lib.spec import LlamaCpp as ChosenLlamaCpp
from lib.toolchain import CompilerError, describe_compiler

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
SECONDS = 120.0
# In a process of its own, which a kernel that is not for this device may end.
QUANTIZED_LAYERS = """
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
device = "cuda" if torch.cuda.is_available() else "cpu"
for layer in (Linear4bit(64, 64, compute_dtype=torch.float32), Linear8bitLt(64, 64, has_fp16_weights=False)):
    assert torch.isfinite(layer.to(device)(torch.ones(2, 64, device=device))).all(), layer
print(f"works on {torch.cuda.get_device_name() if device == 'cuda' else 'the CPU'}")
"""


@dataclass(frozen=True)
class Finding:
    """What was found of a program; `works` is false where a step that needs it would fail."""

    text: str
    works: bool = True


@dataclass(frozen=True)
class Software:
    """
    What is installed here.

    Attributes:
        compiler, llama_cpp, bitsandbytes, packages: as they were found.
        architectures: those that llama.cpp converts, as in "Qwen2ForCausalLM"; None while it is not here.
    """

    compiler: Finding
    llama_cpp: Finding
    bitsandbytes: Finding
    packages: Finding
    architectures: frozenset[str] | None


def this_software(chosen: ChosenLlamaCpp) -> Software:
    """Look at the programs and packages; takes seconds, since bitsandbytes and llama.cpp's converter are run."""
    try:
        compiler = Finding(describe_compiler())
    except CompilerError as error:
        return Software(Finding(f"none: {error}", False), Finding("no compiler", False), *_of_python(), None)
    llama_cpp, architectures = _look_at_llama_cpp(chosen)
    return Software(compiler, llama_cpp, *_of_python(), architectures)


def architecture_of(checkpoint: Path) -> str | None:
    """The architecture that a checkpoint's config.json names; None if there is none yet."""
    config = checkpoint / "config.json"
    named = read_json(config).get("architectures") if config.is_file() else None
    return named[0] if named else None


def _of_python() -> tuple[Finding, Finding]:
    return _run_bitsandbytes(), _compare_packages()


def _look_at_llama_cpp(chosen: ChosenLlamaCpp) -> tuple[Finding, frozenset[str] | None]:
    try:
        found = use_llama_cpp(Path(chosen.path)) if chosen.path else _pinned(chosen)
    except LlamaCppError as error:
        return Finding(str(error), False), None
    if found is None:
        return Finding(f"{chosen.commit}, not built yet; that takes some minutes, once"), None
    built = "built" if (found.programs / "llama-quantize").is_file() else "not built yet"
    command = [sys.executable, str(found.convert_script), "--print-supported-models"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    texts = (done.stdout + done.stderr).partition("MMPROJ")[0]
    architectures = frozenset(re.findall(r"^\s*- (\w+)\s*$", texts, re.MULTILINE))
    if done.returncode or not architectures:
        return Finding(f"{found.commit}, {built}; its converter does not run: {_last_line(done.stderr)}", False), None
    return Finding(f"{found.commit}, {built}; converts {len(architectures)} architectures"), architectures


def _pinned(chosen: ChosenLlamaCpp) -> LlamaCpp | None:
    return find_llama_cpp(sha256=chosen.sha256, commit=chosen.commit, cmake_flags=chosen.cmake_flags)


def _run_bitsandbytes() -> Finding:
    """Put something through a layer of 4 bits and one of 8."""
    version = _installed("bitsandbytes")
    if version is None:
        return Finding("not installed", False)
    try:
        done = subprocess.run([sys.executable, "-c", QUANTIZED_LAYERS], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Finding(f"{version}, does not answer within {SECONDS:.0f} s", False)
    if done.returncode:
        return Finding(f"{version}, does not work here: {_last_line(done.stderr)}", False)
    return Finding(f"{version}, {done.stdout.strip()}")


def _compare_packages() -> Finding:
    """Installed packages beside those that requirements.txt pins; a local version (+cpu) is none of the pin's."""
    pinned = dict(line.split("==") for line in _lines(REQUIREMENTS))
    found = {name: _installed(name) for name in pinned}
    others = [f"{name} {found[name] or 'missing'}" for name, version in pinned.items() if found[name] != version]
    if others:
        return Finding(f"not as in requirements.txt: {', '.join(others)}", all(found.values()))
    return Finding(f"all {len(pinned)} as in requirements.txt")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _lines(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if text := line.partition("#")[0].strip():
            yield text


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it printed nothing"])[-1]
