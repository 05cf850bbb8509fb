"""The merge: its definition, peft's own merge as the oracle, and bytes that nothing else changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lib.lora import LoraPair, read_lora
from lib.merge import MergeError, fold_delta, merged_rows
from lib.safetensors_file import StoredTensor, read_header, read_tensors

OUTPUTS = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
# Bits of the fraction, and the exponent of the smallest normal number.
PRECISION = {torch.float16: (10, -14), torch.bfloat16: (7, -126)}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def stored(folder: Path, **tensors: torch.Tensor) -> dict[str, StoredTensor]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "x.safetensors")
    return {tensor.name: tensor for tensor in read_header(folder / "x.safetensors")}


def merge(
    folder: Path,
    weight: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float16,
    block_values: int = 1 << 24,
) -> torch.Tensor:
    """The merged weight, from files as in a real merge."""
    files = stored(folder, **{"weight": weight, **({"a": a, "b": b} if a is not None else {})})
    pair = LoraPair(a=files["a"], b=files["b"], scale=scale) if a is not None else None
    return torch.cat(list(merged_rows(files["weight"], pair, dtype=dtype, block_values=block_values)))


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


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32 to the bits of a 16-bit type, to nearest, ties to even."""
    if dtype is torch.float16:
        return values.astype(np.float16).view(np.int16)
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)


@OUTPUTS
@pytest.mark.parametrize("held", [torch.float32, torch.float16, torch.bfloat16], ids=["F32", "F16", "BF16"])
@pytest.mark.parametrize("scale", [2.0, 0.1, 16 / 7**0.5])
def test_the_definition_to_the_bit(scale: float, held: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    weight, a, b = random(5, 7, seed=1, dtype=held), random(9, 7, seed=2), random(5, 9, seed=3)
    numbers = (weight.float().numpy(), a.numpy(), b.numpy())
    expected = by_definition(*numbers, scale)
    assert not np.array_equal(expected, by_definition(*numbers, scale, fused=True)), "the example cannot tell"
    found = fold_delta(weight, a, b, scale=scale)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy().view(np.int32), expected.view(np.int32))
    merged = merge(tmp_path, weight, a, b, scale=scale, dtype=dtype)
    assert np.array_equal(merged.view(torch.int16).numpy(), rounded(expected, dtype))


def test_the_order_of_the_sum_is_fixed() -> None:
    """Summed in any other order, the small term would survive."""
    a = torch.tensor([[1.0], [1.0], [-1.0]])
    b = torch.tensor([[1.0, 2.0**30, 2.0**30]])
    assert fold_delta(torch.zeros(1, 1), a, b, scale=1.0).item() == 0.0


def test_nothing_that_is_read_is_changed() -> None:
    weight, a, b = random(4, 6, seed=1), random(2, 6, seed=2), random(4, 2, seed=3)
    copies = [tensor.clone() for tensor in (weight, a, b)]
    fold_delta(weight, a, b, scale=3.0)
    assert all(torch.equal(*pair) for pair in zip((weight, a, b), copies, strict=True))


