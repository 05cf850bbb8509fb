"""The sum over the rank: the compiled loop and torch's operations against float32 arithmetic one step at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_merge import random

from lib import fold, toolchain
from lib.fold import add_by_torch, add_products, compiled_loop, load_loop
from lib.toolchain import EXACT_FLAGS

SHAPES = [(1, 1, 1), (3, 5, 2), (7, 255, 4), (5, 256, 16), (33, 700, 13), (2, 1025, 0), (300, 64, 64)]


def step_by_step(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """numpy's elementwise float32, which rounds each product and each sum."""
    result, factors, rows = total.numpy().copy(), left.numpy(), right.numpy()
    for k in range(factors.shape[1]):
        result = result + factors[:, k : k + 1] * rows[k]
    return result


def parts(rows: int, columns: int, ranks: int, *, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    return (
        random(rows, columns, seed=1) * scale,
        random(rows, ranks, seed=2) * scale,
        random(ranks, columns, seed=3) * scale,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e15], ids=["usual", "subnormal", "overflowing"])
def test_both_ways_are_the_definition(shape: tuple[int, int, int], scale: float) -> None:
    total, left, right = parts(*shape, scale=scale)
    with np.errstate(all="ignore"):
        expected = step_by_step(total, left, right)
    assert compiled_loop() is not None
    for way in (add_products, add_by_torch):
        found = total.clone()
        way(found, left, right)
        assert np.array_equal(found.numpy().view(np.int32), expected.view(np.int32)), way.__name__


@pytest.mark.parametrize("march", ["-march=x86-64", "-march=x86-64-v3", "-O0"])
def test_instruction_sets_change_no_bit(march: str) -> None:
    if os.uname().machine != "x86_64" and march.startswith("-march"):
        pytest.skip("these are instruction sets of x86-64")
    loop = compiled_loop((*EXACT_FLAGS, march))
    assert loop is not None and loop is not compiled_loop()
    total, left, right = parts(37, 1000, 19)
    found = total.clone()
    loop(found.data_ptr(), left.data_ptr(), right.data_ptr(), 37, 1000, 19)
    assert np.array_equal(found.numpy().view(np.int32), step_by_step(total, left, right).view(np.int32))


@pytest.mark.parametrize("tile", [1, 700, 5000])
def test_tiles_change_no_bit(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "TILE_VALUES", tile)
    total, left, right = parts(33, 700, 13)
    found = total.clone()
    add_by_torch(found, left, right)
    assert np.array_equal(found.numpy(), step_by_step(total, left, right))


def test_factors_that_do_not_lie_in_rows() -> None:
    total, left, right = parts(20, 30, 6)
    found = total.clone()
    add_products(found, left.t().contiguous().t(), right.t().contiguous().t())
    assert np.array_equal(found.numpy(), step_by_step(total, left, right))


def test_without_a_compiler_it_is_slower_and_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    said: list[str] = []
    monkeypatch.setattr(fold, "note", said.append)
    load_loop.cache_clear()
    try:
        total, left, right = parts(33, 700, 13)
        found = total.clone()
        add_products(found, left, right)
    finally:
        load_loop.cache_clear()
    assert np.array_equal(found.numpy(), step_by_step(total, left, right))
    assert len(said) == 1 and "no C++ compiler (no-such-compiler)" in said[0]


def test_several_threads_compile_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMILL_CACHE", str(tmp_path))
    compiled, compile_it = [], toolchain._compile
    monkeypatch.setattr(toolchain, "_compile", lambda *given: (compiled.append(given), compile_it(*given)))
    load_loop.cache_clear()
    try:
        with ThreadPoolExecutor(8) as pool:
            loops = list(pool.map(lambda _: compiled_loop(), range(8)))
    finally:
        load_loop.cache_clear()
    assert len(compiled) == 1 and None not in loops


def test_several_processes_compile_it_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts"), "MODELMILL_CACHE": str(tmp_path)}
    code = "from lib.fold import compiled_loop; assert compiled_loop() is not None"
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert [path.suffix for path in (tmp_path / "fold").iterdir()] == [".so"]
