"""Splitting of a batch that does not fit into memory: the same update in smaller parts, nothing restarts."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lib.console import say
from lib.errors import ModelmillError, first_line
from lib.train_settings import MicroBatching

Item = TypeVar("Item")
Result = TypeVar("Result")

# How torch and CUDA's libraries say that memory ran out where they do not raise OutOfMemoryError.
# cuBLAS makes its handle at the first product, and says NOT_INITIALIZED when there is no memory left for it.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "calling `cublasCreate",
)


class OutOfMemoryError(ModelmillError):
    """Even the smallest part of a batch does not fit."""


class MicroBatcher:
    """The size of the parts in which batches are computed: as large as fits, kept for the batches to come."""

    def __init__(self, settings: MicroBatching, *, batch_size: int, length: str) -> None:
        """
        Args:
            settings: of the splitting.
            batch_size: samples of the first parts tried, if the settings name no `micro_batch_size`.
            length: the setting that makes a sample smaller, for errors.
        """
        self._settings, self._length = settings, length
        self.size = settings.micro_batch_size or batch_size

    def run(
        self, samples: Sequence[Item], work: Callable[[list[Sequence[Item]]], Result], *, undo: Callable[[], None]
    ) -> Result:
        """
        Compute over all samples, in parts; when memory runs out, once more from the start in smaller ones.

        Args:
            samples: of one update.
            work: computes over the parts; called anew with smaller ones, from the same random state.
            undo: takes back what a broken `work` has done, as by dropping the gradients.

        Raises:
            OutOfMemoryError: the smallest parts allowed do not fit, or too many sizes were tried.
        """
        before = random_state()
        for attempt in range(self._settings.oom_retries + 1):
            parts = split_evenly(samples, self.size)
            try:
                return work(parts)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = first_line(error) or type(error).__name__
            # Not inside `except`, whose traceback keeps every tensor of the broken pass alive.
            undo()
            release_memory()
            set_random_state(before)
            self._shrink(max(map(len, parts)), failure, last=attempt == self._settings.oom_retries)
        raise AssertionError("the last attempt either returns or raises")

    def _shrink(self, tried: int, failure: str, *, last: bool) -> None:
        """Take the next smaller size, or give up."""
        settings = self._settings
        smaller = max(settings.min_micro_batch_size, int(tried / settings.mb_backoff_factor))
        if not settings.adaptive_micro_batch:
            remedy = "set micro_batching.adaptive_micro_batch: true, or lower per_device_train_batch_size"
        elif smaller >= tried:
            remedy = (
                f"set gradient_checkpointing: true, then offload.use_cpu_offload: true, or lower {self._length}"
                if tried == 1
                else f"lower micro_batching.min_micro_batch_size, or {self._length}"
            )
        elif last:
            remedy = "raise micro_batching.oom_retries, or lower micro_batching.micro_batch_size"
        else:
            say(f"out of memory with {tried} samples at a time, going on with {smaller} ({failure})")
            self.size = smaller
            return
        raise OutOfMemoryError(f"out of memory with {tried} samples at a time ({failure}); {remedy}")


def split_evenly(samples: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Slices of at most `size`, in order; only the last may be smaller."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the GPU or the CPU."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def release_memory() -> None:
    """Give back what nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def random_state() -> dict[str, Any]:
    """The state of every random generator that a training step may use."""
    import torch

    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "cpu": torch.get_rng_state(), "gpus": gpus}


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to a state that `random_state` gave."""
    import torch

    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"])
    if state["gpus"]:
        torch.cuda.set_rng_state_all(state["gpus"])
