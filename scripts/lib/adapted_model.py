"""The model that is trained: a base with its adapter, each part on the device where it belongs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from socket import gethostname
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from lib.base_model import exceeds_cards, load_base, weight_limits
from lib.config import suggest
from lib.console import say
from lib.errors import ModelmillError
from lib.heatmap_settings import TrainHeatmap
from lib.locks import LockedError, only_writer, was_left
from lib.offload import decoder_blocks, stream_beyond
from lib.outputs import scratch_folder
from lib.train_settings import Train

if TYPE_CHECKING:
    from peft import PeftModel


class AdapterError(ModelmillError):
    """An adapter cannot be attached as asked."""


def build_model(
    base: Path,
    settings: Train,
    *,
    gpus: Sequence[float],
    cleanup: ExitStack,
    attach: Callable[..., Any] | None = None,
) -> PeftModel:
    """
    Load the base, attach an adapter and put both on their devices.

    Args:
        base: folder of the base checkpoint.
        settings: of the run.
        gpus: memory of each planned GPU in GiB; where there are none planned, those of this machine are taken.
        cleanup: takes care of temporary files at the end of the run.
        attach: called as `attach_adapter` is, which attaches a fresh one, and by default that.

    Raises:
        BaseModelError: transformers cannot load the base.
        AdapterError: see `attach_adapter`.
    """
    attach = attach or attach_adapter
    limits = weight_limits(gpus or _installed_gpus(settings), settings.offload.max_memory)
    if weights_beyond(base, settings, limits):
        return _build_streamed(base, settings, limits, cleanup, attach)
    several = len([device for device in limits if device != "cpu"]) > 1
    if settings.device == "cpu":
        model = load_base(base, settings, device_map={"": "cpu"})
    elif several or settings.quantization.llm_int8_enable_fp32_cpu_offload:
        model = load_base(base, settings, device_map="balanced" if several else "auto", max_memory=limits)
    else:
        model = load_base(base, settings, device_map={"": 0})
    model = attach(model, settings, gradient_checkpointing=settings.gradient_checkpointing)
    _remove_inner_hooks(model)
    if settings.torch_compile == "on" or (settings.torch_compile == "auto" and settings.device == "cuda"):
        _compile_blocks(model)
    return model


def _remove_inner_hooks(model: PeftModel) -> None:
    """
    Take accelerate's hooks from the parts of each block; the block's own brings its inputs to its card.

    With several cards accelerate puts one on every module, which costs time in each call and breaks compiled
    blocks into pieces.
    """
    from accelerate.hooks import remove_hook_from_module

    for block in decoder_blocks(model):
        for part in block.modules():
            if part is not block:
                remove_hook_from_module(part)


def _compile_blocks(model: PeftModel) -> None:
    """Compile each block by itself: all are of one kind, so that one compilation serves all of a card."""
    import torch

    # The first block's input alike to the others', so that one variant serves all blocks of a card.
    model.enable_input_require_grads()
    # Each card, training and evaluation, a single sample and several take a variant; beyond torch's limit of 8
    # blocks would silently run as if not compiled.
    torch._dynamo.config.recompile_limit = 64
    for block in decoder_blocks(model):
        # accelerate's hook, which brings the input to the block's card, stays outside.
        name = "_old_forward" if hasattr(block, "_old_forward") else "forward"
        setattr(block, name, _compiled_forward(block))


def _compiled_forward(block: Any) -> Callable[..., Any]:
    """
    A block's forward, compiled, within its gradient checkpoint.

    transformers 5.23 checkpoints inside of `forward`, 5.17 around it. Compiled as a whole, torch chooses by itself what
    is kept for backward: the 32B took 17.8 GB of its second card instead of 12.8.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    inside = isinstance(block, GradientCheckpointingLayer) and "__init_subclass__" in vars(GradientCheckpointingLayer)
    if not inside:
        return torch.compile(block.forward)
    compiled = torch.compile(type(block).forward.__wrapped__.__get__(block))

    def forward(*inputs: Any, **named: Any) -> Any:
        if block.gradient_checkpointing and block.training:
            return block._gradient_checkpointing_func(partial(compiled, **named), *inputs)
        return compiled(*inputs, **named)

    return forward


