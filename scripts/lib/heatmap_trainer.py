"""Training of a heatmap model: what is lost on a frame, mirrored frames, and a backbone that thaws."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from lib.frames import HeatmapBatch, HeatmapSample
from lib.heatmap_folder import HeatmapConfig, normalize
from lib.heatmap_peaks import Peak, draw_targets, find_peaks, scale_point
from lib.heatmap_settings import TrainHeatmap
from lib.overlays import draw_overlay
from lib.split_trainer import SplitTrainer

# How much more a ball's middle weighs than an empty place: a ball covers but some thousandth of a frame.
BALL_WEIGHT = 9.0
# Held-out frames that TensorBoard shows after each evaluation, spread over all of them.
SHOWN_FRAMES = 4


class HeatmapTrainer(SplitTrainer[HeatmapSample]):
    """Trains decoder, head and backbone (or its adapter) on HeatmapSamples; every frame weighs the same."""

    unit, length = "frames", "heatmap.input_size"

    def __init__(self, *, settings: TrainHeatmap, config: HeatmapConfig, **shared: Any) -> None:
        """
        Args:
            settings: of the run.
            config: of the model.
            shared: arguments of transformers' Trainer.
        """
        super().__init__(settings=settings, data_collator=HeatmapBatch.of, **shared)
        self._config = config
        # Named once: while the backbone is frozen its weights need no gradient, and are trained all the same.
        self._trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self._statistics = {
            name: value for name, value in self.model.named_buffers() if name.endswith(("running_mean", "running_var"))
        }
        self._thawing = [weight for name, weight in self._trained.items() if name.startswith("backbone.")]
        self._frozen = False
        self._loader: Any = None

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that are trained, and what BatchNorm has seen of them, by name."""
        return {**self._trained, **self._statistics}

    @property
    def thaw_step(self) -> int:
        """The update before which the backbone is frozen."""
        asked = self._settings
        updates = math.ceil(
            len(self.train_dataset) / (asked.per_device_train_batch_size * asked.gradient_accumulation_steps)
        )
        return round(asked.freeze_backbone_epochs * updates)

    def train(self, *args: Any, **options: Any) -> Any:
        """
        As of the Trainer; the processes that read frames end with it.

        Were the loader left to the garbage collector, the queues by which they are told to end would go before it, and
        each of them would be waited for, 5 s (torch 2.13).
        """
        try:
            return super().train(*args, **options)
        finally:
            if self._loader is not None:
                self._loader.base_dataloader._iterator = None

    def get_train_dataloader(self) -> Any:
        """
        The frames to learn from, in the Trainer's order.

        A loader takes a random number for its processes whenever it starts some: not from those of the training, which
        would then depend on how many there are, and on where a run was stopped.
        """
        loader = super().get_train_dataloader()
        loader.base_dataloader.generator = torch.Generator()
        self._loader = loader
        return loader

    def training_step(self, model: Any, inputs: HeatmapBatch, num_items_in_batch: Any = None) -> torch.Tensor:
        """As of SplitTrainer, with the backbone frozen or not, and frames mirrored by the number of the update."""
        self._freeze(self.state.global_step < self.thaw_step)
        generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + self.state.global_step)
        mirrored = torch.rand(len(inputs), generator=generator) < self._settings.flip
        batch = mirror(inputs, mirrored, self._config.heatmap.heatmap_size[0])
        return super().training_step(model, batch, num_items_in_batch)

    def _freeze(self, frozen: bool) -> None:
        if frozen == self._frozen:
            return
        for weight in self._thawing:
            weight.requires_grad_(not frozen)
        if not frozen:
            self.search_micro_batch()  # with the backbone's gradients less fits
        self._frozen = frozen

    def weigh(self, samples: HeatmapBatch) -> int:
        """Frames."""
        return len(samples)

    def count_units(self, samples: HeatmapBatch) -> int:
        """Frames."""
        return len(samples)

    def summed_loss(self, part: HeatmapBatch) -> torch.Tensor:
        """
        Cross entropy of every place less the least that is possible, in nats a ball's area; places near a ball weigh
        more.
        """
        pixels, points = part.pixels.to(self.args.device), part.points.float().to(self.args.device)
        heatmap = self._config.heatmap
        targets = draw_targets(points, heatmap.heatmap_size, heatmap.sigma)
        logits = self.model(normalize(pixels, self._config))
        losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        least = -(torch.xlogy(targets, targets) + torch.xlogy(1 - targets, 1 - targets))
        return ((1 + BALL_WEIGHT * targets) * (losses - least)).sum() / (2 * math.pi * heatmap.sigma**2)

    def held_out_loss(self) -> float:
        """The mean loss on the held-out frames, which are not in memory all at once."""
        batches = DataLoader(
            self.eval_dataset,
            batch_size=self._settings.per_device_train_batch_size,
            collate_fn=HeatmapBatch.of,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),  # evaluating takes no random number from the training
        )
        total = sum(self.batcher.run(batch, self._sum_losses, undo=lambda: None) for batch in batches)
        return total / len(self.eval_dataset)

    def _scores(self, sample: HeatmapSample) -> torch.Tensor:
        """The heatmap of one sample, (1, height, width), on the CPU; by itself, since memory may be short."""
        with self._computing():
            return torch.sigmoid(self.model(normalize(sample.pixels[None].to(self.args.device), self._config))).cpu()

    @torch.no_grad()
    def pictures(self) -> dict[str, Any]:
        """Some held-out frames with their heatmaps, the ball's place and the predicted one."""
        if not self.eval_dataset:
            return {}
        self.model.eval()
        numbers = range(0, len(self.eval_dataset), max(1, len(self.eval_dataset) // SHOWN_FRAMES))[:SHOWN_FRAMES]
        samples = [self.eval_dataset[number] for number in numbers]
        scores = torch.cat([self._scores(sample) for sample in samples])
        self.model.train()
        size, own = self._config.heatmap.heatmap_size, (self._config.input.width, self._config.input.height)
        shown = {}
        for number, sample, heatmap, peak in zip(numbers, samples, scores, find_peaks(scores).tolist(), strict=True):
            true = None if math.isnan(sample.point[0]) else scale_point(*sample.point, size, own)
            predicted = Peak(*scale_point(peak[0], peak[1], size, own), peak[2])
            frame = sample.pixels[-3:].permute(1, 2, 0).numpy()
            shown[f"held_out/{number}"] = draw_overlay(
                frame=frame, heatmap=heatmap.numpy(), true=true, predicted=predicted, caption=None
            )
        return shown


def mirror(batch: HeatmapBatch, which: torch.Tensor, width: int) -> HeatmapBatch:
    """A batch of which some samples (`which`: a bool each) have left and right exchanged; `width` is the heatmap's."""
    pixels, points = batch.pixels.clone(), batch.points.clone()
    for number in which.nonzero().flatten().tolist():
        pixels[number] = batch.pixels[number].flip(-1)
    points[which, 0] = width - 1 - points[which, 0]
    return HeatmapBatch(pixels, points)
