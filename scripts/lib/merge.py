"""
Folding an adapter into weights, defined to the bit.

A low-rank update is summed over the rank in a fixed order of float32 operations, each rounded by itself:
acc = 0; for k < r: acc = acc + B[:, k]·A[k, :]; then W + scale·acc, rounded once to the output dtype.
No BLAS: its results change with the instruction set, the device and the shape of a block. Elementwise
float32 multiplication and addition, as separate operations, are IEEE everywhere, so any thread count, any
block of rows and any device give the same bytes. DoRA's norm of a row is a sum of squares in float64, over a
tree of halves; squares of float32 values are exact there. Of an embedding and of Conv1D it is that of a column as
stored, and groups of 64 rows are summed so, one after another. Where the base's 4-bit round trip is wanted instead of
its original weights (lib.four_bit), W is that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

from lib.errors import ModelmillError
from lib.fixed_sum import GROUP, add_rows, sum_rows
from lib.fold import add_products
from lib.four_bit import BlockScales, block_scales, round_trip
from lib.gpu_reading import own_stream, rows_on
from lib.in_order import in_order
from lib.lora import LowRank
from lib.safetensors_file import StoredTensor, read_columns, read_rows, read_values

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lib.merge_plan import MergedTensor

# Values in a block of rows, 16 MiB of float32: what a thread works on, and what is read and written at once.
BLOCK_VALUES = 1 << 22
MOST_NAMED = 20

Result = TypeVar("Result")


class MergeError(ModelmillError):
    """A merge would not give the right weights."""


def demand_device(device: str) -> None:
    """
    Raises:
        MergeError: it is "cuda", and there is no GPU that torch can use.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise MergeError("merge.device is cuda, but torch finds no GPU that it can use; set it to cpu")


@dataclass
class Overflows:
    """Tensors whose merged values are beyond the output dtype, with the largest, or not finite at all."""

    dtype: str
    largest: dict[str, float] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def note(self, name: str, values: Tensor) -> None:
        """Add the values of a block that does not fit."""

        largest = values.abs().max().item() if all_finite(values) else float("nan")
        with self._lock:
            known = self.largest.get(name, 0.0)
            self.largest[name] = float("nan") if math.isnan(known) or math.isnan(largest) else max(known, largest)

    def check(self) -> None:
        """
        Raises:
            MergeError: naming the tensors, their largest values and the remedy.
        """
        ordered = sorted(self.largest.items())
        broken = [name for name, value in ordered if math.isnan(value)]
        beyond = [f"{name}: {value:g}" for name, value in ordered if not math.isnan(value)]
        remedy = "float32" if self.dtype == "bfloat16" else "bfloat16"
        parts = [_listing("base or adapter hold values that are not finite:", broken)] if broken else []
        parts += [_listing(f"values beyond {self.dtype}; set merge.dtype: {remedy}:", beyond)] if beyond else []
        if parts:
            raise MergeError("\n".join(parts))


@dataclass(frozen=True)
class Whole:
    """
    What has to be known of a whole tensor before any of its rows can be merged.

    Attributes:
        scales: of the base's blocks, if the tensor is one that was held in 4 bits.
        lengths: of the columns of a transposed weight after its update, (columns,) float64, for DoRA.
    """

    scales: BlockScales | None = None
    lengths: Tensor | None = None


@dataclass(frozen=True)
class BlockTask(Generic[Result]):
    """
    A tensor to merge in blocks of rows, and what is done with each.

    Attributes:
        parts: the blocks in order, each by its first row and the one behind its last.
        work: given a block's first row and its rows in the output dtype, on the device.
    """

    tensor: MergedTensor
    parts: Iterable[tuple[int, int]]
    work: Callable[[int, Tensor], Result]


def _listing(title: str, lines: list[str]) -> str:
    more = [f"  and {len(lines) - MOST_NAMED} more"] if len(lines) > MOST_NAMED else []
    return "\n".join([title, *(f"  {line}" for line in lines[:MOST_NAMED]), *more])


