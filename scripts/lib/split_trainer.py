"""transformers' Trainer with what it lacks: updates that are split when memory runs out, and complete checkpoints."""

from __future__ import annotations

import errno
import json
import math
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from lib.base_model import DTYPES
from lib.checkpoints import PREFIX, mark_complete, newest_checkpoint, step_of
from lib.errors import ModelmillError
from lib.heatmap_settings import TrainHeatmap
from lib.micro_batch import MicroBatcher
from lib.train_settings import Train

TRAINED, BEST, PROGRESS = "trained.safetensors", "best.safetensors", "progress.json"
# float16 loses gradients below 6e-8: the loss is multiplied by this, and by half of it after an overflow.
FIRST_LOSS_SCALE = 2.0**16
Item = TypeVar("Item")


class TrainingError(ModelmillError):
    """A training run cannot start or must not go on."""


class _Overflow(Exception):
    """A gradient went beyond float16's range."""


class SplitTrainer(Trainer, Generic[Item]):
    """
    Trains a model's trainable weights on samples of one kind; a subclass says what these are and what is lost on them.

    The Trainer's batch is here all samples of one update, gradient accumulation included, so that an update
    that runs out of memory is done again as a whole, in smaller parts.
    """

    unit: str  # what speed is counted in, as in "tokens"
    length: str  # the setting that makes a sample smaller

    def __init__(
        self,
        *,
        settings: Train | TrainHeatmap,
        data_collator: Callable[[list[Item]], Sequence[Item]] = list,
        **shared: Any,
    ) -> None:
        """
        Args:
            settings: of the run.
            data_collator: makes a batch of samples, of which slices are smaller batches.
            shared: other arguments of transformers' Trainer.
        """
        super().__init__(data_collator=data_collator, **shared)
        self.remove_callback(PrinterCallback)
        self._settings = settings
        self._dtype = getattr(torch, DTYPES[settings.precision])
        self.search_micro_batch()
        self.loss_scale = FIRST_LOSS_SCALE if settings.precision == "fp16" else 1.0
        self.units_of_update = 0
        self.best: tuple[float, int] | None = None
        self._best_weights: dict[str, torch.Tensor] = {}

    def search_micro_batch(self) -> None:
        """Begin with as large parts as the settings say, whatever was found to fit before."""
        asked = self._settings
        self.batcher: MicroBatcher = MicroBatcher(
            asked.micro_batching, batch_size=asked.per_device_train_batch_size, length=self.length
        )

    @abstractmethod
    def summed_loss(self, part: Sequence[Item]) -> torch.Tensor:
        """The loss of samples that are computed at a time, summed over what `weigh` counts; a scalar."""

    @abstractmethod
    def weigh(self, samples: Sequence[Item]) -> int:
        """How many losses `summed_loss` of these samples is a sum of."""

    @abstractmethod
    def count_units(self, samples: Sequence[Item]) -> int:
        """The size of these samples in `unit`."""

    def in_order(self, samples: Sequence[Item]) -> Sequence[Item]:
        """Samples in the order in which they are computed."""
        return samples

    def pictures(self) -> dict[str, Any]:
        """What an evaluation shows in TensorBoard, by name: (height, width, 3), uint8."""
        return {}

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The weights that are trained, by name."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def _run_epoch(self, **shared: Any) -> None:
        """Not for a run that goes on from the checkpoint of its last update: the Trainer would do another one."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**shared)

    def training_step(self, model: Any, inputs: Sequence[Item], num_items_in_batch: Any = None) -> torch.Tensor:
        """
        Compute the gradient of one update, split into as many parts as memory asks for.

        All that `weigh` counts weighs the same, in whichever part it stands: the gradient is that of the whole batch.

        Returns:
            The update's mean loss, a scalar on the Trainer's device.
        """
        model.train()
        samples = self.in_order(inputs)
        loss = self._redo_on_overflow(samples)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.state.global_step + 1}; {self._last_good()}; "
                "lower learning_rate, or set precision: fp32 or bf16"
            )
        self.units_of_update = self.count_units(samples)
        return torch.tensor(loss, device=self.args.device)

    def _redo_on_overflow(self, samples: Sequence[Item]) -> float:
        while True:
            try:
                return self.batcher.run(samples, self._gradient, undo=self._drop_gradients)
            except _Overflow:
                if self.loss_scale <= 2.0**-10:
                    return math.nan
            self.loss_scale /= 2
            self._drop_gradients()

    def _gradient(self, parts: list[Sequence[Item]]) -> float:
        """Sum the gradients of all parts; returns the mean loss."""
        weight = sum(map(self.weigh, parts))
        losses = []
        for part in parts:
            with self._computing():
                loss = self.summed_loss(part) / weight
            (loss * self.loss_scale).backward()
            losses.append(loss.detach())
        if self.loss_scale != 1.0:
            self._unscale()
        # Not before: reading a value waits for the device, which then waits for the next part to be launched.
        return sum(loss.item() for loss in losses)

    def _unscale(self) -> None:
        for weight in self.trained.values():
            if weight.grad is not None:
                weight.grad.div_(self.loss_scale)
                if not torch.isfinite(weight.grad).all():
                    raise _Overflow

    def _drop_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Mixed precision for the matrix products, and the place where activations are kept."""
        device = self.args.device.type
        with ExitStack() as contexts:
            if self._dtype is not torch.float32:
                contexts.enter_context(torch.autocast(device, self._dtype))
            if self._settings.offload.use_cpu_offload and device != "cpu":
                contexts.enter_context(torch.autograd.graph.save_on_cpu(pin_memory=True))
            yield

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """
        Measure the loss on the held-out samples, split as training is; remembers the best weights.

        Returns:
            {"eval_loss"}: mean over all that `weigh` counts.
        """
        self.model.eval()
        loss = self.held_out_loss()
        self.model.train()
        if self._settings.load_best_model_at_end and (self.best is None or loss < self.best[0]):
            self.best = (loss, self.state.global_step)
            self._best_weights = {name: weight.detach().cpu().clone() for name, weight in self.trained.items()}
        metrics = {"eval_loss": loss}
        self.log(dict(metrics))
        # The Trainer's own `evaluate` tells its callbacks, one of which then takes back the order to evaluate.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_loss(self) -> float:
        """The mean loss on the held-out samples."""
        samples = self.in_order(self.eval_dataset)
        return self.batcher.run(samples, self._sum_losses, undo=lambda: None) / self.weigh(samples)

    @torch.no_grad()
    def _sum_losses(self, parts: list[Sequence[Item]]) -> float:
        total = 0.0
        for part in parts:
            with self._computing():
                total += self.summed_loss(part).item()
        return total

    def is_evaluated(self) -> bool:
        """Whether the weights as they are now were evaluated."""
        return any("eval_loss" in entry for entry in self.state.log_history if entry["step"] == self.state.global_step)

    def take_best(self) -> None:
        """Put the weights of the lowest held-out loss in place."""
        self._put_weights(self._best_weights)

    def _move_model_to_device(self, model: Any, device: Any) -> Any:
        """The model is where it belongs, parts of it perhaps on other devices."""
        return model

    def floating_point_ops(self, inputs: Any) -> int:
        """Nothing here reads this count, and the Trainer's needs tensors."""
        return 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint that counts only once it is complete; the one before stays until then."""
        broken = [name for name, weight in self.trained.items() if not torch.isfinite(weight).all()]
        if broken:
            raise TrainingError(
                f"{len(broken)} trained weights are not finite after step {self.state.global_step} (first: "
                f"{broken[0]}); {self._last_good()}; lower learning_rate"
            )
        run = Path(self.args.output_dir)
        folder = run / f"{PREFIX}{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            mark_complete(folder)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            if not _is_full_disk(error):
                raise
            raise TrainingError(
                f"the disk is full: the checkpoint at step {self.state.global_step} could not be written; "
                f"{self._last_good()}; free some space and run the same command again"
            ) from error
        for older in run.glob(f"{PREFIX}*"):
            if older != folder:
                shutil.rmtree(older)

    def _last_good(self) -> str:
        newest = newest_checkpoint(Path(self.args.output_dir))
        return f"the checkpoint at step {step_of(newest)} is kept" if newest else "there is no checkpoint yet"

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the trained weights alone, and what the next parts of the run have to know."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.detach().cpu().contiguous() for name, weight in self.trained.items()}, folder / TRAINED)
        if self._best_weights:
            save_file(self._best_weights, folder / BEST)
        progress = {"micro_batch_size": self.batcher.size, "loss_scale": self.loss_scale, "best": self.best}
        (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._put_weights(load_file(folder / TRAINED))
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        self.batcher.size, self.loss_scale = progress["micro_batch_size"], progress["loss_scale"]
        if progress["best"]:
            self.best = tuple(progress["best"])
            self._best_weights = load_file(folder / BEST)

    @torch.no_grad()
    def _put_weights(self, values: dict[str, torch.Tensor]) -> None:
        for name, weight in self.trained.items():
            weight.copy_(values[name])


def _is_full_disk(error: BaseException) -> bool:
    """Whether a failed write was one on a full disk; torch says so in a RuntimeError of its own words."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "file write failed" in str(error) or "No space left" in str(error)
