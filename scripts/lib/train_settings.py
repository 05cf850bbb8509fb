"""The settings of a training run, with the names that peft, bitsandbytes, transformers and accelerate give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Lora:
    """Settings of peft's LoraConfig."""

    r: int
    lora_alpha: float
    lora_dropout: float
    bias: str
    target_modules: tuple[str, ...]
    task_type: str
    use_rslora: bool
    use_dora: bool


@dataclass(frozen=True)
class Bitsandbytes:
    """Settings of transformers' BitsAndBytesConfig."""

    load_in_4bit: bool | None
    load_in_8bit: bool | None
    bnb_4bit_quant_type: str
    bnb_4bit_use_double_quant: bool
    bnb_4bit_compute_dtype: str | None
    llm_int8_threshold: float
    llm_int8_has_fp16_weight: bool
    llm_int8_skip_modules: tuple[str, ...]
    llm_int8_enable_fp32_cpu_offload: bool


@dataclass(frozen=True)
class MicroBatching:
    """How a batch that does not fit into memory is split."""

    adaptive_micro_batch: bool
    micro_batch_size: int | None
    min_micro_batch_size: int
    mb_backoff_factor: float
    oom_retries: int


@dataclass(frozen=True)
class Offload:
    """What is kept outside the GPU's memory."""

    use_cpu_offload: bool
    use_disk_offload: bool
    offload_folder: str | None
    max_memory: Mapping[str, str]
    low_cpu_mem_usage: bool


@dataclass(frozen=True)
class Train:
    """Settings of a training run; schemas/config.schema.yaml describes each."""

    data: str
    eval_data: str | None
    eval_fraction: float
    method: str
    device: str
    threads: int
    precision: str
    max_length: int
    packing: bool
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
    torch_compile: str
    gradient_checkpointing: bool
    save_steps: int
    eval_steps: int
    load_best_model_at_end: bool
    lora: Lora
    quantization: Bitsandbytes
    micro_batching: MicroBatching
    offload: Offload
    # Not a setting: why `method` is what it is, as lib.train_method resolved it.
    method_reason: str = field(default="as configured", metadata={"setting": False})
