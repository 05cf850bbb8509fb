"""The heatmap model that is trained: a backbone as the method holds it, with its adapter, decoder and head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lib.adapted_model import attach_adapter, offload_folder, weights_beyond
from lib.backbone_names import known_targets
from lib.base_model import load_base, weight_limits
from lib.console import say
from lib.heatmap_folder import HeatmapConfig, describe_backbone, model_tensors
from lib.heatmap_model import HeatmapModel, plan_input, without_pooler
from lib.heatmap_settings import Heatmap, TrainHeatmap
from lib.jsonfile import read_json
from lib.offload import decoder_blocks, stream_beyond

if TYPE_CHECKING:
    from peft import PeftModel

PROCESSOR = "preprocessor_config.json"
FULL = "full"


@dataclass(frozen=True)
class BuiltHeatmap:
    """
    A model ready for training.

    Attributes:
        adapter: peft's view of the backbone; None without LoRA.
    """

    model: HeatmapModel
    config: HeatmapConfig
    adapter: PeftModel | None


def build_heatmap(
    base: Path, heatmap: Heatmap, train: TrainHeatmap, *, gpus: Sequence[float], cleanup: ExitStack
) -> BuiltHeatmap:
    """
    Load the backbone as the method says, attach its adapter, and put decoder and head on it.

    Args:
        base: folder of the backbone's checkpoint.
        gpus: memory of each planned GPU in GiB; the first is used.
        cleanup: takes care of temporary files at the end of the run.

    Raises:
        BaseModelError, AdapterError, HeatmapError: see lib.base_model, lib.adapted_model, lib.heatmap_model.
    """
    limits = weight_limits(gpus[:1], train.offload.max_memory)
    streamed = weights_beyond(base, train, limits)
    place: int | str = 0 if train.device == "cuda" else "cpu"
    backbone = load_base(base, train, device_map={"": "cpu" if streamed else place}, kind="AutoModel")
    if train.method == "int8":
        flatten_int8_inputs(backbone)
    published = read_json(base / PROCESSOR) if (base / PROCESSOR).is_file() else {}
    config = HeatmapConfig(
        heatmap=heatmap,
        input=plan_input(backbone.config, published, heatmap.input_size),
        backbone=describe_backbone(backbone.config),
    )
    without_pooler(backbone)  # before an adapter could be asked for on it
    adapter = _attach(backbone, train, streamed=streamed)
    model = HeatmapModel(backbone, heatmap)
    if streamed or train.gradient_checkpointing:
        if streamed and not train.gradient_checkpointing:
            say("streamed weights need gradient_checkpointing, which is switched on")
        # See lib.adapted_model.attach_adapter.
        reentrant = train.method == "int8" or (streamed and train.method == "qlora")
        checkpoint_blocks(backbone, reentrant=reentrant and adapter is not None)
    device = torch.device("cuda:0" if train.device == "cuda" else "cpu")
    if streamed:
        folder = offload_folder(train, cleanup) if train.offload.use_disk_offload else None
        stream_beyond(model, device=device, limit=limits.get(place, 0), folder=folder)
    else:
        for part in (model.mixer, model.decoder, model.head):
            if part is not None:
                part.to(device)
    return BuiltHeatmap(model, config, adapter)


def _attach(backbone: Any, train: TrainHeatmap, *, streamed: bool) -> PeftModel | None:
    """LoRA on the backbone's linear layers; without it the backbone is trained whole, or, in 8 bits, not at all."""
    if train.method == FULL or not train.lora.enabled:
        backbone.requires_grad_(train.method == FULL)
        return None
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    targets = known_targets(train.lora.target_modules, linear)
    every = sorted({name.rpartition(".")[2] for name in linear})
    lora = replace(train.lora, target_modules=tuple(targets or every))
    return attach_adapter(backbone, replace(train, lora=lora), gradient_checkpointing=False, streamed=streamed)


def flatten_int8_inputs(backbone: nn.Module) -> None:
    """
    Give LLM.int8 layers the rows that they are made for.

    bitsandbytes 0.50.2 takes inputs of up to three dimensions for rows; of ConvNeXt's four it quantizes along the wrong
    ones, and fails where these are of unlike length.
    """
    from bitsandbytes.nn import Linear8bitLt

    for layer in backbone.modules():
        if isinstance(layer, Linear8bitLt):
            layer.forward = partial(_by_rows, layer.forward)


def _by_rows(forward: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    return forward(values.reshape(-1, values.shape[-1])).unflatten(0, values.shape[:-1])


def checkpoint_blocks(backbone: nn.Module, *, reentrant: bool) -> None:
    """
    Recompute each block's activations in the backward pass; for ConvNeXt transformers does not.

    Args:
        reentrant: as torch.utils.checkpoint takes it; then some input of the first block has to need a gradient.
    """
    for blocks in block_lists(backbone):
        for block in blocks:
            block.forward = _checkpointed(block, block.forward, reentrant=reentrant)
    if reentrant:
        backbone.embeddings.register_forward_hook(lambda *given: given[-1].requires_grad_())


def block_lists(backbone: nn.Module) -> list[list[nn.Module]]:
    """The lists of a backbone's blocks, one of each stage: those of which no member holds another list of blocks."""
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module)]
    outer = {id(a) for a in lists for b in lists if a is not b and any(b is each for each in a.modules())}
    return [list(each) for each in lists if id(each) not in outer] or [decoder_blocks(backbone)]


def _checkpointed(block: nn.Module, forward: Callable[..., Any], *, reentrant: bool) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    def again(*inputs: Any, **named: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*inputs, **named)
        return checkpoint(partial(forward, **named), *inputs, use_reentrant=reentrant)

    return again


def trained_weights(built: BuiltHeatmap) -> dict[str, torch.Tensor]:
    """What training changes beside LoRA factors, by the names that a merged model has."""
    whole = built.adapter is None and any(weight.requires_grad for weight in built.model.backbone.parameters())
    return {
        name: tensor for name, tensor in model_tensors(built.model).items() if whole or not name.startswith("backbone.")
    }
