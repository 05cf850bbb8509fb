"""The merge: its definition to the bit, and bytes that nothing else changes. peft's own is in test_merge_oracle."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from lib import merge as module
from lib.lora import LowRank, Update
from lib.merge import MOST_NAMED, MergeError, Overflows, in_order, merged_blocks, merged_rows, row_norms
from lib.merge_plan import MergedTensor
from lib.safetensors_file import StoredTensor, read_header

OUTPUTS = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
HELD = pytest.mark.parametrize("held", [torch.float32, torch.float16, torch.bfloat16], ids=["F32", "F16", "BF16"])
# Bits of the fraction, and the exponent of the smallest normal number.
PRECISION = {torch.float16: (10, -14), torch.bfloat16: (7, -126), torch.float32: (23, -126)}


def unit_in_last_place(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of a type at a magnitude."""
    bits, least = PRECISION[dtype]
    exponent = torch.frexp(magnitude.double()).exponent - 1
    return torch.ldexp(torch.ones_like(magnitude, dtype=torch.float64), exponent.clamp(min=least) - bits)


def stored(folder: Path, **tensors: torch.Tensor) -> dict[str, StoredTensor]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "x.safetensors")
    return {tensor.name: tensor for tensor in read_header(folder / "x.safetensors")}


def planned(
    folder: Path, weight: torch.Tensor, *factors: torch.Tensor, scale: float = 1.0, transposed: bool = False
) -> MergedTensor:
    """A weight in a file and its update: A and B, and DoRA's magnitude."""
    names = dict(zip(("a", "b", "magnitude"), factors, strict=False))
    files = stored(folder, weight=weight, **names)
    update = Update()
    if factors:
        held = files.get("magnitude")
        update = Update(low_rank=LowRank(files["a"], files["b"], scale, transposed=transposed, magnitude=held))
    return MergedTensor("weight", tuple(weight.shape), files["weight"], update)


def merge(
    tensor: MergedTensor, *, dtype: torch.dtype = torch.float16, block_values: int = 1 << 24, threads: int = 1
) -> torch.Tensor:
    """The merged weight, from files as in a real merge."""
    overflows = Overflows(str(dtype).removeprefix("torch."))
    blocks = merged_blocks([tensor], dtype=dtype, overflows=overflows, threads=threads, block_values=block_values)
    result = torch.cat(list(blocks))
    overflows.check()
    return result


def exact(tensor: MergedTensor) -> np.ndarray:
    return merged_rows(tensor, 0, tensor.rows).numpy()


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_definition(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, *, fused: bool = False) -> np.ndarray:
    """acc = acc + B[:, k]·A[k, :] for each k, then W + scale·acc, one float32 operation after another."""
    result = np.empty(weight.shape, np.float32)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            total = np.float32(0)
            for k in range(a.shape[0]):
                if fused:  # one rounding for product and sum: what the definition rules out
                    total = np.float32(np.float64(b[row, k]) * np.float64(a[k, column]) + np.float64(total))
                else:
                    total = np.float32(total + np.float32(b[row, k] * a[k, column]))
            result[row, column] = np.float32(np.float32(weight[row, column]) + np.float32(np.float32(scale) * total))
    return result


