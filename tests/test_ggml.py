"""Quantizing rows: our loops give ggml's bytes, whatever the rows hold."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

import build_llama_cpp as build_llama_cpp_module
import pytest
import torch
from build_llama_cpp import build_llama_cpp

from lib import ggml as ggml_module
from lib.config import schema
from lib.ggml import PINNED_FINGERPRINT, Ggml, GgmlError
from lib.gguf_file import row_bytes
from lib.k_quants import FLAGS, TYPES, loops_by_type
from lib.llama_cpp import LlamaCpp

COLUMNS = 11 * 256
KEYS = ("version", "sha256", "commit")


def usual(values: torch.Tensor) -> torch.Tensor:
    return (values * 0.02).half().float()


def outliers(values: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.rand(values.shape) < 0.01, 100 * values, values).half().float()


def sparse(values: torch.Tensor) -> torch.Tensor:
    return values * (torch.rand(values.shape) < 0.03)


def one_signed(values: torch.Tensor) -> torch.Tensor:
    return values.abs() * torch.where(torch.rand(len(values), 1) < 0.5, 1, -1)


def constant(values: torch.Tensor) -> torch.Tensor:
    return values[:, :1].expand_as(values)


def mixed(values: torch.Tensor) -> torch.Tensor:
    return values * 10.0 ** torch.randint(-30, 30, values.shape)


ROWS = {
    "usual": usual,
    "outliers": outliers,
    "sparse": sparse,
    "one-signed": one_signed,
    "constant": constant,
    "zero": torch.zeros_like,
    "subnormal": lambda values: values * 1e-40,
    "tiny": lambda values: values * 1e-20,
    "large": lambda values: values * 1e18,
    "huge": lambda values: values * 1e37,
    "mixed": mixed,
}


@pytest.fixture(scope="module")
def ggml(llama_cpp: LlamaCpp) -> Ggml:
    return Ggml(llama_cpp)


@pytest.fixture(scope="module")
def reference(llama_cpp: LlamaCpp) -> Ggml:
    return Ggml(llama_cpp, own_loops=False)


def rows_of(sort: str, *, rows: int = 20) -> torch.Tensor:
    torch.manual_seed(len(sort))
    return ROWS[sort](torch.randn(rows, COLUMNS)).contiguous()


@pytest.mark.parametrize("matrix", [False, True], ids=["plain", "matrix"])
@pytest.mark.parametrize("sort", ROWS)
@pytest.mark.parametrize("kind", TYPES)
def test_loops_give_ggmls_bytes(kind: str, sort: str, matrix: bool, ggml: Ggml, reference: Ggml) -> None:
    assert kind in ggml._ways["cpu"]
    for rows in (1, 20):  # one super-block is left over, or none
        values = rows_of(sort, rows=rows)
        importance = torch.rand(COLUMNS) ** 4 if matrix else None
        found, expected = (each.quantize(values, kind, importance) for each in (ggml, reference))
        assert expected.numel() == row_bytes(kind, values.numel())
        assert torch.equal(found, expected)


@pytest.mark.parametrize("march", ["-march=x86-64", "-march=x86-64-v3", "-O1"])
def test_instruction_sets_change_no_byte(march: str, reference: Ggml) -> None:
    ways = loops_by_type((*FLAGS, march))
    values = rows_of("usual")
    for kind in TYPES:
        assert torch.equal(ways[kind](values, None), reference.quantize(values, kind))


def test_a_loop_that_gives_other_bytes_is_not_taken(
    llama_cpp: LlamaCpp, reference: Ggml, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = loops_by_type()
    said: list[str] = []
    monkeypatch.setattr(ggml_module, "note", said.append)
    monkeypatch.setattr(ggml_module, "loops_by_type", lambda: {**good, "Q5_K": good["Q4_K"]})
    chosen = Ggml(llama_cpp)
    assert chosen._ways["cpu"].keys() == {"Q4_K", "Q6_K"}
    assert len(said) == 1 and "Q5_K does not give llama.cpp's bytes" in said[0]
    values = rows_of("usual")
    assert torch.equal(chosen.quantize(values, "Q5_K"), reference.quantize(values, "Q5_K"))


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other processors may round otherwise")
def test_a_build_is_known_by_a_fixed_block(llama_cpp: LlamaCpp, reference: Ggml, tmp_path: Path) -> None:
    assert reference.fingerprint() == PINNED_FINGERPRINT
    chosen = {"llama_cpp_path": None, "llama_cpp_cmake_flag": [], "threads": 1, "output": tmp_path / "llama_cpp.json"}
    pinned = {f"llama_cpp_{key}": schema()["properties"]["llama_cpp"]["properties"][key]["default"] for key in KEYS}
    build_llama_cpp(argparse.Namespace(**chosen, **pinned))
    assert json.loads((tmp_path / "llama_cpp.json").read_text())["fingerprint"] == PINNED_FINGERPRINT


def test_a_build_of_other_bytes_is_told(llama_cpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(build_llama_cpp_module, "say", said.append)
    monkeypatch.setattr(ggml_module, "PINNED_FINGERPRINT", "0" * 64)
    assert build_llama_cpp_module._fingerprint(llama_cpp) == PINNED_FINGERPRINT
    static = dataclasses.replace(llama_cpp, programs=tmp_path)
    assert build_llama_cpp_module._fingerprint(static) is None
    assert "to other bytes than the pinned build" in said[0] and "was not tried on a fixed block" in said[1]


def test_a_build_without_shared_libraries_is_told(tmp_path: Path) -> None:
    with pytest.raises(GgmlError, match="needs a llama.cpp built with shared libraries"):
        Ggml(LlamaCpp(source=tmp_path, programs=tmp_path, commit="0"))


def test_scales_beyond_a_half_are_told(ggml: Ggml) -> None:
    values = torch.full((1, 256), 1e38)
    values[0, 0] = -1e38
    with pytest.raises(GgmlError, match=r"blk\.0\.x cannot be held in Q4_K"):
        ggml.check(ggml.quantize(values, "Q4_K"), "Q4_K", name="blk.0.x")
