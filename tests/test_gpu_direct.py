"""On a GPU: its kernels give ggml's bytes, and the direct path those of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_build_direct import directly, model  # noqa: F401
from test_ggml import COLUMNS, ROWS, rows_of
from test_merge import random

from lib.fold import add_by_torch, add_products, compiled_kernel
from lib.ggml import Ggml
from lib.k_quants import GPU_TYPES
from lib.llama_cpp import LlamaCpp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch finds none here"),
]


@pytest.fixture(scope="module")
def reference(llama_cpp: LlamaCpp) -> Ggml:
    return Ggml(llama_cpp, own_loops=False)


@pytest.fixture(scope="module")
def on_gpu(llama_cpp: LlamaCpp) -> Ggml:
    return Ggml(llama_cpp, device="cuda")


# Where the scales of a block stand in it; what is no number has another sign on a GPU, and the block is refused.
SCALES = {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "Q8_0": [0]}


def differing(found: torch.Tensor, expected: torch.Tensor, kind: str) -> int:
    """Blocks that are not the same, of those whose scales are numbers."""
    found, expected = (each.view(-1, GPU_TYPES[kind][1]) for each in (found, expected))
    valid = [
        torch.stack([blocks[:, at : at + 2].contiguous().view(torch.float16).isfinite()[:, 0] for at in SCALES[kind]])
        for blocks in (found, expected)
    ]
    both = valid[0].all(dim=0)
    assert torch.equal(both, valid[1].all(dim=0))
    return int((found != expected).any(dim=1)[both].sum())


@pytest.mark.parametrize("matrix", [False, True], ids=["plain", "matrix"])
@pytest.mark.parametrize("sort", ROWS)
@pytest.mark.parametrize("kind", GPU_TYPES)
def test_kernels_give_ggmls_bytes(kind: str, sort: str, matrix: bool, on_gpu: Ggml, reference: Ggml) -> None:
    assert on_gpu._ways["cuda"].keys() == GPU_TYPES.keys()
    for rows in (1, 300):
        values = rows_of(sort, rows=rows)
        importance = torch.rand(COLUMNS) ** 4 if matrix else None
        found = on_gpu.quantize(values.cuda(), kind, importance)
        assert differing(found, reference.quantize(values, kind, importance), kind) == 0


@pytest.mark.parametrize("kind", GPU_TYPES)
def test_millions_of_blocks(kind: str, on_gpu: Ggml) -> None:
    """Against the CPU's loops, which tests/test_ggml.py holds against ggml's."""
    torch.manual_seed(0)
    for scale in (1.0, 0.02, 1e-3):
        values = (torch.randn(32768, 8192) * scale).half().float()
        values[::7] *= torch.where(torch.rand(1, 8192) < 0.01, 30.0, 1.0)
        assert differing(on_gpu.quantize(values.cuda(), kind), by_threads(on_gpu, values, kind), kind) == 0


def by_threads(ggml: Ggml, values: torch.Tensor, kind: str) -> torch.Tensor:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:
        return torch.cat(list(pool.map(lambda rows: ggml.quantize(rows, kind), values.split(512))))


def test_the_sum_over_the_rank_is_that_of_torch() -> None:
    assert compiled_kernel() is not None
    for rows, columns, ranks in ((1, 1, 1), (33, 700, 13), (300, 5120, 64), (7, 255, 0)):
        shapes = ((rows, columns), (rows, ranks), (ranks, columns))
        total, left, right = (random(*shape, seed=1).cuda() for shape in shapes)
        found, expected = total.clone(), total.clone()
        add_products(found, left, right)
        add_by_torch(expected, left, right)
        assert torch.equal(found, expected)


def test_every_architecture_has_the_bytes_of_the_cpu(model: Path, llama_cpp: LlamaCpp) -> None:  # noqa: F811
    quants = ["q4_k_m", "q5_k_m", "q8_0"]
    assert directly(model, quants, llama_cpp, device="cuda") == directly(model, quants, llama_cpp)
