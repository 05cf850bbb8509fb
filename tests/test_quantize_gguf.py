"""Quantizing: every type we offer is built by llama.cpp, and those we refuse are those that it refuses."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import pytest
from quantize_gguf import quantize_gguf

from lib.gguf_file import GgufError, gguf_value, open_gguf
from lib.llama_cpp import LlamaCpp
from lib.manifest import ManifestError
from lib.process import ProgramError
from lib.quant_types import BITS_PER_WEIGHT, BUILDABLE_TYPES, NEED_IMATRIX

pytestmark = pytest.mark.slow


def quantize(llama_cpp: LlamaCpp, built: Path, quant: str, output: Path, *, threads: int = 2) -> dict[str, object]:
    source = built / "models/tiny.f16.gguf"
    return quantize_gguf(source=source, quant=quant, output=output, llama_cpp=llama_cpp, threads=threads)


@pytest.mark.parametrize("quant", BUILDABLE_TYPES)
def test_type_is_built_and_reopened(quant: str, built: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    output = tmp_path / f"tiny.{quant}.gguf"
    manifest = quantize(llama_cpp, built, quant, output)
    reader = open_gguf(output)
    assert len(reader.tensors) == 21
    assert gguf_value(reader, "general.name") == "tiny"
    assert manifest["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [output.name, f"{output.name}.json"]


@pytest.mark.parametrize("quant", sorted(NEED_IMATRIX))
def test_type_that_needs_a_matrix_is_refused_by_llama_cpp(
    quant: str, built: Path, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    with pytest.raises(ProgramError, match=r"(?i)imatrix|importance matrix"):
        quantize(llama_cpp, built, quant, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_every_type_is_one_that_llama_quantize_lists(llama_cpp: LlamaCpp) -> None:
    shown = subprocess.run([llama_cpp.tool("llama-quantize"), "--help"], capture_output=True, text=True)
    listed = {name.lower() for name in re.findall(r"^\s+\d+\s+or\s+(\w+)", shown.stdout + shown.stderr, re.MULTILINE)}
    assert set(BITS_PER_WEIGHT) - {"f32"} <= listed


def test_bytes_do_not_depend_on_threads(built: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    results = {
        quantize(llama_cpp, built, "q4_k_m", tmp_path / f"{threads}.gguf", threads=threads)["sha256"]
        for threads in (1, 2, 5)
    }
    assert len(results) == 1


def test_source_that_was_cut_off_is_refused(built: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    for name in ("tiny.f16.gguf", "tiny.f16.gguf.json"):
        (tmp_path / name).write_bytes((built / "models" / name).read_bytes())
    with (tmp_path / "tiny.f16.gguf").open("r+b") as file:
        file.truncate(1_000_000)
    output = tmp_path / "out.gguf"
    with pytest.raises(ManifestError, match="1000000 bytes, expected"):
        quantize_gguf(source=tmp_path / "tiny.f16.gguf", quant="q8_0", output=output, llama_cpp=llama_cpp, threads=1)
    assert not output.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda data: data[:-100_000], "cut off"), (lambda data: b"\0\0\0\0" + data[4:], "no GGUF file")],
    ids=["short", "zero magic"],
)
def test_damaged_files_do_not_open(damage: object, message: str, built: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage((built / "models/tiny.q4_k_m.gguf").read_bytes()))
    with pytest.raises(GgufError, match=message):
        open_gguf(path)
