"""Loading a base: quantized as bitsandbytes itself does it, on the planned devices; what is said if it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import tiny
import torch
import training_runs as runs
from transformers import AutoModelForCausalLM

from lib.base_model import (
    GIB,
    WEIGHT_SHARE,
    BaseModelError,
    check_device,
    count_weights,
    exceeds_cards,
    limit_memory,
    load_base,
    parse_size,
    quantization_config,
    weight_limits,
)
from lib.train_settings import Train
from lib.training import prepare_samples


def load(base: Path, **train: Any) -> Any:
    return load_base(base, runs.settings(**train), device_map={"": "cpu"})


def plain_linears(model: Any) -> set[str]:
    """The last part of the names of linear layers that are not quantized."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is torch.nn.Linear}


def layer(model: Any) -> Any:
    return model.model.layers[1].mlp.up_proj


def original(base: Path) -> torch.Tensor:
    return layer(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)).weight.detach()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_without_quantization_the_weights_have_the_precision(
    precision: str, dtype: torch.dtype, tiny_base: Path
) -> None:
    assert quantization_config(runs.settings(precision=precision)) is None
    model = load(tiny_base, precision=precision)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert torch.equal(layer(model).weight, original(tiny_base).to(dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_4_bits_are_bitsandbytes_own(kind: str, double: bool, tiny_base: Path) -> None:
    asked = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    module = layer(load(tiny_base, method="qlora", quantization=asked))
    assert isinstance(module, bitsandbytes.nn.Linear4bit)
    packed, state = bitsandbytes.functional.quantize_4bit(
        original(tiny_base), quant_type=kind, compress_statistics=double
    )
    assert torch.equal(module.weight.data, packed)
    held = module.weight.quant_state
    assert (held.quant_type, held.nested, state.nested) == (kind, double, double)
    assert torch.equal(held.absmax, state.absmax)


@pytest.mark.parametrize(
    ("asked", "precision", "dtype"),
    [(None, "fp32", torch.float32), (None, "bf16", torch.bfloat16), ("float16", "fp32", torch.float16)],
)
def test_4_bits_are_computed_with_in_the_type_asked_for(
    asked: str | None, precision: str, dtype: torch.dtype, tiny_base: Path
) -> None:
    quantization = {"bnb_4bit_compute_dtype": asked}
    module = layer(load(tiny_base, method="qlora", precision=precision, quantization=quantization))
    assert module.compute_dtype == dtype


def test_evaluating_packs_no_4_bit_weight_anew(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes does on a CPU with bfloat16 products; what is packed for these has a product without gradient."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model = load(tiny_base, method="qlora").eval()
    module = layer(model)
    packed, state = module.weight.data.clone(), module.weight.quant_state
    with torch.no_grad():
        model(input_ids=torch.arange(5, 13)[None])
    assert torch.equal(module.weight.data, packed)
    hidden = torch.ones(1, 3, 256, requires_grad=True)
    module.train()(hidden).sum().backward()
    whole = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.allclose(hidden.grad, whole.sum(dim=0).expand(1, 3, -1), atol=1e-5)


def test_8_bits_are_bitsandbytes_own(tiny_base: Path) -> None:
    module = layer(load(tiny_base, method="int8", precision="fp16"))
    assert isinstance(module, bitsandbytes.nn.Linear8bitLt)
    rows, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(original(tiny_base).half())
    assert module.weight.dtype == torch.int8
    assert torch.equal(module.weight.data, rows)
    assert torch.allclose(module.weight.SCB, scales)


@pytest.mark.parametrize("threshold", [0.0, 2.5, 6.0])
def test_the_threshold_of_outliers_reaches_the_layers(threshold: float, tiny_base: Path) -> None:
    model = load(tiny_base, method="int8", quantization={"llm_int8_threshold": threshold})
    assert layer(model).state.threshold == threshold


def test_8_bits_beside_the_16_bits(tiny_base: Path) -> None:
    module = layer(load(tiny_base, method="int8", precision="bf16", quantization={"llm_int8_has_fp16_weight": True}))
    assert isinstance(module, bitsandbytes.nn.Linear8bitLt)
    assert module.state.has_fp16_weights
    assert module.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["qlora", "int8"])
@pytest.mark.parametrize(
    ("skipped", "plain"),
    [([], {"lm_head"}), (["lm_head", "up_proj"], {"lm_head", "up_proj"}), (["q_proj"], {"q_proj"})],
)
def test_skipped_modules_are_left_as_they_are(
    method: str, skipped: list[str], plain: set[str], tiny_base: Path
) -> None:
    model = load(tiny_base, method=method, quantization={"llm_int8_skip_modules": skipped})
    assert plain_linears(model) == plain


@pytest.mark.parametrize("method", ["qlora", "int8"])
def test_cpu_offload_of_modules_is_for_cards(method: str, tiny_base: Path) -> None:
    """On the CPU every module would count as offloaded, and none would be quantized."""
    asked = {"method": method, "quantization": {"llm_int8_enable_fp32_cpu_offload": True}}
    assert quantization_config(runs.settings(**asked)).llm_int8_enable_fp32_cpu_offload
    assert not quantization_config(runs.settings(method=method)).llm_int8_enable_fp32_cpu_offload
    assert plain_linears(load(tiny_base, **asked)) == {"lm_head"}


def test_weights_are_counted_from_the_files(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert count_weights(tiny_base) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("20GiB", 20 * 2**30),
        ("20 GiB", 20 * 2**30),
        ("18.5 GB", 18_500_000_000),
        ("500MB", 500_000_000),
        ("1.5MiB", 3 * 2**19),
        ("0MB", 0),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_limits_are_a_share_of_each_card_unless_said() -> None:
    share = {card: int(size * GIB * WEIGHT_SHARE) for card, size in enumerate([24, 16.5])}
    assert weight_limits([24, 16.5], {}) == share
    assert weight_limits([24, 16.5], {"1": "10GB", "cpu": "30GiB"}) == {**share, 1: 10**10, "cpu": 30 * GIB}
    assert weight_limits([], {"cpu": "0MB"}) == {"cpu": 0}


@pytest.mark.parametrize(
    "train",
    [
        {"method": "lora", "precision": "fp32"},
        {"method": "lora", "precision": "bf16"},
        {"method": "qlora", "precision": "bf16"},
        {"method": "qlora", "precision": "fp32"},
        {"method": "int8", "precision": "fp16"},
    ],
)
def test_what_exceeds_the_cards_is_what_the_loaded_model_takes(train: dict[str, Any], tiny_base: Path) -> None:
    run = runs.settings(**train)
    model = load(tiny_base, **train)
    held = sum(weight.nbytes for weight in model.parameters())
    for each in model.modules():  # scales are no parameters
        if (state := getattr(getattr(each, "weight", None), "quant_state", None)) is not None:
            held += state.absmax.nbytes
        if (scales := getattr(getattr(each, "weight", None), "SCB", None)) is not None:
            held += scales.nbytes
    assert exceeds_cards(tiny_base, run, {0: int(0.97 * held), "cpu": 10 * held})
    assert exceeds_cards(tiny_base, run, {0: int(0.5 * held), 1: int(0.47 * held)})
    assert not exceeds_cards(tiny_base, run, {0: int(1.03 * held)})
    assert not exceeds_cards(tiny_base, run, {0: int(0.5 * held), 1: int(0.53 * held), "cpu": 0})


def test_the_process_takes_no_more_of_a_card_than_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[int, float] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda card: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, card: taken.__setitem__(card, share)
    )
    limit_memory([24, 160, 24])
    assert taken == {0: pytest.approx(0.3), 1: 1.0}
    taken.clear()
    limit_memory([])
    assert taken == {}


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device(runs.settings(device="cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BaseModelError) as refused:
        check_device(runs.settings(method="qlora", device="cuda"))
    assert "train.device is cuda for qlora" in str(refused.value)
    assert "set train.device: cpu" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def set_model_type(folder: Path, value: str | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": value}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda base: (base / "tokenizer.json").write_text("{bad"), "cannot load its tokenizer (JSONDecodeError: "),
        (lambda base: (base / "tokenizer.json").write_text("{}"), "cannot load its tokenizer (KeyError: "),
        (lambda base: set_model_type(base, "foo"), "model type `foo`"),
        (lambda base: (base / "config.json").unlink(), "config.json"),
        (lambda base: (base / "config.json").write_text("{bad"), "not a valid JSON file"),
        (lambda base: next(base.glob("*-00001-*")).write_bytes(b"short"), "cannot load its weights (SafetensorError: "),
    ],
    ids=["damaged tokenizer", "empty tokenizer", "unknown type", "no config", "damaged config", "cut weights"],
)
def test_a_base_that_transformers_refuses_is_named(
    damage: Callable[[Path], object], said: str, tiny_base: Path, tmp_path: Path
) -> None:
    """Called as by the script once a manifest has vouched for the folder."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    damage(base)
    run: Train = runs.settings(data=str(tiny.write_data(tmp_path / "data.jsonl")))
    with pytest.raises(BaseModelError) as refused:
        prepare_samples(base, run)
        load_base(base, run, device_map={"": "cpu"})
    assert str(refused.value).startswith(f"{base}: transformers cannot load its ")
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
