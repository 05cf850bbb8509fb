"""Splitting of batches: what is tried, in which order, from which random state, and when it gives up."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lib.config import definition, with_defaults
from lib.micro_batch import MicroBatcher, OutOfMemoryError, is_out_of_memory, split_evenly
from lib.train_settings import MicroBatching
from lib.typed import build

SAMPLES = list(range(10))


def batcher(*, batch_size: int = 8, **settings: Any) -> MicroBatcher:
    filled = with_defaults(settings, definition("micro_batching"))
    return MicroBatcher(build(MicroBatching, filled), batch_size=batch_size, length="max_length")


class Machine:
    """A computation that fits no more than `room` samples at a time; it notes what was asked of it."""

    def __init__(self, room: int, error: BaseException | None = None) -> None:
        self.room, self.error = room, error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        self.tried: list[int] = []
        self.done: list[int] = []
        self.drawn: list[tuple[float, float]] = []

    def work(self, parts: list[list[int]]) -> int:
        self.tried.append(max(map(len, parts)))
        self.drawn.append((random.random(), torch.rand(1).item()))
        for part in parts:
            if len(part) > self.room:
                raise self.error
            self.done += part
        return len(self.done)

    def undo(self) -> None:
        self.done.clear()


def test_split_keeps_order_and_every_sample() -> None:
    assert split_evenly(SAMPLES, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_size_is_halved_until_it_fits_and_then_kept() -> None:
    machine, sized = Machine(room=3), batcher()
    assert sized.run(SAMPLES, machine.work, undo=machine.undo) == 10
    assert machine.tried == [8, 4, 2]
    assert machine.done == SAMPLES
    assert sized.size == 2
    machine.done.clear()
    sized.run(SAMPLES, machine.work, undo=machine.undo)
    assert machine.tried == [8, 4, 2, 2]


def test_every_try_begins_with_the_same_random_state() -> None:
    machine = Machine(room=1)
    batcher().run(SAMPLES, machine.work, undo=machine.undo)
    assert len(machine.drawn) == 4
    assert len(set(machine.drawn)) == 1


def test_a_batch_smaller_than_the_size_shrinks_from_its_own_length() -> None:
    machine, sized = Machine(room=1), batcher(batch_size=64)
    sized.run(SAMPLES[:4], machine.work, undo=machine.undo)
    assert machine.tried == [4, 2, 1]


def test_the_backoff_factor_and_first_size_are_the_settings() -> None:
    machine = Machine(room=2)
    batcher(micro_batch_size=9, mb_backoff_factor=3).run(SAMPLES, machine.work, undo=machine.undo)
    assert machine.tried == [9, 3, 1]


@pytest.mark.parametrize(
    ("settings", "tried", "said"),
    [
        ({}, [8, 4, 2, 1], "lower max_length"),
        ({"min_micro_batch_size": 3}, [8, 4, 3], "lower micro_batching.min_micro_batch_size"),
        ({"oom_retries": 1}, [8, 4], "raise micro_batching.oom_retries"),
        ({"adaptive_micro_batch": False}, [8], "adaptive_micro_batch: true"),
    ],
)
def test_it_gives_up_with_what_to_change(settings: dict[str, Any], tried: list[int], said: str) -> None:
    machine = Machine(room=0)
    with pytest.raises(OutOfMemoryError, match=said) as refused:
        batcher(**settings).run(SAMPLES, machine.work, undo=machine.undo)
    assert machine.tried == tried
    assert machine.done == []
    assert "Tried to allocate 2 GiB" in str(refused.value)


def test_the_retry_begins_when_the_failed_pass_is_gone() -> None:
    """Inside `except` the traceback would keep every tensor of the failed pass alive."""

    class Large:
        alive = 0

        def __init__(self) -> None:
            Large.alive += 1

        def __del__(self) -> None:
            Large.alive -= 1

    seen: list[int] = []

    def work(parts: list[list[int]]) -> None:
        seen.append(Large.alive)
        held = Large()
        if len(parts) == 1:
            raise torch.OutOfMemoryError(f"out of memory beside {held}")

    batcher(batch_size=10).run(SAMPLES, work, undo=lambda: None)
    assert seen == [0, 0]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)


def test_other_errors_pass() -> None:
    machine = Machine(room=0, error=RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="shapes"):
        batcher().run(SAMPLES, machine.work, undo=machine.undo)
    assert machine.tried == [8]
