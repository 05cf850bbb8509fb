"""Which tensors a merge writes: by headers alone, so nothing here has values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lib.lora import LoraError, LowRank, Update
from lib.merge_plan import MergedTensor, MergePlan, plan_merge
from lib.safetensors_file import StoredTensor

EMBEDDING, HEAD, LAYER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
ADAPTER = Path("adapters/x")


def stored(name: str, *shape: int) -> StoredTensor:
    return StoredTensor(name=name, dtype="F16", shape=shape, file=Path("x"), offset=0)


def base(*, head: bool = True, rows: int = 10) -> dict[str, StoredTensor]:
    shapes = {EMBEDDING: (rows, 4), LAYER: (6, 4), "model.norm.weight": (4,), **({HEAD: (rows, 4)} if head else {})}
    return {name: stored(name, *shape) for name, shape in shapes.items()}


def saved(*shape: int, tied: bool = False) -> Update:
    return Update(replaced=stored("saved", *shape), tied=tied)


def low_rank(rows: int, columns: int, *, rank: int = 2, transposed: bool = False) -> Update:
    return Update(low_rank=LowRank(stored("a", rank, columns), stored("b", rows, rank), 1.0, transposed=transposed))


def tokens(*rows: int, columns: int = 4) -> Update:
    return Update(rows=(stored("tokens", len(rows), columns), rows))


def plan(updates: dict[str, Update], tensors: dict[str, StoredTensor] | None = None, **config: Any) -> MergePlan:
    is_target = config.pop("is_target", lambda module: False)
    return plan_merge(base() if tensors is None else tensors, updates, config, where=ADAPTER, is_target=is_target)


def problems(*arguments: Any, **config: Any) -> list[str]:
    with pytest.raises(LoraError, match=f"^{ADAPTER} does not fit this base:\n") as refused:
        plan(*arguments, **config)
    return [line.strip() for line in str(refused.value).splitlines()[1:]]


def by_name(found: MergePlan) -> dict[str, MergedTensor]:
    names = [tensor.name for tensor in found.tensors]
    assert len(set(names)) == len(names)
    return {tensor.name: tensor for tensor in found.tensors}


@pytest.mark.parametrize("tied", [False, True])
def test_without_an_adapter_all_stays(tied: bool) -> None:
    found = plan({}, tie_word_embeddings=tied)
    assert [tensor.base for tensor in found.tensors] == list(base().values())
    assert all(tensor.update == Update() and tensor.shape == tensor.base.shape for tensor in found.tensors)
    assert found.config == {}


def test_every_update_finds_its_tensor_in_the_bases_order() -> None:
    updates = {"model.norm.weight": saved(4), LAYER: low_rank(6, 4), EMBEDDING: tokens(9, 0)}
    found = by_name(plan(updates))
    assert list(found) == list(base())
    assert {name: tensor.update for name, tensor in found.items() if tensor.update != Update()} == updates


def test_what_is_read_is_not_changed() -> None:
    tensors, updates = base(head=False), {EMBEDDING: saved(12, 4, tied=True), HEAD: saved(12, 4, tied=True)}
    plan(updates, tensors, tie_word_embeddings=True)
    assert tensors == base(head=False)
    assert list(updates) == [EMBEDDING, HEAD]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 4), (5, 0)], ids=str)
def test_sizes_of_a_tensor(shape: tuple[int, ...]) -> None:
    tensor, held = MergedTensor("x", shape, stored("x", *shape), Update()), stored("x", *shape)
    assert (tensor.rows, tensor.values) == (held.rows, held.values)
    assert tensor.rows * tensor.row_values == tensor.values


MISFITS: dict[str, tuple[str, Update, str]] = {
    "absent": ("model.layers.7.x.weight", low_rank(6, 4), "the base has no such tensor"),
    "turned": (LAYER, low_rank(4, 6), "(6, 4) in the base, A (2, 6), B (4, 2)"),
    "turned as stored": (LAYER, low_rank(6, 4, transposed=True), "(6, 4) in the base, A (2, 4), B (6, 2)"),
    "a vector": ("model.norm.weight", low_rank(4, 1), "(4,) in the base, A (2, 1), B (4, 2)"),
    "ranks that differ": (
        LAYER,
        Update(low_rank=LowRank(stored("a", 2, 4), stored("b", 6, 3), 1.0)),
        "(6, 4) in the base, A (2, 4), B (6, 3)",
    ),
    "a cube": (
        LAYER,
        Update(low_rank=LowRank(stored("a", 2, 2, 2), stored("b", 6, 2), 1.0)),
        "(6, 4) in the base, A (2, 2, 2), B (6, 2)",
    ),
    "saved otherwise": (LAYER, saved(7, 4), "(6, 4) in the base, (7, 4) in the adapter"),
    "an embedding of another width": (EMBEDDING, saved(10, 5), "(10, 4) in the base, (10, 5) in the adapter"),
    "a bias": ("model.norm.weight", Update(added=(stored("bias", 5), 1.0)), "(4,), bias of B (5,)"),
    "a token too far": (EMBEDDING, tokens(3, 10), "(10, 4), trained tokens (2, 4) at (3, 10)"),
    "a token before the first": (EMBEDDING, tokens(-1), "(10, 4), trained tokens (1, 4) at (-1,)"),
    "tokens of another width": (EMBEDDING, tokens(1, columns=5), "(10, 4), trained tokens (1, 5) at (1,)"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_an_update_that_does_not_fit(kind: str) -> None:
    name, update, line = MISFITS[kind]
    assert problems({name: update}) == [f"{name}: {line}"]


def test_a_magnitude_of_another_length() -> None:
    update = low_rank(6, 4)
    assert update.low_rank is not None
    for length, fits in ((6, True), (5, False)):
        changed = replace(update, low_rank=replace(update.low_rank, magnitude=stored("m", length)))
        if fits:
            plan({LAYER: changed})
        else:
            assert problems({LAYER: changed}) == [f"{LAYER}: (6, 4) in the base, A (2, 4), B (6, 2)"]


def test_all_that_does_not_fit_is_listed() -> None:
    updates = {name: update for name, update, _ in (MISFITS["absent"], MISFITS["turned"], MISFITS["a token too far"])}
    assert len(problems(updates)) == 3


TARGETS = {
    "without a pair": (stored("model.layers.1.mlp.up_proj.weight", 6, 4), True),
    "outside of layers": (stored("proj.weight", 6, 4), True),
    "a vector": (stored("model.layers.1.norm.weight", 4), False),
    "a bias": (stored("model.layers.1.mlp.up_proj.bias", 6), False),
    "an expert, which transformers may stack": (stored("model.layers.1.mlp.experts.0.up_proj.weight", 6, 4), False),
    "a layer that transformers leaves out": (stored("model.layers.2.mlp.up_proj.weight", 6, 4), False),
    "a drafting head": (stored("mtp.layers.0.mlp.up_proj.weight", 6, 4), False),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_a_target_without_a_pair(kind: str) -> None:
    tensor, counted = TARGETS[kind]
    tensors = {**base(), tensor.name: tensor}

    def is_target(module: str) -> bool:
        return module in (LAYER.removesuffix(".weight"), tensor.name.rpartition(".")[0])

    settings = {"is_target": is_target, "num_hidden_layers": 2}
    if counted:
        line = f"{tensor.name}: adapter_config.json targets it, but it has no pair of factors"
        assert problems({LAYER: low_rank(6, 4)}, tensors, **settings) == [line]
    else:
        plan({LAYER: low_rank(6, 4)}, tensors, **settings)


@pytest.mark.parametrize("stored_head", [False, True], ids=["head not stored", "head stored"])
@pytest.mark.parametrize(
    ("updates", "apart"),
    [
        ({EMBEDDING: low_rank(4, 10, transposed=True)}, True),
        ({HEAD: low_rank(10, 4)}, True),
        ({EMBEDDING: saved(10, 4)}, True),
        ({HEAD: saved(10, 4)}, True),
        ({HEAD: tokens(2)}, True),
        ({EMBEDDING: tokens(3), HEAD: tokens(2)}, True),
        ({EMBEDDING: saved(10, 4, tied=True)}, False),
        ({EMBEDDING: saved(10, 4, tied=True), HEAD: saved(10, 4, tied=True)}, False),
        ({EMBEDDING: tokens(3)}, False),
        ({EMBEDDING: tokens(3), HEAD: tokens(3)}, False),
        ({LAYER: low_rank(6, 4)}, False),
    ],
)
def test_a_tied_pair(updates: dict[str, Update], apart: bool, stored_head: bool) -> None:
    """Taken apart where one alone is trained; else the head is the embedding, whether it is stored or not."""
    tensors = base(head=stored_head)
    found = plan(updates, tensors, tie_word_embeddings=True)
    named = by_name(found)
    assert found.config == ({"tie_word_embeddings": False} if apart else {})
    assert (HEAD in named) == (apart or stored_head)
    assert named[EMBEDDING].update == updates.get(EMBEDDING, Update())
    if apart:
        assert named[HEAD].update == updates.get(HEAD, Update())
        assert named[HEAD].base == tensors[HEAD if stored_head else EMBEDDING]
    elif stored_head and EMBEDDING in updates:
        assert (named[HEAD].base, named[HEAD].update) == (tensors[EMBEDDING], updates[EMBEDDING])


@pytest.mark.parametrize(("head", "tied"), [(False, True), (True, False)])
def test_a_tie_that_config_json_leaves_unsaid(head: bool, tied: bool) -> None:
    """The default of the model's class is not there to be read: a head that is not stored can only be tied."""
    found = plan({EMBEDDING: low_rank(4, 10, transposed=True)}, base(head=head))
    assert found.config == ({"tie_word_embeddings": False} if tied else {})
    assert by_name(found)[HEAD].update == Update()


