"""The settings of a training run, with the names that peft, bitsandbytes and transformers give them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lora:
    """Settings of peft's LoraConfig."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...]
    use_rslora: bool


@dataclass(frozen=True)
class Bitsandbytes:
    """Settings of transformers' BitsAndBytesConfig."""

    bnb_4bit_quant_type: str
    bnb_4bit_use_double_quant: bool
    bnb_4bit_compute_dtype: str


@dataclass(frozen=True)
class Train:
    """Settings of a training run; schemas/config.schema.yaml describes each."""

    data: str
    method: str
    device: str
    threads: int
    dtype: str
    max_length: int
    num_train_epochs: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    lora: Lora
    quantization: Bitsandbytes
