"""Reading a LoRA adapter in peft's format: what it does to which weight, or why that cannot be merged exactly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib.adapter_folder import CONFIG, WEIGHTS
from lib.checkpoint import EMBEDDINGS
from lib.errors import ModelmillError
from lib.jsonfile import read_json
from lib.safetensors_file import StoredTensor, read_header

PREFIX = "base_model.model."
# Modules that hold the vocabulary, by the last part of their name; peft may save them whole beside a LoRA.
HEAD = "lm_head"

# Every field of peft 0.21.2's LoraConfig stands in one of these three; a field in none is refused.
MERGED = frozenset(
    """r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules layers_to_transform bias
    modules_to_save trainable_token_indices use_dora lora_bias fan_in_fan_out ensure_weight_tying""".split()
)
WITHOUT_EFFECT = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout
    layers_pattern megatron_core runtime_config qalora_group_size eva_config""".split()
)
# Fields that a merge would have to honour and this one does not: only these values are accepted. Of the
# initialisations only those that leave the base's weights as they are.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "megatron_config": (None,),
    "loftq_config": (None, {}),
    "corda_config": (None,),
    "lora_ga_config": (None,),
    "velora_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "monteclora_config": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
}
# How peft names the parts of an adapted module, longest first, since one ends another.
PARTS = {
    ".token_adapter.trainable_tokens_delta": "tokens",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
}
# What it wraps a module in, between the module's name and that of its values.
WRAPPERS = (".base_layer.", ".token_adapter.", ".modules_to_save.")
ORIGINAL = ".original_module."  # a module as it was before it was trained; saved with a grown vocabulary, never used


class LoraError(ModelmillError):
    """An adapter is incomplete, damaged, does not fit its base, or cannot be merged exactly."""


@dataclass(frozen=True)
class LowRank:
    """
    A low-rank update scale·B·A of a weight, (out, in).

    Attributes:
        a: (rank, in).
        b: (out, rank).
        scale: of the product.
        transposed: the weight is stored (in, out), as an embedding's or Conv1D's is.
        magnitude: (out,), DoRA's length of each row after the update, of each column as stored if transposed; None
            without DoRA.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    transposed: bool = False
    magnitude: StoredTensor | None = None


@dataclass(frozen=True)
class Update:
    """All that an adapter does to one tensor of the base, in this order."""

    replaced: StoredTensor | None = None  # new values instead of the base's
    low_rank: LowRank | None = None
    added: tuple[StoredTensor, float] | None = None  # a bias of B, with its scale
    rows: tuple[StoredTensor, tuple[int, ...]] | None = None  # new values of single rows: trained tokens
    tied: bool = False  # an output head that is tied to this embedding follows it


def read_lora(folder: Path) -> dict[str, Update]:
    """
    The adapter's updates by the name of the base tensor that they change.

    Raises:
        LoraError: a file is missing or damaged, a setting cannot be merged, or a tensor is not understood;
            listing all of them.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise LoraError(f"{folder} is no adapter in peft's format: {' and '.join(missing)} missing")
    try:
        config = read_json(folder / CONFIG)
    except ValueError as error:
        raise LoraError(str(error)) from error
    check_mergeable(config, where=folder / CONFIG)
    modules, problems = _by_module(read_header(folder / WEIGHTS), config)
    updates: dict[str, Update] = {}
    for module, parts in sorted(modules.items()):
        problems += _update_module(module, parts, config, updates)
    if problems or not updates:
        raise LoraError("\n".join([f"{folder / WEIGHTS} cannot be merged:", *(problems or ["  it is empty"])]))
    return updates


