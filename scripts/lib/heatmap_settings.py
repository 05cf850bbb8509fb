"""What a heatmap model is made of and learns from, as config.yaml says."""

from __future__ import annotations

from dataclasses import dataclass, field

from lib.train_settings import Bitsandbytes, Lora, MicroBatching, Offload

# Processes that read frames for a GPU, where the settings name no number and there are cores for as many.
READERS = 8
PREFETCHED = 4  # batches that each of them has read beforehand


@dataclass(frozen=True)
class Heatmap:
    """The model around the backbone; schemas/config.schema.yaml describes each."""

    model: str
    input_size: tuple[int, int]  # width and height, as is the next
    heatmap_size: tuple[int, int]
    sigma: float  # of the Gaussian that stands for a ball, in pixels of the heatmap
    frames: int
    channels: tuple[int, ...]
    factors: tuple[int, ...]
    norm: str
    squeeze_excite: bool
    fpn_channels: int
    fusion: str


@dataclass(frozen=True)
class InputPlan:
    """How a frame becomes the backbone's input: its size, and the mean and deviation of its colours (0 to 1)."""

    width: int
    height: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ClipUse:
    """Which clips are held out, and what is made of frames whose ball cannot be seen."""

    eval_games: tuple[str, ...]
    invisible: str
    occluded: str


@dataclass(frozen=True)
class Evaluation:
    """When a heatmap counts as a ball, and when that ball is the right one."""

    threshold: float
    distance: float


@dataclass(frozen=True)
class HeatmapLora(Lora):
    """peft's settings, and whether there is an adapter at all."""

    enabled: bool = field(default=True, metadata={"option": "lora_enabled"})


@dataclass(frozen=True)
class TrainHeatmap:
    """Settings of a training run; those that a language model's has as well have the same names and meaning."""

    method: str
    device: str
    threads: int
    precision: str
    flip: float
    freeze_backbone_epochs: float
    dataloader_num_workers: int | None  # None: see READERS
    num_train_epochs: float
    max_steps: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    deterministic: bool
    gradient_checkpointing: bool
    save_steps: int
    eval_steps: int
    load_best_model_at_end: bool
    lora: HeatmapLora
    quantization: Bitsandbytes
    micro_batching: MicroBatching
    offload: Offload
