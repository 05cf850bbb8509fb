"""Reading a LoRA adapter in peft's format, and refusing what could not be merged exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.adapter_folder import CONFIG, WEIGHTS
from lib.errors import ModelmillError
from lib.jsonfile import read_json
from lib.safetensors_file import StoredTensor, read_header

PREFIX = "base_model.model."
FACTOR_A, FACTOR_B = ".lora_A.weight", ".lora_B.weight"

# Every field of peft 0.21.2's LoraConfig stands in one of these three; a field in none is refused.
MERGED = frozenset({"r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform"})
WITHOUT_EFFECT = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout
    layers_pattern megatron_core runtime_config qalora_group_size""".split()
)
# Fields that a merge must honour and this one does not: only these values are accepted.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "init_lora_weights": (True, False, "gaussian"),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "megatron_config": (None,),
    "trainable_token_indices": (None,),
    "loftq_config": (None, {}),
    "eva_config": (None,),
    "corda_config": (None,),
    "lora_ga_config": (None,),
    "use_dora": (False,),
    "velora_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "monteclora_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "target_parameters": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "ensure_weight_tying": (False,),
}


class LoraError(ModelmillError):
    """An adapter is incomplete, damaged, does not fit its base, or cannot be merged exactly."""


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one adapted weight: `a` is (rank, in), `b` is (out, rank)."""

    a: StoredTensor
    b: StoredTensor
    scale: float


def read_lora(folder: Path) -> dict[str, LoraPair]:
    """
    The adapter's pairs by the name of the base weight they belong to.

    Raises:
        LoraError: a file is missing or damaged, a setting cannot be merged, or a factor has no partner.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise LoraError(f"{folder} is no adapter in peft's format: {' and '.join(missing)} missing")
    try:
        config = read_json(folder / CONFIG)
    except ValueError as error:
        raise LoraError(str(error)) from error
    check_mergeable(config, where=folder / CONFIG)
    tensors = {tensor.name: tensor for tensor in read_header(folder / WEIGHTS)}
    factors = {FACTOR_A: {}, FACTOR_B: {}}
    surplus = []
    for name, tensor in tensors.items():
        kind = next((suffix for suffix in factors if name.endswith(suffix)), None)
        if kind is None or not name.startswith(PREFIX):
            surplus.append(f"  {name}: no LoRA factor")
        else:
            factors[kind][name.removeprefix(PREFIX).removesuffix(kind) + ".weight"] = tensor
    for target in sorted(factors[FACTOR_A].keys() ^ factors[FACTOR_B].keys()):
        surplus.append(f"  {target}: only one of its two factors is there")
    for target, a in sorted(factors[FACTOR_A].items()):
        if a.rows != config["r"]:
            surplus.append(f"  {target}: rank {a.rows}, but {CONFIG} says r: {config['r']}")
    if surplus or not tensors:
        raise LoraError("\n".join([f"{folder / WEIGHTS} cannot be merged:", *(surplus or ["  it is empty"])]))
    return {
        target: LoraPair(a=a, b=factors[FACTOR_B][target], scale=lora_scale(config, rank=a.rows))
        for target, a in sorted(factors[FACTOR_A].items())
    }


def lora_scale(config: dict[str, Any], *, rank: int) -> float:
    """lora_alpha / rank, or lora_alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023)."""
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_mergeable(config: dict[str, Any], *, where: Path) -> None:
    """
    Accept an adapter_config.json only if every field of it is understood.

    Raises:
        LoraError: naming every field that stands in the way.
    """
    if not isinstance(config, dict):
        raise LoraError(f"{where} is damaged: expected an object")
    if config.get("peft_type") != "LORA":
        raise LoraError(f"{where}: peft_type is {config.get('peft_type')!r}; only LORA can be merged")
    problems = [f"  {field}: missing" for field in ("lora_alpha", "r") if field not in config]
    for field, value in sorted(config.items()):
        if field in NEUTRAL and value not in NEUTRAL[field]:
            problems.append(f"  {field}: {value!r} cannot be merged yet")
        elif field not in NEUTRAL and field not in MERGED and field not in WITHOUT_EFFECT:
            problems.append(f"  {field}: a field that this version does not know")
    if problems:
        raise LoraError("\n".join([f"{where}:", *problems]))


def check_pairs(pairs: dict[str, LoraPair], tensors: dict[str, StoredTensor], *, where: Path) -> None:
    """
    Hold every pair against the base weight it belongs to.

    Raises:
        LoraError: listing every pair that fits nothing, or not in shape.
    """
    problems = []
    for target, pair in pairs.items():
        weight = tensors.get(target)
        implied = (pair.b.rows, pair.a.row_values)
        if weight is None:
            problems.append(f"  {target}: the base has no such weight")
        elif weight.shape != implied or pair.a.rows != pair.b.row_values:
            problems.append(f"  {target}: {weight.shape} in the base, A {pair.a.shape}, B {pair.b.shape}")
    if problems:
        raise LoraError("\n".join([f"{where} does not fit this base:", *problems]))
