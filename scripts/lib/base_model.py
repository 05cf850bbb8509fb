"""Loading a base for training: in the precision and quantization of the method, on the cards that are planned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.four_bit import describe_four_bit
from lib.heatmap_settings import TrainHeatmap
from lib.loading import BaseModelError, explain_loading
from lib.safetensors_file import read_tensors
from lib.train_settings import Train

GIB = 1 << 30
UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 1 << 20, "GiB": GIB}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Share of a card's memory that weights may fill; activations, logits and the CUDA context need the rest.
WEIGHT_SHARE = 0.8
# Bytes that a weight takes on the device; NF4 with double quantization has 4.127 bits (Dettmers et al. 2023).
BYTES_PER_WEIGHT = {"qlora": 0.52, "int8": 1.01}
# Matrices that bitsandbytes leaves as they are: embeddings are no linear layers, and the output head is skipped.
NOT_QUANTIZED = re.compile(r"embed|wte|lm_head")


def count_weights(base: Path) -> int:
    """Number of weights in a checkpoint, from the headers of its files."""
    return sum(tensor.values for tensor in read_tensors(base).values())


def check_device(settings: Train | TrainHeatmap) -> None:
    """
    Raises:
        BaseModelError: the device that the settings name is not there, or cannot do what they ask.
    """
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise BaseModelError(
            f"train.device is cuda for {settings.method}, but there is no usable GPU; set train.device: cpu"
        )


def limit_memory(gpus: Sequence[float]) -> None:
    """Let this process take no more of each card than was planned, GiB each, so that the plan is what is tried."""
    import torch

    for card, planned in enumerate(gpus[: torch.cuda.device_count()]):
        whole = torch.cuda.get_device_properties(card).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, planned * GIB / whole), card)


def weight_limits(gpus: Sequence[float], max_memory: Mapping[str, str]) -> dict[int | str, int]:
    """
    Most bytes of weights on each device: `max_memory` where it says something, else a share of the card.

    Args:
        gpus: memory of each card in GiB.
        max_memory: by device, "0", "1", … or "cpu", as "20GiB".
    """
    limits: dict[int | str, int] = {card: int(size * GIB * WEIGHT_SHARE) for card, size in enumerate(gpus)}
    return limits | {int(key) if key.isdigit() else key: parse_size(value) for key, value in max_memory.items()}


def parse_size(text: str) -> int:
    """Bytes of a size like "24GB" (10^9) or "20 GiB" (2^30)."""
    number, unit = re.fullmatch(r"([0-9.]+) ?([A-Za-z]+)", text).groups()
    return int(float(number) * UNITS[unit])


def exceeds_cards(base: Path, settings: Train | TrainHeatmap, limits: Mapping[int | str, int]) -> bool:
    """Whether the weights, as the method holds them, take more than the cards may give to weights."""
    plain = {"fp32": 4, "bf16": 2, "fp16": 2}[settings.precision]
    quantized = BYTES_PER_WEIGHT.get(settings.method, plain)
    held = sum(
        tensor.values * (quantized if len(tensor.shape) == 2 and not NOT_QUANTIZED.search(name) else plain)
        for name, tensor in read_tensors(base).items()
    )
    return held > sum(limit for card, limit in limits.items() if card != "cpu")


def load_base(
    base: Path,
    settings: Train | TrainHeatmap,
    *,
    device_map: Any,
    max_memory: Mapping[int | str, int] | None = None,
    kind: str = "AutoModelForCausalLM",
) -> Any:
    """
    Load the base for training, its linear layers in 4 or 8 bits where the method says so.

    Args:
        device_map, max_memory: as transformers' `from_pretrained` takes them.
        kind: which of transformers' classes loads it.

    Raises:
        BaseModelError: transformers cannot load it.
    """
    import torch
    import transformers

    quantization = quantization_config(settings)
    if quantization is not None and device_map == {"": "cpu"}:
        # It would leave every module that is on the CPU as it is, and so all of them.
        quantization.llm_int8_enable_fp32_cpu_offload = False
    with explain_loading("weights", base):
        model = getattr(transformers, kind).from_pretrained(
            base,
            # Weights that are all trained lose small updates in 16 bits; only their products are computed in these.
            dtype=torch.float32 if settings.method == "full" else getattr(torch, DTYPES[settings.precision]),
            quantization_config=quantization,
            device_map=device_map,
            max_memory=dict(max_memory) if max_memory else None,
            local_files_only=True,
            trust_remote_code=False,
        )
    # For the adapter's manifest; later the weights may be wrapped, or have moved.
    model.four_bit = describe_four_bit(model) if settings.method == "qlora" else None
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such a CPU the first pass without gradients would pack the 4-bit weights anew, for a product that has
            # no gradient.
            module.support_avx512bf16_for_cpu = False
    return model


def quantization_config(settings: Train | TrainHeatmap) -> Any:
    """transformers' BitsAndBytesConfig for the method, None where it quantizes nothing."""
    import torch
    from transformers import BitsAndBytesConfig

    asked = settings.quantization
    shared = {
        "llm_int8_skip_modules": list(asked.llm_int8_skip_modules) or None,
        "llm_int8_enable_fp32_cpu_offload": asked.llm_int8_enable_fp32_cpu_offload,
    }
    if settings.method == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=asked.llm_int8_threshold,
            llm_int8_has_fp16_weight=asked.llm_int8_has_fp16_weight,
            **shared,
        )
    if settings.method == "qlora":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=asked.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=asked.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=getattr(torch, asked.bnb_4bit_compute_dtype or DTYPES[settings.precision]),
            **shared,
        )
    return None