def weights_beyond(base: Path, settings: Train | TrainHeatmap, limits: Mapping[int | str, int]) -> bool:
    """Whether weights are to be kept elsewhere, and there are too many of them for their device."""
    offload = settings.offload
    if settings.device == "cpu":
        return offload.use_disk_offload
    return (offload.use_cpu_offload or offload.use_disk_offload) and exceeds_cards(base, settings, limits)


def _build_streamed(
    base: Path,
    settings: Train,
    limits: Mapping[int | str, int],
    cleanup: ExitStack,
    attach: Callable[..., Any],
) -> PeftModel:
    """A model on one device, of which some blocks are streamed in; not compiled, since its weights come and go."""
    import torch

    if not settings.gradient_checkpointing:
        say("streamed weights need gradient_checkpointing, which is switched on")
    model = load_base(base, settings, device_map={"": "cpu"})
    model = attach(model, settings, gradient_checkpointing=True, streamed=True)
    folder = offload_folder(settings, cleanup) if settings.offload.use_disk_offload else None
    place: int | str = 0 if settings.device == "cuda" else "cpu"
    stream_beyond(model, device=torch.device(place), limit=limits.get(place, 0), folder=folder)
    # So that neither the Trainer nor accelerate moves the whole model to the device.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.hf_device_map = {f"block {i}": place for i in range(len(decoder_blocks(model)))}
    return model


def _installed_gpus(settings: Train) -> list[float]:
    """Memory of each GPU of this machine in GiB."""
    import torch

    cards = range(torch.cuda.device_count()) if settings.device == "cuda" else ()
    return [torch.cuda.get_device_properties(card).total_memory / (1 << 30) for card in cards]


def offload_folder(settings: Train | TrainHeatmap, cleanup: ExitStack) -> Path:
    """A temporary folder, in `offload_folder` if that is set; those that killed runs left there are removed."""
    parent = Path(settings.offload.offload_folder or gettempdir())
    ours = f"modelmill-offload-{gethostname()}-"
    for left in filter(was_left, parent.glob(f"{ours}*")):
        with suppress(LockedError), only_writer(left):
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f"{ours}{os.getpid()}"
    cleanup.enter_context(only_writer(folder))
    return cleanup.enter_context(scratch_folder(folder))


def attach_adapter(
    model: Any, settings: Train | TrainHeatmap, *, gradient_checkpointing: bool, streamed: bool = False
) -> PeftModel:
    """
    Freeze the base and put LoRA on the named layers, or on every linear layer but the output head.

    Raises:
        AdapterError: layers are named that the model does not have, or peft refuses the settings.
    """
    from peft import LoraConfig, get_peft_model

    lora = settings.lora
    _check_targets(model, lora.target_modules)
    config = LoraConfig(
        task_type=lora.task_type,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        bias=lora.bias,
        target_modules=sorted(lora.target_modules) or "all-linear",
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    model.config.use_cache = False
    if gradient_checkpointing:
        # bitsandbytes' int8 product keeps its input outside of what autograd saves, and the 4-bit one its weights, so
        # that only checkpoints whose first pass has no graph at all free them.
        reentrant = settings.method == "int8" or (streamed and settings.method == "qlora")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise AdapterError(f"train.lora: {error}") from error


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    """
    Raises:
        AdapterError: names that no linear layer of the model has, each with the nearest known one.
    """
    import torch

    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    unknown = [each for each in targets if not any(f".{name}".endswith(f".{each}") for name in layers)]
    if unknown:
        known = sorted({name.rpartition(".")[2] for name in layers})
        listed = "; ".join(f"{each!r}{suggest(each, known)}" for each in unknown)
        raise AdapterError(f"lora.target_modules: the model has no linear layer named {listed}")


def check_packable(model: Any) -> None:
    """
    Refuse packing where a mask cannot keep samples apart.

    Raises:
        AdapterError: the model has layers that carry a state along or attend in a window, or an attention that
            takes no mask.
    """
    config = model.config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    attention = config._attn_implementation
    if kinds or attention not in ("sdpa", "eager"):
        found = f"layers of {', '.join(kinds)}" if kinds else f"the attention {attention}"
        raise AdapterError(
            f"packing: the model has {found}, where samples in one row would not be kept apart; set packing: false"
        )