def merged_blocks(
    tensors: Iterable[MergedTensor],
    *,
    dtype: torch.dtype,
    overflows: Overflows,
    threads: int,
    device: str = "cpu",
    block_values: int = BLOCK_VALUES,
) -> Iterator[Tensor]:
    """
    The rows of all tensors after the merge, in order, block by block in the output dtype, in RAM.

    Several threads read and compute ahead of whoever takes the blocks; memory is that of two blocks and their
    output for each.

    Args:
        overflows: takes note of blocks that do not fit the dtype; they are given all the same.
        device: where it is computed; "cpu" or "cuda".
    """

    def task(tensor: MergedTensor) -> BlockTask[Tensor]:
        step = max(1, block_values // max(1, tensor.row_values))
        parts = ((start, min(start + step, tensor.rows)) for start in range(0, tensor.rows, step))
        return BlockTask(tensor, parts, lambda start, block: block.cpu())

    yield from worked_blocks(map(task, tensors), dtype=dtype, overflows=overflows, threads=threads, device=device)


def worked_blocks(
    tasks: Iterable[BlockTask[Result]],
    *,
    dtype: torch.dtype,
    overflows: Overflows,
    threads: int,
    device: str,
) -> Iterator[Result]:
    """
    What becomes of blocks of merged rows, in order; several threads merge and work ahead of whoever takes it.

    Args:
        dtype, overflows, device: as for `merged_blocks`.
    """

    def compute(job: tuple[BlockTask[Result], Whole, int, int]) -> Result:
        task, whole, start, stop = job
        with own_stream(device):
            values = merged_rows(task.tensor, start, stop, whole=whole, device=device)
            block = values.to(dtype)
            if not all_finite(block):
                overflows.note(task.tensor.name, values)
            return task.work(start, block)

    def known(task: BlockTask[Result]) -> tuple[BlockTask[Result], Whole]:
        with own_stream(device):
            return task, look_through(task.tensor, device=device)

    def jobs() -> Iterator[tuple[BlockTask[Result], Whole, int, int]]:
        for task, whole in in_order(tasks, known, threads=threads):
            for start, stop in task.parts:
                yield task, whole, start, stop

    yield from in_order(jobs(), compute, threads=threads)


def merged_rows(
    tensor: MergedTensor, start: int, stop: int, *, whole: Whole | None = None, device: str = "cpu"
) -> Tensor:
    """
    Rows [start, stop) of one tensor after the merge.

    Args:
        whole: of `look_through`, which is called here if it is not given.

    Returns:
        (stop - start, row_values), float32, not rounded yet, on the device.
    """
    update, whole = tensor.update, whole or look_through(tensor, device=device)
    values = _adapted_rows(tensor, start, stop, scales=whole.scales, device=device)
    if update.low_rank is not None and update.low_rank.magnitude is not None:
        values = _set_lengths(values, update.low_rank.magnitude, start, stop, found=whole.lengths)
    if update.added is not None:
        bias, scale = update.added
        values = values + read_rows(bias, start, stop).to(device).float().mul_(scale)
    if update.rows is not None:
        source, rows = update.rows
        for place, row in enumerate(rows):
            if start <= row < stop:
                values[row - start] = read_rows(source, place, place + 1)[0].to(device).float()
    return values


def look_through(tensor: MergedTensor, *, device: str) -> Whole:
    """Read a tensor as a whole, a block of rows at a time, for what its merge needs to know of all of it."""
    update = tensor.update.low_rank
    scales = None if tensor.four_bit is None else block_scales(tensor.base, tensor.four_bit)
    if update is None or update.magnitude is None or not update.transposed:
        return Whole(scales)
    step = max(1, BLOCK_VALUES // tensor.row_values // GROUP) * GROUP
    squares = None
    for start in range(0, tensor.rows, step):
        values = _adapted_rows(tensor, start, min(start + step, tensor.rows), scales=scales, device=device)
        squares = values.new_zeros(values.shape[1]).double() if squares is None else squares
        add_rows(squares, values.double().square_())
    return Whole(scales, None if squares is None else squares.sqrt())


def _adapted_rows(tensor: MergedTensor, start: int, stop: int, *, scales: BlockScales | None, device: str) -> Tensor:
    """Rows of the base, or of what replaces it, with the low-rank update; float32, on the device."""
    update = tensor.update
    values = rows_on(device, update.replaced or tensor.base, start, stop).float()
    if tensor.four_bit is not None and scales is not None:
        values = round_trip(values, start * tensor.row_values, scales, tensor.four_bit)
    return values if update.low_rank is None else _add_low_rank(values, update.low_rank, start, stop)


def _set_lengths(values: Tensor, trained: StoredTensor, start: int, stop: int, *, found: Tensor | None) -> Tensor:
    """DoRA: give each row the trained length, or each column where their lengths are given; changes `values`."""
    if found is None:
        lengths = read_values(trained, start, stop - start).to(values.device).float()
        return values.mul_((lengths / row_norms(values).float()).unsqueeze(1))
    lengths = read_values(trained, 0, trained.values).to(values.device).float()
    return values.mul_(lengths / found.to(values.device).float())


def _add_low_rank(weight: Tensor, update: LowRank, start: int, stop: int) -> Tensor:
    """
    Add a low-rank update to rows of a weight, without DoRA's lengths.

    Args:
        weight: (stop - start, columns), float32: rows [start, stop) as they are stored; may be changed.
        update: of the whole weight.

    Returns:
        (stop - start, columns), float32.
    """
    import torch

    total = torch.zeros_like(weight)
    rank = update.a.rows
    step = max(1, BLOCK_VALUES // max(weight.shape))  # both factors' parts are no larger than a block
    for first in range(0, rank, step):
        last = min(first + step, rank)
        left, right = _factors(update, start, stop, first, last)
        add_products(total, left.to(weight.device), right.to(weight.device))
    # A multiplication and an addition, not `add(alpha=…)`, which may fuse the two.
    return total.mul_(update.scale).add_(weight)


def _factors(update: LowRank, start: int, stop: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Those (rows, ranks) and (ranks, columns) whose product updates rows of the weight as it is stored."""
    if update.transposed:
        left = read_columns(update.a, first, last, start, stop).float().t()
        right = read_columns(update.b, 0, update.b.rows, first, last).float().t()
        return left.contiguous(), right.contiguous()
    return read_columns(update.b, start, stop, first, last).float(), read_rows(update.a, first, last).float()


def all_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinity; `isfinite` of every value takes a CPU ten times as long."""
    return not values.numel() or all(math.isfinite(end) for end in values.aminmax())


def row_norms(values: Tensor) -> Tensor:
    """Euclidean length of each row of (rows, columns) float32 values, (rows,) float64, summed over a tree of halves."""
    return sum_rows(values.double().square_()).sqrt()
