"""Training runs on the tiny model inside a test: settings, models and trainers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tiny
import torch

from lib.adapted_model import attach_adapter
from lib.adapter_trainer import AdapterTrainer
from lib.base_model import load_base
from lib.config import definition, with_defaults
from lib.samples import IGNORED, Sample
from lib.train_method import resolve_method
from lib.train_settings import Train
from lib.training_run import trainer_arguments
from lib.typed import build


def settings(**train: Any) -> Train:
    """Resolved settings for the tiny model on the CPU."""
    asked = {**tiny.TRAIN, "method": "lora", **train}
    filled = with_defaults(asked, definition("train"))
    resolve_method(filled, parameters=10**6, gpus=[])
    return build(Train, filled)


def samples(count: int = 6, *, seed: int = 0) -> list[Sample]:
    """Random samples of unlike length, of which a varying part is learned."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(5, 40, (1,), generator=generator))
        tokens = torch.randint(4, 380, (length,), generator=generator).tolist()
        asked = int(torch.randint(1, length - 1, (1,), generator=generator))
        made.append(Sample(tokens, [IGNORED] * asked + tokens[asked:], 0, (length,)))
    return made


def adapted(base: Path, run: Train, *, streamed: bool = False) -> Any:
    """The tiny model with a fresh adapter; B is random, or its first gradients would be those of B alone."""
    torch.manual_seed(0)
    model = attach_adapter(
        load_base(base, run, device_map={"": "cpu"}),
        run,
        gradient_checkpointing=run.gradient_checkpointing,
        streamed=streamed,
    )
    for name, weight in model.named_parameters():
        if weight.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model


def trainer(base: Path, folder: Path, run: Train, **data: Any) -> AdapterTrainer:
    """A trainer of that model; `data` are `train_dataset` and `eval_dataset`."""
    data.setdefault("train_dataset", samples())
    arguments = trainer_arguments(run, folder, evaluates=bool(data.get("eval_dataset")))
    return AdapterTrainer(settings=run, pad=0, model=adapted(base, run), args=arguments, **data)


def gradients(trained: AdapterTrainer) -> dict[str, torch.Tensor]:
    """The gradient of each trained weight."""
    return {name: copy.deepcopy(weight.grad) for name, weight in trained.trained.items()}
