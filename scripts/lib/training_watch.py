"""What a training run shows while it runs: progress, TensorBoard scalars, its history; and how it is stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lib.console import Progress, note, progress, say
from lib.split_trainer import SplitTrainer

GB = 1e9
# Signals that come within so many seconds are one: at a time limit Slurm sends SIGTERM twice within some 20 ms, itself
# and through srun, and the second one was seen to cut the checkpoint short.
ONE_SIGNAL = 2.0
# History and TensorBoard names of the same figures; speed is in the trainer's unit.
SCALARS = {
    "loss": "train/loss",
    "learning_rate": "train/lr",
    "{unit}_per_second": "train/{unit}_per_second",
    "micro_batch_size": "train/micro_batch_size",
    "allocated_gb": "memory/allocated_gb",
    "cached_gb": "memory/cached_gb",
}


def scalars_of(unit: str) -> dict[str, str]:
    """SCALARS of a run whose speed is counted in tokens, or frames."""
    return {key.format(unit=unit): name.format(unit=unit) for key, name in SCALARS.items()}


class Watcher(TrainerCallback):
    """Shows each update on the terminal, writes it to TensorBoard and into the Trainer's history."""

    def __init__(self, *, tensorboard: Path | None) -> None:
        """
        Args:
            tensorboard: folder of the event files; None writes none.
        """
        self.trainer: SplitTrainer
        self._folder = tensorboard
        self._bar: Progress
        self._shown: Any = None
        self._writer: Any = None
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar, at the step from which a run goes on."""
        self._shown = progress("training", total=state.max_steps, unit="step")
        self._bar = self._shown.__enter__()
        self._bar.advance(state.global_step)
        if self._folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._folder.mkdir(parents=True, exist_ok=True)
            # What a killed run wrote beyond its last checkpoint is hidden: these steps are done again.
            self._writer = SummaryWriter(str(self._folder), purge_step=state.global_step + 1)
        self._last = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Add speed and memory to what the Trainer has just written into its history."""
        entry = state.log_history[-1]
        if "eval_loss" in logs:
            self._write({"eval/loss": logs["eval_loss"]}, state.global_step)
            if self._writer is not None:
                for name, picture in self.trainer.pictures().items():
                    self._writer.add_image(name, picture, state.global_step, dataformats="HWC")
            say(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
            self._last = time.monotonic()  # evaluating is no part of the next update's time
        elif "loss" in logs:
            now = time.monotonic()
            unit, count = self.trainer.unit, self.trainer.units_of_update
            seconds = max(now - self._last, 1e-9)
            entry |= {
                unit: count,
                "seconds": seconds,
                f"{unit}_per_second": count / seconds,
                "micro_batch_size": self.trainer.batcher.size,
                **used_memory(),
            }
            self._last = now
            self._write({name: entry[key] for key, name in scalars_of(unit).items()}, state.global_step)
            remark = f"loss {entry['loss']:.3f}, {count / seconds:.0f} {unit}/s"
            self._bar.advance(remark=remark)
            note(f"step {state.global_step} of {state.max_steps}: {remark}, lr {entry['learning_rate']:.3g}")

    def _write(self, scalars: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Remove the bar and close the event file; also after an error."""
        if self._shown is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()


class StopOnSignal(TrainerCallback):
    """SIGTERM and Ctrl-C end the run after the update in progress, with a checkpoint; a second one at once."""

    def __init__(self) -> None:
        self.stopped, self._process = False, os.getpid()
        self._asked = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:
            return  # in a process that reads samples, which has this from its parent
        if self.stopped:
            if time.monotonic() - self._asked < ONE_SIGNAL:
                return
            raise KeyboardInterrupt
        self.stopped, self._asked = True, time.monotonic()
        say("stopping after this update, with a checkpoint; once more stops at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask the Trainer for a checkpoint and the end."""
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


def used_memory() -> dict[str, float]:
    """Memory of all GPUs together in GB (10^9): by tensors, and held by torch's cache."""
    cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return {
        "allocated_gb": sum(torch.cuda.memory_allocated(card) for card in cards) / GB,
        "cached_gb": sum(torch.cuda.memory_reserved(card) for card in cards) / GB,
    }


def peak_memory() -> list[float]:
    """The most that tensors took on each GPU so far, in GB (10^9)."""
    cards = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return [torch.cuda.max_memory_allocated(card) / GB for card in cards]