def test_an_untied_embedding_alone() -> None:
    found = plan({EMBEDDING: saved(10, 4)}, tie_word_embeddings=False)
    assert found.config == {}
    assert by_name(found)[HEAD].update == Update()


@pytest.mark.parametrize("rows", [8, 12])
def test_a_resized_vocabulary(rows: int) -> None:
    updates = {EMBEDDING: saved(rows, 4, tied=True), HEAD: saved(rows, 4, tied=True), LAYER: low_rank(6, 4)}
    for tied, head in ((False, True), (True, True), (True, False)):
        found = plan(updates, base(head=head), tie_word_embeddings=tied, vocab_size=10)
        assert found.config == {"vocab_size": rows}
        named = by_name(found)
        assert {named[name].shape for name in (EMBEDDING, HEAD) if name in named} == {(rows, 4)}


def test_lora_on_a_tied_embedding_that_grew() -> None:
    """The head gets what the embedding was before its update, grown."""
    grown = stored("saved", 12, 4)
    update = replace(low_rank(4, 12, transposed=True), replaced=grown, tied=True)
    found = plan({EMBEDDING: update}, base(head=False), tie_word_embeddings=True)
    assert found.config == {"tie_word_embeddings": False, "vocab_size": 12}
    head = by_name(found)[HEAD]
    assert (head.shape, head.update.replaced, head.update.low_rank) == ((12, 4), grown, None)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_half_a_resized_vocabulary(name: str) -> None:
    assert problems({name: saved(12, 4)}, tie_word_embeddings=False) == [
        "embedding and output head would have unlike numbers of rows: [10, 12]"
    ]