def norms_by_definition(values: np.ndarray, *, root: bool = True) -> np.ndarray:
    """Each row's squares in float64, padded to a power of two, the upper half added to the lower until one is left."""
    result = np.empty(len(values))
    for number, row in enumerate(values.astype(np.float64)):
        squares = list(row * row)
        squares += [np.float64(0)] * ((1 << max(0, len(squares) - 1).bit_length()) - len(squares))
        while len(squares) > 1:
            half = len(squares) // 2
            squares = [low + high for low, high in zip(squares[:half], squares[half:], strict=True)]
        result[number] = np.sqrt(squares[0]) if root else squares[0]
    return result


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32 to the bits of a 16-bit type, to nearest, ties to even."""
    if dtype is torch.float16:
        return values.astype(np.float16).view(np.int16)
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)


def same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    return np.array_equal(found.view(np.int32), np.ascontiguousarray(expected).view(np.int32))


@OUTPUTS
@HELD
@pytest.mark.parametrize("scale", [2.0, 0.1, 16 / 7**0.5])
@pytest.mark.parametrize("transposed", [False, True], ids=["as is", "transposed"])
def test_the_definition_to_the_bit(
    transposed: bool, scale: float, held: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    """A transposed weight is that of the same definition, turned over."""
    weight, a, b = random(5, 7, seed=1, dtype=held), random(9, 7, seed=2, dtype=held), random(5, 9, seed=3)
    numbers = (weight.float().numpy(), a.float().numpy(), b.numpy())
    expected = by_definition(*numbers, scale)
    assert not np.array_equal(expected, by_definition(*numbers, scale, fused=True)), "the example cannot tell"
    if transposed:
        weight, expected = weight.t(), np.ascontiguousarray(expected.T)
    tensor = planned(tmp_path, weight, a, b, scale=scale, transposed=transposed)
    assert same_bits(exact(tensor), expected)
    assert np.array_equal(merge(tensor, dtype=dtype).view(torch.int16).numpy(), rounded(expected, dtype))
    single = merge(tensor, dtype=dtype, block_values=1)
    assert np.array_equal(single.view(torch.int16).numpy(), rounded(expected, dtype))


@pytest.mark.parametrize("block", [1, 7, 20, 64, 1 << 22])
@pytest.mark.parametrize("transposed", [False, True], ids=["as is", "transposed"])
def test_a_rank_of_several_chunks_is_one_sum(
    transposed: bool, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one rank at a time to all at once."""
    weight, a, b = random(5, 7, seed=1), random(23, 7, seed=2), random(5, 23, seed=3)
    expected = by_definition(weight.numpy(), a.numpy(), b.numpy(), 0.3)
    if transposed:
        weight, expected = weight.t(), expected.T
    tensor = planned(tmp_path, weight, a, b, scale=0.3, transposed=transposed)
    monkeypatch.setattr(module, "BLOCK_VALUES", block)
    assert same_bits(exact(tensor), expected)
    assert same_bits(merge(tensor, dtype=torch.float32, block_values=block).numpy(), expected)


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 33])
@HELD
def test_dora_to_the_bit(held: torch.dtype, columns: int, tmp_path: Path) -> None:
    """Each row of the sum, times its magnitude through its length: a division, then a multiplication in float32."""
    weight, a, b = random(5, columns, seed=1, dtype=held), random(4, columns, seed=2), random(5, 4, seed=3)
    magnitude = random(5, seed=4).abs()
    total = by_definition(weight.float().numpy(), a.numpy(), b.numpy(), 0.7)
    factors = magnitude.numpy() / norms_by_definition(total).astype(np.float32)
    tensor = planned(tmp_path, weight, a, b, magnitude, scale=0.7)
    assert same_bits(exact(tensor), total * factors[:, None])
    assert same_bits(merge(tensor, dtype=torch.float32, block_values=1).numpy(), total * factors[:, None])


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("block", [1, 500, 1 << 22])
def test_dora_of_a_transposed_weight_to_the_bit(
    block: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Squares of each column, groups of 64 rows by trees of halves, one group after another."""
    weight, a, b, magnitude = random(rows, 7, seed=1), random(4, rows, seed=2), random(7, 4, seed=3), random(7, seed=4)
    total = by_definition(weight.t().numpy(), a.numpy(), b.numpy(), 0.7)
    squares = np.zeros(7)
    for start in range(0, rows, 64):
        squares += norms_by_definition(total[:, start : start + 64], root=False)
    factors = magnitude.numpy() / np.sqrt(squares).astype(np.float32)
    tensor = planned(tmp_path, weight, a, b, magnitude, scale=0.7, transposed=True)
    monkeypatch.setattr(module, "BLOCK_VALUES", block)
    assert same_bits(exact(tensor), (total * factors[:, None]).T)
    assert same_bits(merge(tensor, dtype=torch.float32, block_values=block).numpy(), (total * factors[:, None]).T)


@pytest.mark.parametrize("columns", [1, 2, 3, 100, 1000, 4097])
def test_norms_are_a_tree_of_halves(columns: int) -> None:
    values = random(3, columns, seed=5)
    assert np.array_equal(row_norms(values).numpy(), norms_by_definition(values.numpy()))
    assert torch.allclose(row_norms(values), torch.linalg.norm(values.double(), dim=1), rtol=1e-14)


def test_the_order_of_the_sum_is_fixed(tmp_path: Path) -> None:
    """Summed in any other order, the small term would survive."""
    a = torch.tensor([[1.0], [1.0], [-1.0]])
    b = torch.tensor([[1.0, 2.0**30, 2.0**30]])
    assert exact(planned(tmp_path, torch.zeros(1, 1), a, b)).item() == 0.0


@OUTPUTS
@HELD
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (2, 3, 4), (0, 4), (3, 0)], ids=str)
def test_a_weight_without_an_adapter_is_rounded_once(
    shape: tuple[int, ...], held: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    weight = random(*shape, seed=4, dtype=held)
    merged = merge(planned(tmp_path, weight), dtype=dtype, block_values=4) if weight.numel() else weight.to(dtype)
    expected = weight.float().numpy().reshape(merged.shape)
    assert np.array_equal(merged.view(torch.int16).numpy(), rounded(np.ascontiguousarray(expected), dtype))


def test_other_updates_in_their_order(tmp_path: Path) -> None:
    """A saved weight instead of the base's, the low-rank update of that, and trained tokens over both."""
    shapes = {"weight": (4, 6), "saved": (5, 6), "a": (2, 5), "b": (6, 2), "tokens": (2, 6)}
    values = {name: random(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    files = stored(tmp_path, **values)
    low_rank = LowRank(files["a"], files["b"], 0.5, transposed=True)
    update = Update(replaced=files["saved"], low_rank=low_rank, rows=(files["tokens"], (4, 1)))
    expected = by_definition(values["saved"].numpy(), values["b"].t().numpy(), values["a"].t().numpy(), 0.5)
    expected[[4, 1]] = values["tokens"].numpy()
    tensor = MergedTensor("weight", (5, 6), files["weight"], update)
    for block in (1, 12, 1 << 24):
        assert same_bits(merge(tensor, dtype=torch.float32, block_values=block).numpy(), expected)


def test_a_bias_of_b_is_scaled(tmp_path: Path) -> None:
    files = stored(tmp_path, bias=random(7, seed=1), added=random(7, seed=2))
    tensor = MergedTensor("bias", (7,), files["bias"], Update(added=(files["added"], 0.1)))
    expected = random(7, seed=1).numpy() + random(7, seed=2).numpy() * np.float32(0.1)
    assert same_bits(merge(tensor, dtype=torch.float32, block_values=2).numpy().ravel(), expected)


def test_the_files_that_are_read_stay(tmp_path: Path) -> None:
    tensor = planned(tmp_path, random(4, 6, seed=1), random(2, 6, seed=2), random(4, 2, seed=3), random(4, seed=4))
    before = (tmp_path / "x.safetensors").read_bytes()
    assert torch.equal(merge(tensor), merge(tensor))
    assert (tmp_path / "x.safetensors").read_bytes() == before


@OUTPUTS
@pytest.mark.parametrize("kind", ["lora", "transposed", "dora", "transposed dora"])
def test_threads_and_blocks_change_no_byte(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Large enough for torch to split the work by itself: from 32768 values on."""
    rows, columns = 300, 512
    weight, a, b = random(rows, columns, seed=5), random(8, columns, seed=6), random(rows, 8, seed=7)
    transposed = kind.startswith("transposed")
    if transposed:
        a, b = random(8, rows, seed=6), random(columns, 8, seed=7)
    magnitude = [random(columns if transposed else rows, seed=8).abs()] if kind.endswith("dora") else []
    tensor = planned(tmp_path, weight, a, b, *magnitude, scale=0.37, transposed=transposed)
    digests, before = set(), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for block in (1, 7 * columns, 1 << 24):
                merged = merge(tensor, dtype=dtype, block_values=block, threads=threads)
                assert merged.shape == weight.shape
                digests.add(hashlib.sha256(merged.view(torch.int16).numpy().tobytes()).hexdigest())
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


@pytest.mark.parametrize("block_values", [1, 5, 12, 1 << 24])
def test_blocks_are_no_larger_than_asked_save_for_one_row(block_values: int, tmp_path: Path) -> None:
    tensor = planned(tmp_path, random(10, 4, seed=1))
    blocks = list(
        merged_blocks([tensor], dtype=torch.float16, overflows=Overflows("x"), threads=2, block_values=block_values)
    )
    assert sum(len(block) for block in blocks) == 10
    assert max(block.numel() for block in blocks) <= max(4, block_values)


def test_results_come_in_order_and_no_thread_runs_far_ahead() -> None:
    started: list[int] = []

    def work(job: int) -> int:
        started.append(job)
        time.sleep(0.002 * (job % 3))
        return job

    for number, result in enumerate(in_order(range(40), work, threads=3)):
        assert result == number
        assert max(started) <= number + 3 + 1


def test_an_error_in_a_thread_is_raised_and_ends_the_others() -> None:
    def work(job: int) -> int:
        if job == 5:
            raise MergeError("five")
        return job

    found = []
    with pytest.raises(MergeError, match="five"):
        for result in in_order(range(1000), work, threads=2):
            found.append(result)
    assert found == [0, 1, 2, 3, 4]
    assert threading.active_count() < 10


def test_long_jobs_are_told_when_nobody_waits_for_them_any_more() -> None:
    """As by Ctrl-C: what the one job raises reaches the caller only after the other has ended."""
    begun, stopped, ended = threading.Event(), threading.Event(), []

    def work(job: int) -> None:
        if job == 0:
            assert begun.wait(60)
            raise KeyboardInterrupt
        begun.set()
        assert stopped.wait(60)
        ended.append(job)

    with pytest.raises(KeyboardInterrupt):
        list(in_order(range(2), work, threads=2, stopped=stopped))
    assert ended == [1]


def overflow_of(parts: dict[str, torch.Tensor], folder: Path, *, dtype: str = "float16", rows: int = 1) -> str:
    """The message about several tensors, merged in blocks of a few rows by two threads."""
    tensors = [MergedTensor(name, tuple(each.base.shape), each.base, each.update) for name, each in parts.items()]
    overflows, width = Overflows(dtype), max(each.row_values for each in tensors)
    kind = getattr(torch, dtype)
    list(merged_blocks(tensors, dtype=kind, overflows=overflows, threads=2, block_values=rows * width))
    with pytest.raises(MergeError) as refused:
        overflows.check()
    return str(refused.value)


def plans(folder: Path, **weights: torch.Tensor) -> dict[str, MergedTensor]:
    files = stored(folder, **weights)
    return {name: MergedTensor(name, tuple(each.shape), each, Update()) for name, each in files.items()}


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_overflow_names_all_tensors_their_largest_values_and_the_remedy(rows: int, tmp_path: Path) -> None:
    weights = {name: random(6, 4, seed=seed) for seed, name in enumerate(("calm", "high", "low", "once"))}
    weights["high"][1, 2], weights["high"][4, 0], weights["high"][5, 3] = 7.0e4, 3.0e5, 8.0e4
    weights["low"][2, 2], weights["low"][3, 0] = -9.0e4, 6.6e4
    weights["once"][5, 3] = 65520.0
    message = overflow_of(plans(tmp_path, **weights), tmp_path, rows=rows)
    assert message.splitlines() == [
        "values beyond float16; set merge.dtype: bfloat16:",
        "  high: 300000",
        "  low: 90000",
        "  once: 65520",
    ]
    merged = merge(plans(tmp_path, **weights)["high"], dtype=torch.bfloat16)
    assert merged[4, 0].item() == pytest.approx(3e5, rel=2**-8)


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named_apart(value: float, rows: int, tmp_path: Path) -> None:
    """Also where values beyond the type stand before and behind it."""
    weights = {name: random(6, 4, seed=seed) for seed, name in enumerate(("broken", "calm", "high"))}
    weights["broken"][1, 2], weights["broken"][3, 0], weights["broken"][5, 3] = 7.0e4, value, 8.0e4
    weights["high"][0, 0] = 1e5
    assert overflow_of(plans(tmp_path, **weights), tmp_path, rows=rows).splitlines() == [
        "base or adapter hold values that are not finite:",
        "  broken",
        "values beyond float16; set merge.dtype: bfloat16:",
        "  high: 100000",
    ]


@OUTPUTS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["weight", "a", "b"])
def test_values_that_are_not_finite(place: str, value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    parts = {"weight": random(4, 6, seed=1), "a": random(2, 6, seed=2), "b": random(4, 2, seed=3)}
    parts[place][1, 1] = value
    with pytest.raises(MergeError, match=r"^base or adapter hold values that are not finite:\n  weight$"):
        merge(planned(tmp_path, *parts.values()), dtype=dtype)


def test_the_largest_value_does_not_depend_on_which_thread_is_first() -> None:
    """Noted from many threads at once."""
    overflows = Overflows("float16")
    values = [torch.full((1, 1), 66000.0 + number) for number in range(400)]
    list(in_order(values, lambda value: overflows.note("x", value), threads=8))
    with pytest.raises(MergeError, match="x: 66399$"):
        overflows.check()


def test_of_many_tensors_some_are_named(tmp_path: Path) -> None:
    overflows = Overflows("bfloat16")
    for number in range(MOST_NAMED + 3):
        overflows.note(f"t{number}", torch.full((1, 1), 3.4e38))
    with pytest.raises(MergeError, match=r"set merge\.dtype: float32:(\n  t.*){20}\n  and 3 more$"):
        overflows.check()


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.0, True), (65520.0, False), (-65520.0, False)])
def test_the_edge_of_float16(value: float, fits: bool, tmp_path: Path) -> None:
    """Up to half a unit above the largest number rounds down to it."""
    tensor = planned(tmp_path, torch.full((1, 1), value))
    if fits:
        assert merge(tensor).item() == 65504.0
    else:
        with pytest.raises(MergeError, match="weight: 65520"):
            merge(tensor)


def checkpoint(folder: Path, *, width: int, layers: int, vocabulary: int) -> Path:
    """A base of square weights, saved in one file."""
    folder.mkdir()
    weights = {f"model.layers.{n}.mlp.up_proj.weight": random(width, width, seed=n) / 9 for n in range(layers)}
    weights["model.embed_tokens.weight"] = random(vocabulary, width, seed=97)
    weights["lm_head.weight"] = random(vocabulary, width, seed=98)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"num_hidden_layers": layers, "tie_word_embeddings": False, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32", **config}))
    return folder


def adapter(folder: Path, base: Path, *, rank: int, **settings: object) -> Path:
    """Factors for every layer, and a saved embedding."""
    folder.mkdir()
    tensors, prefix = {}, "base_model.model."
    for name, weight in load_file(base / "model.safetensors").items():
        stem = prefix + name.removesuffix(".weight")
        if "embed" in name:
            tensors[f"{stem}.weight"] = weight + 1
        if "layers" not in name:
            continue
        tensors[f"{stem}.lora_A.weight"] = random(rank, weight.shape[1], seed=1) / 9
        tensors[f"{stem}.lora_B.weight"] = random(weight.shape[0], rank, seed=2) / 9
        if settings.get("use_dora"):
            tensors[f"{stem}.lora_magnitude_vector"] = weight.norm(dim=1)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"r": rank, "lora_alpha": rank, "target_modules": ["up_proj"], **settings}
    text = json.dumps({"peft_type": "LORA", "modules_to_save": ["embed_tokens"], **config})
    (folder / "adapter_config.json").write_text(text)
    return folder


def run_script(base: Path, tuned: Path, output: Path, *options: str, **environment: str) -> None:
    command = [sys.executable, str(ROOT / "scripts/merge_adapter.py"), "--base", str(base), "--adapter", str(tuned)]
    command += ["--output", str(output), "--log", str(output.with_suffix(".log")), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_instruction_sets_change_no_byte(tmp_path: Path) -> None:
    """MKL's and torch's own kernels, with and without AVX; a matrix product by MKL would differ between these."""
    base = checkpoint(tmp_path / "base", width=515, layers=2, vocabulary=700)
    tuned = adapter(tmp_path / "adapter", base, rank=24, use_dora=True)
    sets = [{}, {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}]
    sets += [{"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ATEN_CPU_CAPABILITY": "default"}]
    digests = set()
    for number, environment in enumerate(sets):
        output = tmp_path / f"out{number}"
        run_script(base, tuned, output, "--threads", str(1 + number % 2), **environment)
        files = json.loads((output / "MANIFEST.json").read_text())["files"]
        shard = output / "model.safetensors"
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        assert files[shard.name]["sha256"] == digest
        digests.add(digest)
    assert len(digests) == 1


@pytest.mark.slow
def test_several_shards_at_once_are_those_of_one_after_another(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", width=515, layers=6, vocabulary=700)
    tuned = adapter(tmp_path / "adapter", base, rank=4)
    digests = []
    for threads in ("1", "4", "8", "9"):
        output = tmp_path / threads
        run_script(base, tuned, output, "--threads", threads, "--max-shard-size", "1")
        files = json.loads((output / "MANIFEST.json").read_text())["files"]
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.glob("model*")})
        assert digests[-1].items() <= {name: facts["sha256"] for name, facts in files.items()}.items()
    assert len(digests[0]) == 8 + 1  # six layers, embedding and head; and their index
    assert all(each == digests[0] for each in digests)


# What it takes to import what the script imports, and nothing else; in MB, like the limits below.
IMPORTS = "import merge_adapter, torch; torch.set_num_threads(1)"
# Not ru_maxrss, which a child process takes over from the one that starts it: here pytest's own.
MEASURE = "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
MERGE = """
from pathlib import Path
merge_adapter.merge_adapter(base=Path({base!r}), base_manifest=None, adapter=Path({adapter!r}), adapter_manifest=None,
    dtype="float16", max_shard_size={shard}, output=Path({output!r}), threads={threads})
"""


def peak_mb(code: str) -> float:
    """Peak resident memory of a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    command = [sys.executable, "-c", "\n".join([IMPORTS, code, MEASURE])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) * 1024 / 1e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "shard", "most"), [(2, 2000, 300), (8, 20, 1000)], ids=["one shard, 2 threads", "4 shards, 8 threads"]
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_memory_is_that_of_blocks(dora: bool, threads: int, shard: int, most: int, tmp_path: Path) -> None:
    """Of 310 MB of base and 180 MB of adapter, whose saved embedding is 130 MB and its rank 512, none is held."""
    base = checkpoint(tmp_path / "base", width=1024, layers=12, vocabulary=32_000)
    tuned = adapter(tmp_path / "adapter", base, rank=512, use_dora=dora)
    size = (base / "model.safetensors").stat().st_size / 1e6
    places = {"base": str(base), "adapter": str(tuned), "output": str(tmp_path / "out")}
    code = MERGE.format(**places, threads=threads, shard=shard)
    idle, merging = peak_mb(""), peak_mb(code)
    print(f"base {size:.0f} MB, adapter {(tuned / 'adapter_model.safetensors').stat().st_size / 1e6:.0f} MB: ", end="")
    print(f"{merging - idle:.0f} MB above {idle:.0f} MB")
    assert merging - idle < most
