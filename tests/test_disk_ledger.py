"""How the disk fills: by hand for a model of known sizes, on each path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lib import estimate
from lib.disk_ledger import disk_ledger
from lib.spec import Model, resolve_project

SHAPE = {
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "intermediate_size": 27648,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
PARAMETERS = 2 * 152064 * 5120 + 64 * (2 * 5120 * 128 * 48 + 3 * 5120 * 27648)
BASE, QUANTIZED = 2 * PARAMETERS, round(PARAMETERS * 4.89 / 8)
# Rank 16 in float32: seven projections, in and out.
ADAPTER = 4 * 16 * 64 * (2 * (5120 + 5120) + 2 * (5120 + 1024) + 3 * (5120 + 27648))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talks.jsonl").write_text("{}\n")
    return make()


def make(**changes: Any) -> Model:
    base = {"hub": "maker/model", "revision": "main", "shape": SHAPE}
    train = {"train": {"data": "talks.jsonl", "lora": {"r": 16}}}
    return resolve_project({"models": {"m": {"base": base, "adapter": train, **changes}}}).models["m"]


def told(model: Model, **options: bool) -> list[tuple[str, int, int]]:
    """Step, bytes afterwards, bytes meanwhile."""
    return [(each.step, each.held, each.peak) for each in disk_ledger(model, **options)]


def test_the_direct_path(model: Model) -> None:
    before = BASE + ADAPTER
    assert told(model, direct=True, keep_intermediates=True) == [
        ("fetch_base", BASE, BASE),
        ("train_adapter", before, before),
        ("build_direct", before + QUANTIZED, before + QUANTIZED + 10**8),
    ]


@pytest.mark.parametrize("keep", [True, False])
def test_the_staged_path(keep: bool, model: Model) -> None:
    before = BASE + ADAPTER
    both = before + 2 * BASE
    f16 = both if keep else before + BASE
    assert told(model, direct=False, keep_intermediates=keep)[2:] == [
        ("merge_adapter", before + BASE, before + BASE),
        ("convert_gguf", f16, both),
        ("quantize_gguf", f16 + QUANTIZED if keep else before + QUANTIZED, f16 + QUANTIZED),
    ]


def test_registering_takes_four_copies_for_a_while(model: Model) -> None:
    built, registered = disk_ledger(model, direct=True, keep_intermediates=True, registered=True)[-2:]
    assert (registered.added, registered.peak - built.held) == (QUANTIZED, 4 * QUANTIZED)


def test_a_base_that_is_there_takes_nothing(model: Model, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config.json").write_text("{}")
    own = make(base={"path": "own", "shape": SHAPE}, adapter=None)
    assert told(own, direct=True, keep_intermediates=True) == [("build_direct", QUANTIZED, QUANTIZED + 10**8)]


def test_a_16_bit_file_is_not_quantized(model: Model) -> None:
    steps = told(make(quantize={"types": ["f16"]}), direct=True, keep_intermediates=True)
    assert [step for step, *_ in steps] == ["fetch_base", "train_adapter", "merge_adapter", "convert_gguf"]


def test_the_sizes_are_those_of_the_estimate(model: Model) -> None:
    assert estimate.shape_of(model).parameters == PARAMETERS
    assert estimate.adapter_bytes(model) == ADAPTER
