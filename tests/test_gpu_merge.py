"""The merge on a real GPU: the bytes of the CPU, and bitsandbytes' own codes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_adapter import merge_adapter
from test_four_bit import adapted, how, read_back
from test_merge import adapter, checkpoint, random, stored, unit_in_last_place
from test_merge_oracle import CASES, tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine"),
]


def digests(base: Path, tuned: Path, output: Path, *, device: str, **changes: Any) -> dict[str, str]:
    asked = {"dtype": "float16", "max_shard_size": 20, "threads": 4, **changes}
    merge_adapter(
        base=base, base_manifest=None, adapter=tuned, adapter_manifest=None, output=output, device=device, **asked
    )
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(output.glob("*.safetensors"))}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_adapter_has_the_bytes_of_the_cpu(name: str, dtype: str, tmp_path: Path) -> None:
    right = tune(CASES[name], tmp_path)
    one, other = (
        digests(right.base, right.adapter, tmp_path / device, device=device, dtype=dtype) for device in ("cpu", "cuda")
    )
    assert one == other


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_large_matrices_have_the_bytes_of_the_cpu(dora: bool, tmp_path: Path) -> None:
    """Several blocks of rows of 3001 columns, a rank of 24, and a vocabulary of 40,000."""
    base = checkpoint(tmp_path / "base", width=3001, layers=4, vocabulary=40_000)
    tuned = adapter(tmp_path / "adapter", base, rank=24, use_dora=dora)
    found = {
        tuple(digests(base, tuned, tmp_path / f"{device}{threads}", device=device, threads=threads).items())
        for device, threads in (("cpu", 4), ("cuda", 1), ("cuda", 8))
    }
    assert len(found) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_4_bit_base_has_the_bytes_of_the_cpu(precision: str, tiny_base: Path, tmp_path: Path) -> None:
    _, tuned = adapted(tiny_base, tmp_path / "adapter", precision=precision)
    one, other = (
        digests(tiny_base, tuned, tmp_path / device, device=device, base_weights="nf4") for device in ("cpu", "cuda")
    )
    assert one == other


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_values_are_those_of_bitsandbytes_on_the_gpu(double: bool, dtype: str, tmp_path: Path) -> None:
    """
    16.8 M values in 262,144 blocks.

    Its kernel divides by an approximate reciprocal, so that a value of float32 next to a boundary can get the
    neighbouring code: 4 were seen. And its mean is one of float32, which shows in values of float32, and in the 64 of
    a block whose magnitude is next to a boundary: 765 values of such blocks were seen.
    """
    import bitsandbytes.functional as bitsandbytes

    weight = (random(4096, 4096, seed=4) / 40).to(getattr(torch, dtype))
    packed, state = bitsandbytes.quantize_4bit(weight.cuda(), quant_type="nf4", compress_statistics=double)
    asked = how(device="cuda", dtype=dtype, double=double)
    found = read_back(stored(tmp_path, weight=weight)["weight"], asked, rows=512).double()
    expected = bitsandbytes.dequantize_4bit(packed, state).cpu().double()
    allowed = unit_in_last_place(expected.abs().float(), weight.dtype)
    if double and dtype == "float32":
        allowed = allowed + 4 * unit_in_last_place(state.offset.cpu().reshape(1), torch.float32)
    beyond = ((found - expected).abs() > allowed).sum().item()
    print(f"{dtype}: of {weight.numel()} values {beyond} differ, largest allowed {allowed.max():.1e}")
    assert beyond <= (weight.numel() / 10_000 if dtype == "float32" else 0)
