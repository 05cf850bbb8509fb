"""How the disk fills: by hand for a model of known sizes, on each path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lib import estimate
from lib.disk_ledger import Entry, disk_ledger
from lib.spec import Model, Project, resolve_project
from lib.step_needs import judging_steps, planned_steps

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


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("talks.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "read.txt").write_text("Read. " * 1000)


def make(*, keep: bool = True, **changes: Any) -> Project:
    base = {"hub": "maker/model", "revision": "main", "shape": SHAPE}
    train = {"train": {"data": "talks.jsonl", "lora": {"r": 16}}}
    model = {"base": base, "adapter": train, **changes}
    return resolve_project({"keep_intermediates": keep, "models": {"m": model}})


def ledger(project: Project, *, direct: bool) -> list[Entry]:
    return disk_ledger(model_of(project), planned_steps(model_of(project), direct=direct), project)


def model_of(project: Project) -> Model:
    return project.models["m"]


def told(entries: list[Entry]) -> list[tuple[str, int, int]]:
    """Step, bytes afterwards, bytes meanwhile."""
    return [(each.step, each.held, each.peak) for each in entries]


def test_the_direct_path() -> None:
    before = BASE + ADAPTER
    assert told(ledger(make(), direct=True)) == [
        ("fetch_base", BASE, BASE),
        ("train_adapter", before, before),
        ("build_direct", before + QUANTIZED, before + QUANTIZED + 10**8),
    ]


@pytest.mark.parametrize("keep", [True, False])
def test_the_staged_path(keep: bool) -> None:
    before = BASE + ADAPTER
    both = before + 2 * BASE
    f16 = both if keep else before + BASE
    assert told(ledger(make(keep=keep), direct=False))[2:] == [
        ("merge_adapter", before + BASE, before + BASE),
        ("convert_gguf", f16, both),
        ("quantize_gguf", f16 + QUANTIZED if keep else before + QUANTIZED, f16 + QUANTIZED),
    ]


def test_registering_takes_four_copies_for_a_while() -> None:
    (registered,) = disk_ledger(model_of(make()), ["register_model"], make(), held=BASE)
    assert (registered.added, registered.peak - BASE) == (QUANTIZED, 4 * QUANTIZED)


CHUNKS = 20
# Sixteen-bit numbers and two of 32 bits, of every second token of a chunk of 512, and the tokens themselves.
LOGITS = CHUNKS * (255 * 2 * (152064 + 4) + 4 * 512)


def judged(project: Project, *, direct: bool) -> list[Entry]:
    """What follows on the plan when the report on quality is asked for."""
    model, held = model_of(project), ledger(project, direct=direct)[-1].held
    steps = judging_steps(model, direct=direct, keep_intermediates=project.keep_intermediates)
    return disk_ledger(model, steps, project, held=held)


def test_what_a_16_bit_file_says_of_each_token_lies_there_meanwhile() -> None:
    quality = {"text": "read.txt", "chunks": CHUNKS, "types": ["q8_0"]}
    built, more = BASE + ADAPTER + 2 * BASE + QUANTIZED, round(PARAMETERS * 8.5 / 8)
    entries = judged(make(quality=quality), direct=False)
    assert [entry.step for entry in entries] == ["quantize_gguf", "measure_types"]
    assert entries[0].held == built + more == entries[1].held
    assert entries[1].peak - entries[1].held == pytest.approx(LOGITS, abs=10**6)


def test_judging_makes_the_16_bit_file_where_there_is_none() -> None:
    """Of what was built directly, or let go; and it is let go again."""
    quality = {"text": "read.txt", "chunks": CHUNKS}
    built = BASE + ADAPTER + QUANTIZED
    for project, direct in ((make(keep=False, quality=quality), False), (make(quality=quality), True)):
        keep = project.keep_intermediates
        entries = judged(project, direct=direct)
        assert [entry.step for entry in entries] == ["merge_adapter", "convert_gguf", "measure_types"]
        assert entries[1].peak == built + 2 * BASE
        assert entries[-1].held == built + (2 * BASE if keep else 0)
        assert entries[-1].peak == pytest.approx(built + (2 if keep else 1) * BASE + LOGITS, abs=10**6)


def test_the_base_is_built_for_what_tuning_brought() -> None:
    quality = {"text": "read.txt", "chunks": CHUNKS, "base_weights": True}
    train = {"data": "talks.jsonl", "lora": {"r": 16}, "eval_data": "held_out.jsonl", "method": "qlora"}
    project = make(quality=quality, adapter={"train": train}, keep=False)
    entries = judged(project, direct=False)
    steps = ["measure_types", "compare_merges", "convert_gguf.base", "quantize_gguf.base", "measure_tuning"]
    assert [entry.step for entry in entries] == ["merge_adapter", "convert_gguf", *steps]
    built = BASE + ADAPTER + 2 * QUANTIZED
    assert entries[-1].held == built and entries[-2].peak == built + BASE
    assert entries[-1].peak == pytest.approx(built + LOGITS, abs=10**6)


@pytest.mark.parametrize("keep", [True, False])
def test_a_matrix_that_q8_0_computes_takes_no_16_bit_file(keep: bool) -> None:
    """On the direct path there is none, and so none that is let go."""
    project = make(keep=keep, quantize={"imatrix": {"text": "read.txt"}})
    entries = ledger(project, direct=True)[2:]
    assert [entry.step for entry in entries] == ["build_direct", "compute_imatrix", "build_direct"]
    assert not any(entry.removed for entry in entries)
    assert entries[-1].held == BASE + ADAPTER + round(PARAMETERS * 8.5 / 8) + QUANTIZED


def test_nothing_is_judged_without_a_text() -> None:
    assert judged(make(), direct=True) == []


@pytest.mark.parametrize("keep", [True, False])
def test_with_limits_judging_is_part_of_the_plan(keep: bool) -> None:
    quality = {"text": "read.txt", "chunks": CHUNKS, "max_kld": 1.0, "types": ["q8_0"]}
    project = make(quality=quality, keep=keep)
    planned = ledger(project, direct=False)
    assert [entry.step for entry in planned[-3:]] == ["quantize_gguf", "quantize_gguf", "measure_types"]
    assert planned[-2].held - planned[-1].held == (0 if keep else BASE)
    assert judged(project, direct=False) == []


def test_a_base_that_is_there_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config.json").write_text("{}")
    own = make(base={"path": "own", "shape": SHAPE}, adapter=None)
    assert told(ledger(own, direct=True)) == [("build_direct", QUANTIZED, QUANTIZED + 10**8)]


def test_a_16_bit_file_is_not_quantized() -> None:
    entries = ledger(make(quantize={"types": ["f16"]}), direct=True)
    assert [entry.step for entry in entries] == ["fetch_base", "train_adapter", "merge_adapter", "convert_gguf"]


def test_the_sizes_are_those_of_the_estimate() -> None:
    assert estimate.shape_of(model_of(make())).parameters == PARAMETERS
    assert estimate.adapter_bytes(model_of(make())) == ADAPTER
