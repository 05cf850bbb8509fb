"""Writing an adapter folder in peft's format, the same bytes for the same adapter."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.jsonfile import dump_json

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(model: PeftModel, folder: Path, *, base_name: str) -> None:
    """
    Write adapter_model.safetensors and adapter_config.json.

    peft itself writes `target_modules` in the order of a set, which differs from run to run, and the path of
    the base into `base_model_name_or_path`; here lists of names are sorted and the base has its name.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # Not "auto", which asks the Hub whether the vocabulary grew; nothing but the factors is trained.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    # safetensors makes its file readable to the owner alone.
    os.chmod(folder / WEIGHTS, 0o644)
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base_name, "inference_mode": True}
    (folder / CONFIG).write_text(dump_json(_canonical(config)), encoding="utf-8")


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _canonical(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_canonical(entry) for entry in value]
    return value.value if isinstance(value, enum.Enum) else value
