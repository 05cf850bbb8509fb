"""Which tensors a merged checkpoint has: the base's with the adapter's updates, untied or resized where it says so."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.adapter_folder import CONFIG
from lib.checkpoint import is_embedding
from lib.four_bit import FourBit
from lib.lora import HEAD, LoraError, LowRank, Update
from lib.safetensors_file import StoredTensor

UNCHANGED = Update()
HEAD_WEIGHT = f"{HEAD}.weight"


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the result."""

    name: str
    shape: tuple[int, ...]
    base: StoredTensor
    update: Update
    four_bit: FourBit | None = None  # how the base was held in training, where that is what is merged into

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_values(self) -> int:
        """Values in one row."""
        return math.prod(self.shape[1:])

    @property
    def values(self) -> int:
        """Values of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class MergePlan:
    """The tensors of the result in their order, and what changes in config.json beside the dtype."""

    tensors: list[MergedTensor]
    config: dict[str, Any]


def plan_merge(
    base: Mapping[str, StoredTensor],
    updates: Mapping[str, Update],
    config: Mapping[str, Any],
    *,
    where: Path,
    is_target: Callable[[str], bool] = lambda module: False,
) -> MergePlan:
    """
    Hold every update against the tensor that it changes, and decide about tied and resized embeddings.

    A tied pair of which the adapter changes one alone is untied, since in training the other stayed as it was:
    the head becomes a tensor of its own and `tie_word_embeddings` false. Trained tokens stay tied, as in peft.

    Args:
        base: its tensors by name, in order.
        updates: of `read_lora`.
        config: the base's config.json.
        where: the adapter, for errors.
        is_target: of `read_targets`.

    Raises:
        LoraError: listing every update that fits nothing, or not in shape, and every target without a pair.
    """
    tensors, updates, changes, problems = dict(base), dict(updates), {}, []
    embedding = next((name for name in base if is_embedding(name)), None)
    # Some models' config.json leaves the default of their class unsaid: then the head is tied if it is not stored.
    if embedding is not None and config.get("tie_word_embeddings", HEAD_WEIGHT not in base):
        problems += _settle_pair(tensors, updates, changes, embedding)
    problems += [problem for name, update in updates.items() for problem in _misfits(name, update, tensors)]
    problems += [
        f"  {name}: {CONFIG} targets it, but it has no pair of factors"
        for name, tensor in base.items()
        if _is_counted(tensor, config) and is_target(name.removesuffix(".weight"))
        if updates.get(name, UNCHANGED).low_rank is None
    ]
    merged = [
        MergedTensor(name, _shape(tensor, updates.get(name, UNCHANGED)), tensor, updates.get(name, UNCHANGED))
        for name, tensor in tensors.items()
    ]
    vocabulary = {each.rows for each in merged if is_embedding(each.name) or each.name == HEAD_WEIGHT}
    if len(vocabulary) > 1:
        problems.append(f"  embedding and output head would have unlike numbers of rows: {sorted(vocabulary)}")
    elif embedding is not None and vocabulary != {base[embedding].rows}:
        changes["vocab_size"] = vocabulary.pop()
    if changes and "text_config" in config:
        problems.append(f"  it changes {' and '.join(changes)}, which a config.json of several parts cannot take")
    if problems:
        raise LoraError("\n".join([f"{where} does not fit this base:", *problems]))
    return MergePlan(merged, changes)


def hold_in_four_bits(plan: MergePlan, how: FourBit, *, where: Path) -> MergePlan:
    """
    Take the weights of the base as they were when it was held in 4 bits.

    Args:
        how: of lib.four_bit.read_four_bit.
        where: the base, for errors.

    Raises:
        LoraError: not those layers of this base were in 4 bits, or they were so in another order of values.
    """
    held = {tensor.name for tensor in plan.tensors if how.holds(tensor.name, tensor.base.shape)}
    if len(held) != how.layers:
        raise LoraError(
            f"{where} has {len(held)} matrices that could have been in 4 bits, and the adapter's manifest tells of "
            f"{how.layers} layers; merge onto the original weights"
        )
    turned = [each.name for each in plan.tensors if each.update.low_rank and each.update.low_rank.transposed]
    if turned := [name for name in turned if name in held]:
        raise LoraError(
            f"{where}: {turned[0]} is stored the other way round than it is quantized; merge onto the original weights"
        )
    return replace(
        plan,
        tensors=[
            replace(tensor, four_bit=how) if tensor.name in held and tensor.update.replaced is None else tensor
            for tensor in plan.tensors
        ],
    )


def _settle_pair(
    tensors: dict[str, StoredTensor], updates: dict[str, Update], changes: dict[str, Any], embedding: str
) -> list[str]:
    """Let the head of a tied pair follow its embedding, or make it a tensor of its own; gives what forbids both."""
    first, second = updates.get(embedding, UNCHANGED), updates.get(HEAD_WEIGHT, UNCHANGED)
    # Tokens that are the same for both are one tensor in training; peft may write it twice.
    other_tokens = second.rows is not None and (first.rows is None or first.rows[1] != second.rows[1])
    if not (_unties(first) or _unties(second) or other_tokens):
        updates.pop(HEAD_WEIGHT, None)
        if second.replaced is not None and (first.replaced is None or first.replaced.shape != second.replaced.shape):
            return [f"  {HEAD_WEIGHT}: tied to {embedding}, but saved otherwise"]
        if first != UNCHANGED and HEAD_WEIGHT in tensors:
            tensors[HEAD_WEIGHT], updates[HEAD_WEIGHT] = tensors[embedding], first
        return []
    changes["tie_word_embeddings"] = False
    tensors.setdefault(HEAD_WEIGHT, tensors[embedding])
    if first.tied and first.replaced is not None and second.replaced is None:
        updates[HEAD_WEIGHT] = replace(second, replaced=first.replaced)
    if first.rows is not None and second.rows is None:
        return [f"  {embedding}: its trained tokens are tied to {HEAD_WEIGHT}, which is trained by itself"]
    return []


def _is_counted(tensor: StoredTensor, config: Mapping[str, Any]) -> bool:
    """Whether a weight is a module when transformers loads it: experts may be stacked, drafting layers are left out."""
    if len(tensor.shape) != 2 or not tensor.name.endswith(".weight") or ".experts." in tensor.name:
        return False
    layer = re.search(r"\.layers\.(\d+)\.", tensor.name)
    beyond = layer is not None and int(layer[1]) >= config.get("num_hidden_layers", math.inf)
    return not beyond and not tensor.name.startswith("mtp.")


def _unties(update: Update) -> bool:
    """Whether an update of the embedding or the head leaves the other of a tied pair as it was."""
    return (update.replaced is not None and not update.tied) or update.low_rank is not None


def _shape(tensor: StoredTensor, update: Update) -> tuple[int, ...]:
    return update.replaced.shape if update.replaced is not None else tensor.shape


def _misfits(name: str, update: Update, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """How an update differs in shape from the tensor it changes."""
    tensor = tensors.get(name)
    if tensor is None:
        return [f"  {name}: the base has no such tensor"]
    shape, problems = _shape(tensor, update), []
    resizable = is_embedding(name) or name == HEAD_WEIGHT
    if shape != tensor.shape and not (resizable and shape[1:] == tensor.shape[1:]):
        problems.append(f"  {name}: {tensor.shape} in the base, {shape} in the adapter")
    if update.low_rank is not None and shape != _implied(update.low_rank):
        factors = f"A {update.low_rank.a.shape}, B {update.low_rank.b.shape}"
        problems.append(f"  {name}: {shape} in the base, {factors}")
    if update.added is not None and shape != update.added[0].shape:
        problems.append(f"  {name}: {shape}, bias of B {update.added[0].shape}")
    if update.rows is not None:
        values, rows = update.rows
        if values.shape[1:] != shape[1:] or any(not 0 <= row < shape[0] for row in rows):
            problems.append(f"  {name}: {shape}, trained tokens {values.shape} at {rows[:5]}")
    return problems


def _implied(update: LowRank) -> tuple[int, ...] | None:
    """The shape of the weight that two factors update; None if they do not fit each other."""
    if len(update.a.shape) != 2 or len(update.b.shape) != 2 or update.a.rows != update.b.row_values:
        return None
    out, into = update.b.rows, update.a.row_values
    if update.magnitude is not None and update.magnitude.values != out:
        return None
    return (into, out) if update.transposed else (out, into)
