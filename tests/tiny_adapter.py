"""Adapters for the tiny base: one trained and written by peft itself, and ones made of constants in no time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tiny import SHAPE

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def train_with_peft(base: Path, folder: Path, *, steps: int = 4) -> Path:
    """Train an adapter with peft and torch alone, and let peft write it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([each for each in tuned.parameters() if each.requires_grad], lr=0.05)
    tokens = torch.randint(5, SHAPE["vocab_size"], (4, 32))
    for _ in range(steps):
        optimizer.zero_grad()
        tuned(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    tuned.save_pretrained(folder)
    return folder


def write_constants(
    folder: Path,
    *,
    layers: tuple[str, ...] = ("model.layers.0.self_attn.q_proj",),
    value: float = 1.0,
    rank: int = 2,
    width: int = SHAPE["hidden_size"],
    written: float | None = None,
    **config: Any,
) -> Path:
    """Write an adapter of square weights `width` wide; `written` is the time of its files in seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer in layers:
        tensors[f"base_model.model.{layer}.lora_A.weight"] = np.full((rank, width), value, np.float32)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = np.full((width, rank), value, np.float32)
    save_file(tensors, folder / WEIGHTS)
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": list(layers), **config}
    (folder / CONFIG).write_text(json.dumps(facts))
    if written is not None:
        for name in (CONFIG, WEIGHTS):
            os.utime(folder / name, (written, written))
    return folder
