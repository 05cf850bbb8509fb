"""An adapter folder in peft's format, the same bytes for the same adapter."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.jsonfile import dump_json

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # what peft wrote before it took to safetensors
# Lists of a LoraConfig whose order means nothing; peft itself makes sets of the first two.
UNORDERED = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "target_parameters")


def write_adapter(model: PeftModel, folder: Path, *, base_name: str, rename: Callable[[str], str] = str) -> None:
    """
    Write adapter_model.safetensors and adapter_config.json.

    Args:
        model: the base with its adapter.
        folder: where the files go.
        base_name: see `write_config`.
        rename: gives the names of tensors and modules that are written, where the installed transformers has others.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # Not "auto", which asks the Hub whether the vocabulary grew; nothing but the factors is trained.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {rename(name): tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # safetensors makes its file readable to the owner alone.
    os.chmod(folder / WEIGHTS, 0o644)
    config = model.peft_config["default"].to_dict()
    config["target_modules"] = [rename(name) for name in config["target_modules"]]
    write_config(config, folder, base_name=base_name)


def write_config(config: Mapping[str, Any], folder: Path, *, base_name: str) -> None:
    """
    Write adapter_config.json.

    peft itself writes `target_modules` in the order of a set, which differs from run to run, and the path of
    the base into `base_model_name_or_path`; here such lists are sorted and the base has its name.

    Args:
        config: a LoraConfig, as a mapping or as read from a file.
        folder: where the file goes.
        base_name: the base without its place, as in "maker/model".

    Raises:
        TypeError, ValueError: a file's config holds what peft does not write.
    """
    canonical = _canonical({**config, "base_model_name_or_path": base_name, "inference_mode": True})
    for key in UNORDERED:
        if isinstance(canonical.get(key), list):
            canonical[key] = sorted(set(canonical[key]))
    (folder / CONFIG).write_text(dump_json(canonical), encoding="utf-8")


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _canonical(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_canonical(entry) for entry in value]
    return value.value if isinstance(value, enum.Enum) else value
