"""The loss by a part of its logits at a time: transformers' own loss of the same batch is the measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs as runs
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lib import token_loss
from lib.samples import IGNORED, pack_samples, pad_batch
from lib.token_loss import TokenLoss

SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def gemma2(cap: float | None) -> Any:
    # Wide weights, so that the cap bends the logits and does not merely leave them as they are.
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=cap, initializer_range=0.3))


# what: (model, whether its output head alone gives its logits)
MODELS: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "Llama": (lambda base: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), True),
    "Qwen2": (lambda _: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)), True),
    "Qwen2, tied": (lambda _: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)), True),
    "Gemma2, capped": (lambda _: gemma2(5.0), False),
    "Gemma2, not capped": (lambda _: gemma2(None), True),
    "Granite, scaled": (lambda _: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)), False),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tiny_base: Path) -> Iterator[Any]:
    torch.manual_seed(1)
    made, by_head = MODELS[request.param]
    model = made(tiny_base).train()
    model.by_head = by_head
    yield model


def batch_of(count: int = 5) -> dict[str, torch.Tensor]:
    return pad_batch(runs.samples(count), pad=0)


def labelled(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def theirs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum that transformers' mean is of."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return model(**given, use_cache=False).loss * labelled(batch)


def assert_same(model: Any, batch: dict[str, torch.Tensor]) -> None:
    expected = theirs(model, batch)
    ours = TokenLoss(model)(batch)
    assert ours.dtype == torch.float32 and ours.shape == ()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted, got = gradients(model, expected), gradients(model, ours)
    assert wanted and got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_sum_and_gradient_are_transformers_own(model: Any) -> None:
    assert TokenLoss(model).by_head is model.by_head
    assert model.training, "the probe leaves the model as it was"
    assert_same(model, batch_of())


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_chunks_change_nothing(tokens: int, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "LOGITS_AT_ONCE", tokens * SIZES["vocab_size"])
    assert_same(model, batch_of())


@pytest.mark.parametrize("tokens", [1, 7, 10_000])
def test_only_labelled_tokens_get_logits_a_few_at_a_time(
    tokens: int, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = MODELS["Llama"][0](tiny_base).train(), batch_of()
    loss = TokenLoss(model)
    monkeypatch.setattr(token_loss, "LOGITS_AT_ONCE", tokens * SIZES["vocab_size"])
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, logits: rows.append(logits.shape[:-1].numel()))
    summed = loss(batch)
    assert sum(rows) == labelled(batch) < batch["input_ids"].numel()
    assert max(rows) <= tokens
    forward = len(rows)
    summed.backward()
    # Logits are not kept for the backward pass, unless there is one chunk and so nothing to win.
    assert sum(rows[forward:]) == (0 if forward == 1 else labelled(batch))


def test_parts_of_a_packed_row_count_as_if_alone(tiny_base: Path) -> None:
    model, samples = MODELS["Llama"][0](tiny_base).train(), runs.samples(6)
    packed = pack_samples(samples, max_length=80)
    assert len(packed) < len(samples)
    alone = [theirs(model, pad_batch([sample], pad=0)) for sample in samples]
    ours = TokenLoss(model)(pad_batch(packed, pad=0))
    expected = torch.stack(alone).sum()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted, got = gradients(model, expected), gradients(model, ours)
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"], []])
@pytest.mark.parametrize("tokens", [7, 10_000])
def test_an_adapter_on_the_output_head_counts(
    targets: list[str], tokens: int, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runs.adapted(tiny_base, runs.settings(lora={"r": 4, "target_modules": targets})).train()
    monkeypatch.setattr(token_loss, "LOGITS_AT_ONCE", tokens * SIZES["vocab_size"])
    assert TokenLoss(model).by_head
    assert_same(model, batch_of())
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert any("lm_head" in name for name in trained) == ("lm_head" in targets)
    assert all("lora_" in name for name in trained)
