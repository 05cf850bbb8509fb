"""Training of a LoRA adapter on conversations: which tokens count, and what is lost on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lib.samples import IGNORED, Sample, pad_batch
from lib.split_trainer import SplitTrainer
from lib.token_loss import TokenLoss
from lib.train_settings import Train


class AdapterTrainer(SplitTrainer[Sample]):
    """Trains a model's trainable weights on Samples; every token weighs the same, in whichever sample it stands."""

    unit, length = "tokens", "max_length"

    def __init__(self, *, settings: Train, pad: int, **shared: Any) -> None:
        """
        Args:
            settings: of the run.
            pad: token with which samples are made equally long.
            shared: arguments of transformers' Trainer.
        """
        super().__init__(settings=settings, **shared)
        self._pad = pad
        # Only SDPA understands a boolean mask, see pad_batch.
        self._mask_dtype = None if self.model.config._attn_implementation == "sdpa" else self._dtype
        self.token_loss = TokenLoss(self.model)

    def in_order(self, samples: Sequence[Sample]) -> list[Sample]:
        """Longest first: what does not fit shows at once, and parts have samples of like length."""
        return sorted(samples, key=lambda sample: -len(sample.input_ids))

    def weigh(self, samples: Sequence[Sample]) -> int:
        """Tokens that count for the loss; the first of a sample is predicted from nothing."""
        return sum(label != IGNORED for sample in samples for label in sample.labels[1:])

    def count_units(self, samples: Sequence[Sample]) -> int:
        """Tokens, prompts included."""
        return sum(len(sample.input_ids) for sample in samples)

    def summed_loss(self, part: Sequence[Sample]) -> torch.Tensor:
        """In nats."""
        batch = pad_batch(part, pad=self._pad, mask_dtype=self._mask_dtype)
        # Labels stay: which tokens count is found out on the CPU, see TokenLoss.
        moved = {name: tensor if name == "labels" else tensor.to(self.args.device) for name, tensor in batch.items()}
        return self.token_loss(moved)
