"""Quantizing: every type we offer is built by llama.cpp, and those we refuse are those that it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from quantize_gguf import quantize_gguf

from lib.gguf_file import GgufError, count_types, read_gguf
from lib.llama_cpp import LlamaCpp
from lib.manifest import ManifestError
from lib.process import ProgramError
from lib.quant_types import BITS_PER_WEIGHT, BUILDABLE_TYPES, NEED_IMATRIX
from lib.tensor_types import TensorTypeError, TensorTypes

pytestmark = pytest.mark.slow

MIXTURE = TensorTypes(
    pure=False, leave_output_tensor=False, output_tensor_type=None, token_embedding_type=None, tensor_type={}
)


def quantize(
    llama_cpp: LlamaCpp,
    built: Path,
    quant: str,
    output: Path,
    *,
    imatrix: Path | None = None,
    threads: int = 2,
    **tensor_types: object,
) -> dict[str, object]:
    return quantize_gguf(
        source=built / "models/tiny.f16.gguf",
        quant=quant,
        tensor_types=dataclasses.replace(MIXTURE, **tensor_types),
        imatrix=imatrix,
        output=output,
        llama_cpp=llama_cpp,
        threads=threads,
    )


def copied(llama_cpp: LlamaCpp, path: Path) -> bytes:
    """What `llama-quantize … COPY`, which Ollama's server does, makes of a file."""
    copy = path.with_suffix(".copy")
    subprocess.run([llama_cpp.tool("llama-quantize"), path, copy, "COPY"], capture_output=True, check=True)
    return copy.read_bytes()


@pytest.mark.parametrize("quant", BUILDABLE_TYPES)
def test_type_is_built_and_reopened(quant: str, built: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    output = tmp_path / f"tiny.{quant}.gguf"
    manifest = quantize(llama_cpp, built, quant, output)
    found = read_gguf(output)
    assert len(found.tensors) == 21
    assert found.metadata.get("general.name") == "tiny"
    assert manifest["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [output.name, f"{output.name}.json"]
    assert copied(llama_cpp, output) == output.read_bytes()


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
    (tmp_path / "models").mkdir()
    for name in ("tiny.f16.gguf", "tiny.f16.gguf.json"):
        (tmp_path / "models" / name).write_bytes((built / "models" / name).read_bytes())
    with (tmp_path / "models/tiny.f16.gguf").open("r+b") as file:
        file.truncate(1_000_000)
    output = tmp_path / "out.gguf"
    with pytest.raises(ManifestError, match="1000000 bytes, expected"):
        quantize(llama_cpp, tmp_path, "q8_0", output)
    assert not output.exists()


# What llama.cpp's mixture gives the tiny model's tensors of several kinds, and what the settings change in it.
KINDS = ("token_embd", "output", "blk.0.attn_q", "blk.0.attn_v", "blk.1.ffn_down")
CHOSEN = {
    "nothing": ({}, ["Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K"]),
    "pure": ({"pure": True}, ["Q4_K"] * 5),
    "leave_output_tensor": ({"leave_output_tensor": True}, ["Q4_K", "F16", "Q4_K", "Q4_K", "Q6_K"]),
    "output_tensor_type": ({"output_tensor_type": "q8_0"}, ["Q4_K", "Q8_0", "Q4_K", "Q4_K", "Q6_K"]),
    "token_embedding_type": ({"token_embedding_type": "bf16"}, ["BF16", "Q6_K", "Q4_K", "Q4_K", "Q6_K"]),
    "tensor_type": (
        {"tensor_type": {r"attn_(v|k)": "q5_0", r"blk\.0\.attn": "f32", "attn": "q3_k"}},
        ["Q4_K", "Q6_K", "F32", "Q5_0", "Q6_K"],
    ),
    "pure with other tensors": (
        {"pure": True, "token_embedding_type": "q8_0", "tensor_type": {"ffn_down": "iq4_xs"}},
        ["Q8_0", "Q4_K", "Q4_K", "Q4_K", "IQ4_XS"],
    ),
}


@pytest.mark.parametrize("setting", CHOSEN)
def test_settings_choose_the_types_of_tensors(setting: str, built: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    changes, expected = CHOSEN[setting]
    manifest = quantize(llama_cpp, built, "q4_k_m", tmp_path / "out.gguf", **changes)
    found = {tensor.name: tensor.type for tensor in read_gguf(tmp_path / "out.gguf").tensors}
    assert [found[f"{kind}.weight"] for kind in KINDS] == expected
    assert manifest["origin"]["tensor_types"] == dataclasses.asdict(dataclasses.replace(MIXTURE, **changes))
    assert copied(llama_cpp, tmp_path / "out.gguf") == (tmp_path / "out.gguf").read_bytes()


def test_a_pattern_that_matches_no_tensor_is_refused_first(built: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    with pytest.raises(TensorTypeError, match="'q_proj'.*\n  blk.0.attn_k.weight"):
        quantize(llama_cpp, built, "q4_k_m", tmp_path / "out.gguf", tensor_type={"q_proj": "q8_0", "attn_q": "q8_0"})
    assert list(tmp_path.iterdir()) == []


def test_settings_are_options_of_the_script(built: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    command = [sys.executable, ROOT / "scripts/quantize_gguf.py", "--source", built / "models/tiny.f16.gguf"]
    command += ["--output", output, "--pure", "--output-tensor-type", "q8_0", "--tensor-type", '{"attn_v": "f16"}']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert count_types(read_gguf(output)) == {"F16": 2, "F32": 5, "Q4_K": 13, "Q8_0": 1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tensor-type", '{"attn_(v": "q8_0"}'], "--tensor-type: 'attn_(v' is no valid regular expression"),
        (["--tensor-type", '{"attn_v": "q8"}'], "attn_v: 'q8' is none of"),
        (["--output-tensor-type", "q8"], "--output-tensor-type: invalid choice: 'q8'"),
    ],
)
def test_wrong_options_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts/quantize_gguf.py", "--source", "x.gguf", "--output", "y.gguf", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda data: data[:-100_000], "cut off"), (lambda data: b"\0\0\0\0" + data[4:], "no GGUF file")],
    ids=["short", "zero magic"],
)
def test_damaged_files_do_not_open(damage: object, message: str, built: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage((built / "models/tiny.q4_k_m.gguf").read_bytes()))
    with pytest.raises(GgufError, match=message):
        read_gguf(path)