@pytest.mark.parametrize("embedding", [{}, {EMBEDDING: saved(11, 4, tied=True)}], ids=["alone", "of another size"])
def test_a_tied_head_saved_otherwise_than_its_embedding(embedding: dict[str, Update]) -> None:
    line = f"{HEAD}: tied to {EMBEDDING}, but saved otherwise"
    assert problems({**embedding, HEAD: saved(12, 4, tied=True)}, base(head=False), tie_word_embeddings=True) == [line]


@pytest.mark.parametrize("update", [low_rank(10, 4), saved(10, 4)], ids=["lora", "saved"])
def test_tied_tokens_beside_a_head_of_its_own(update: Update) -> None:
    line = f"{EMBEDDING}: its trained tokens are tied to {HEAD}, which is trained by itself"
    assert problems({EMBEDDING: tokens(1), HEAD: update}, base(head=False), tie_word_embeddings=True) == [line]


def test_tokens_beyond_the_old_vocabulary() -> None:
    update = replace(tokens(11, 2), replaced=stored("saved", 12, 4), tied=True)
    assert plan({EMBEDDING: update}, base(head=False), tie_word_embeddings=True).config == {"vocab_size": 12}


def test_a_config_of_several_parts() -> None:
    """Its sizes are not at its top; what changes none of them can be merged."""
    nested: dict[str, Any] = {"text_config": {"vocab_size": 10}, "tie_word_embeddings": True}
    line = "it changes tie_word_embeddings, which a config.json of several parts cannot take"
    assert problems({HEAD: saved(10, 4)}, base(head=False), **nested) == [line]
    plan({LAYER: low_rank(6, 4)}, base(head=False), **nested)