@OUTPUTS
@pytest.mark.parametrize("held", [torch.float32, torch.float16, torch.bfloat16], ids=["F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (2, 3, 4)], ids=str)
def test_a_weight_without_an_adapter_is_rounded_once(
    shape: tuple[int, ...], held: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    weight = random(*shape, seed=4, dtype=held)
    merged = merge(tmp_path, weight, dtype=dtype, block_values=4)
    expected = weight.float().numpy().reshape(merged.shape)
    assert np.array_equal(merged.view(torch.int16).numpy(), rounded(np.ascontiguousarray(expected), dtype))


@OUTPUTS
def test_threads_and_blocks_change_no_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    """Large enough for torch to split the work: from 32768 values on."""
    weight, a, b = random(300, 512, seed=5), random(8, 512, seed=6), random(300, 8, seed=7)
    digests = set()
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        for block in (1, 512, 7 * 512, 1 << 24):
            merged = merge(tmp_path, weight, a, b, scale=0.37, dtype=dtype, block_values=block)
            assert merged.shape == weight.shape
            digests.add(hashlib.sha256(merged.view(torch.int16).numpy().tobytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("block_values", [1, 5, 12, 1 << 24])
def test_blocks_are_no_larger_than_asked_save_for_one_row(block_values: int, tmp_path: Path) -> None:
    files = stored(tmp_path, weight=random(10, 4, seed=1))
    blocks = list(merged_rows(files["weight"], None, dtype=torch.float16, block_values=block_values))
    assert sum(len(block) for block in blocks) == 10
    assert max(block.numel() for block in blocks) <= max(4, block_values)


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "rslora"])
def peft_merge(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A float32 model and an adapter on disk, peft's merge of both, and the updates by themselves."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=96,
            num_hidden_layers=2,
            intermediate_size=160,
            num_attention_heads=6,
            num_key_value_heads=2,
            vocab_size=128,
        )
    )
    model.save_pretrained(base, max_shard_size="200KB")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=12,
        lora_alpha=20,
        target_modules="all-linear",
        use_rslora=request.param,
        init_lora_weights=False,
        base_model_name_or_path=str(base),
    )
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(adapter)
    updates = {
        name.removeprefix("base_model.model.") + ".weight": module.get_delta_weight("default").detach()
        for name, module in tuned.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    merged = {name: tensor.detach().clone() for name, tensor in tuned.merge_and_unload().state_dict().items()}
    return base, adapter, merged, updates


def unit_in_last_place(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of a type at a magnitude."""
    bits, least = PRECISION[dtype]
    exponent = torch.frexp(magnitude.double()).exponent - 1
    return torch.ldexp(torch.ones_like(magnitude, dtype=torch.float64), exponent.clamp(min=least) - bits)


@OUTPUTS
def test_pefts_merge_is_met_within_one_unit(
    dtype: torch.dtype, peft_merge: tuple[Path, Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]
) -> None:
    """At the largest of weight, update and result: where these cancel, float32 itself leaves that much."""
    base, adapter, expected, updates = peft_merge
    tensors, pairs = read_tensors(base), read_lora(adapter)
    assert pairs.keys() == updates.keys()
    assert len(pairs) == 2 * 7
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        merged = torch.cat(list(merged_rows(tensor, pairs.get(name), dtype=dtype, block_values=1000)))
        right = expected[name].reshape(merged.shape)
        update = updates[name] if name in updates else torch.zeros_like(right)
        largest = torch.stack([right.abs(), update.abs(), (right - update).abs()]).amax(0)
        error = (merged.double() - right.double()).abs()
        assert (error <= unit_in_last_place(largest, dtype)).all(), name
        if name in updates:
            unmerged = (right - update).to(dtype)
            assert (merged != unmerged).float().mean() > 0.5, "the update is too small to be seen"


def test_overflow_names_tensor_value_and_remedy(tmp_path: Path) -> None:
    weight, a, b = torch.full((2, 3), 6.0e4), torch.full((1, 3), 1.0), torch.full((2, 1), 6.0e4)
    with pytest.raises(MergeError) as refused:
        merge(tmp_path, weight, a, b)
    assert str(refused.value) == "weight: 120000 is beyond float16; set merge.dtype: bfloat16"
    assert merge(tmp_path, weight, a, b, dtype=torch.bfloat16)[0, 0].item() == pytest.approx(1.2e5, rel=2**-8)


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.0, True), (65520.0, False), (-65520.0, False)])
def test_the_edge_of_float16(value: float, fits: bool, tmp_path: Path) -> None:
    """Up to half a unit above the largest number rounds down to it."""
    weight = torch.full((1, 1), value)
    if fits:
        assert merge(tmp_path, weight).item() == 65504.0
    else:
        with pytest.raises(MergeError, match="is beyond float16"):
            merge(tmp_path, weight)


def test_the_largest_value_is_named_whatever_its_sign(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="weight: 90000 is beyond"):
        merge(tmp_path, torch.tensor([[7.0e4, -9.0e4, 1.0]]))


@OUTPUTS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["weight", "a", "b"])
def test_values_that_are_not_finite(place: str, value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    parts = {"weight": random(4, 6, seed=1), "a": random(2, 6, seed=2), "b": random(4, 2, seed=3)}
    parts[place][1, 1] = value
    with pytest.raises(MergeError, match=r"^weight: .*not finite"):
        merge(tmp_path, parts["weight"], parts["a"], parts["b"], dtype=dtype)


@OUTPUTS
def test_a_base_that_is_not_finite_without_an_adapter(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = random(4, 6, seed=1, dtype=torch.float16)
    weight[3, 5] = float("nan")
    with pytest.raises(MergeError, match="not finite"):
        merge(tmp_path, weight, dtype=dtype, block_values=6)