def _by_module(
    tensors: Iterable[StoredTensor], config: Mapping[str, Any]
) -> tuple[dict[str, dict[str, StoredTensor]], list[str]]:
    """Sort the adapter's tensors by module and part; what is none of them is a problem."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    for tensor in tensors:
        name = tensor.name.removeprefix(PREFIX)
        suffix = next((suffix for suffix in PARTS if name.endswith(suffix)), None)
        if suffix:
            module, part = name.removesuffix(suffix), PARTS[suffix]
        else:
            bare = name.replace(ORIGINAL, ".")
            for wrapper in WRAPPERS:
                bare = bare.replace(wrapper, ".")
            module, _, part = bare.rpartition(".")
        if not tensor.name.startswith(PREFIX) or (suffix is None and not _is_saved(module, part, config)):
            problems.append(f"  {tensor.name}: neither a LoRA factor nor a module that {CONFIG} says is saved")
        elif ORIGINAL not in name:
            modules.setdefault(module, {})[part] = tensor
    return modules, problems


def _is_saved(module: str, part: str, config: Mapping[str, Any]) -> bool:
    """Whether whole values of a tensor belong into an adapter: trained biases, saved modules, embeddings."""
    if part == "bias" and config.get("bias", "none") != "none":
        return True
    return part in ("weight", "bias") and (_is_named(module, [*EMBEDDINGS, HEAD]) or _is_trained_whole(module, config))


def _is_trained_whole(module: str, config: Mapping[str, Any]) -> bool:
    """Whether modules_to_save names a module or one around it; peft compares the ends of names, even within a word."""
    parts = module.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(name.endswith(saved) for name in around for saved in config.get("modules_to_save") or ())


def _is_named(module: str, names: Iterable[str]) -> bool:
    return any(f".{module}".endswith(f".{name}") for name in names)


def _update_module(
    module: str, parts: Mapping[str, StoredTensor], config: Mapping[str, Any], updates: dict[str, Update]
) -> Iterator[str]:
    """Turn one module's parts into updates of its weight and bias; gives what is wrong with them."""
    embedding = "embedding_a" in parts or "embedding_b" in parts
    a, b = (parts.get("embedding_a" if embedding else "a"), parts.get("embedding_b" if embedding else "b"))
    # Embeddings that peft saved of itself, since the vocabulary grew, are the base's own; with trained ones the
    # head stays what it was, unless tying was asked for.
    own = "weight" in parts and not _is_trained_whole(module, config)
    update = Update(replaced=parts.get("weight"), tied=own or bool(config.get("ensure_weight_tying")))
    if (a is None) != (b is None):
        yield f"  {module}.weight: only one of its two factors is there"
    elif a is not None and b is not None:
        rank = _pattern(config.get("rank_pattern"), module, config["r"])
        alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        scale = alpha / (math.sqrt(a.rows) if config.get("use_rslora") else a.rows)
        transposed = embedding or bool(config.get("fan_in_fan_out"))
        update = replace(update, low_rank=LowRank(a, b, scale, transposed, parts.get("magnitude")))
        if rank != a.rows:
            yield f"  {module}.weight: rank {a.rows}, but {CONFIG} says {rank}"
        if bool(config.get("use_dora")) != ("magnitude" in parts):
            yield f"  {module}.weight: {CONFIG} and its tensors disagree about DoRA"
        if "b_bias" in parts:
            updates[f"{module}.bias"] = Update(replaced=parts.get("bias"), added=(parts["b_bias"], scale))
    elif {"magnitude", "b_bias"} & parts.keys():
        yield f"  {module}.weight: parts of a LoRA without its factors"
    if "tokens" in parts:
        tokens = trained_tokens(module, config)
        if len(tokens) != parts["tokens"].rows:
            yield f"  {module}.weight: {parts['tokens'].rows} trained tokens, but {CONFIG} names {len(tokens)}"
        update = replace(update, rows=(parts["tokens"], tokens))
    if update != Update(tied=update.tied):
        updates[f"{module}.weight"] = update
    if "bias" in parts and f"{module}.bias" not in updates:
        updates[f"{module}.bias"] = Update(replaced=parts["bias"])


def trained_tokens(module: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens whose embeddings were trained, from a list or a mapping of modules to lists."""
    indices = config.get("trainable_token_indices") or ()
    if isinstance(indices, Mapping):
        indices = next((value for name, value in indices.items() if _is_named(module, [name])), ())
    return tuple(indices)


def read_targets(folder: Path) -> Callable[[str], bool]:
    """Which modules the adapter in a folder has a pair of factors for, by its config: as peft itself decides it."""
    config = read_json(folder / CONFIG)
    targets, excluded = config.get("target_modules") or (), config.get("exclude_modules") or ()
    saved, layers = config.get("modules_to_save") or (), config.get("layers_to_transform")
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    layers = [layers] if isinstance(layers, int) else layers

    def fits(names: str | Iterable[str], module: str) -> bool:
        return bool(re.fullmatch(names, module)) if isinstance(names, str) else _is_named(module, names)

    def is_target(module: str) -> bool:
        if fits(excluded, module) or any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
            return False
        if isinstance(targets, str) or module in targets or not layers:
            return fits(targets, module)
        found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns)
        index = next((int(match[1]) for match in found if match), None)
        return index in layers and fits(targets, module)

    return is_target


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that fits a module's name, as peft's get_pattern_key finds it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


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
    problems = []
    for field in ("lora_alpha", "r"):
        value = config.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            problems.append(f"  {field}: {value!r} is no number" if field in config else f"  {field}: missing")
    for field, value in sorted(config.items()):
        if field in NEUTRAL and value not in NEUTRAL[field]:
            problems.append(f"  {field}: {value!r} cannot be merged")
        elif field not in NEUTRAL and field not in MERGED and field not in WITHOUT_EFFECT:
            problems.append(f"  {field}: a field that this version does not know")
    if problems:
        raise LoraError("\n".join([f"{where}:", *problems]))
