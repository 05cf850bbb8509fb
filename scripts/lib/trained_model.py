"""A model as it was when its adapter was trained: base and adapter apart, the base held as it was then."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.adapted_model import build_model
from lib.adapter_folder import WEIGHTS
from lib.base_model import DTYPES
from lib.config import definition, fill_by_method, with_defaults
from lib.console import progress, say
from lib.errors import ModelmillError
from lib.four_bit import read_four_bit
from lib.jsonfile import read_json
from lib.logits_file import LogitsFile, first_predicting, predictions
from lib.train_settings import Train
from lib.typed import build

if TYPE_CHECKING:
    from numpy import ndarray

# How a base can be held, and the method of training that holds it so.
METHODS = {"original": "lora", "nf4": "qlora", "int8": "int8"}
TRAINED = "trained"  # as the adapter's manifest says
HELD = {"qlora": "4-bit weights", "int8": "8-bit weights"}
PRECISIONS = {dtype: precision for precision, dtype in DTYPES.items()}


class TrainedModelError(ModelmillError):
    """A model cannot be put together as it was trained."""


def settings_as_trained(
    adapter: Mapping[str, Any] | None, *, base: Path, base_weights: str, device: str, threads: int, scratch: Path
) -> Train:
    """
    Settings of a training run that hold the base as that of an adapter did.

    Args:
        adapter: its digest and origin, as lib.manifest.identify_folder gives them; None for the base alone.
        base: folder of the base checkpoint; an adapter that does not say in what precision it was trained has its.
        base_weights: original, nf4, int8, or trained for which of these it was.
        device, threads: of this run.
        scratch: where weights go that neither the cards nor RAM hold, if training kept weights on disk.

    Raises:
        FourBitError: it is not known how the base was held in NF4.
        TrainedModelError: the base was not held in 8 bits.
    """
    origin = (adapter or {}).get("origin") or {}
    said, four_bit = dict(origin.get("settings") or {}), origin.get("four_bit")
    if not said and four_bit:
        said = _said_by(four_bit)
    method = said.get("method", METHODS["original"]) if base_weights == TRAINED else METHODS[base_weights]
    if base_weights == "nf4":
        read_four_bit(adapter)
    elif method == METHODS["int8"] and said.get("method") != method:
        raise TrainedModelError(
            "--base-weights int8 is the base as it was in training, and this adapter's manifest does not say that its "
            "base was held in 8 bits; take --base-weights original"
        )
    filled = with_defaults(
        {"precision": _precision_of(base), **said, "data": "", "eval_data": None}, definition("train")
    )
    filled |= {"method": method, "device": device, "threads": threads, "torch_compile": "off"}
    fill_by_method("train", filled)
    settings = build(Train, filled)
    # Those of the machine that trained; here, blocks beyond the cards come from RAM.
    offload = replace(
        settings.offload, use_cpu_offload=device == "cuda", max_memory={}, offload_folder=str(scratch.absolute())
    )
    # Without gradients there are no checkpoints; without this, streamed blocks would be said to need them.
    return replace(settings, offload=offload, gradient_checkpointing=True)


def describe_weights(settings: Train) -> str:
    """In words, how the base is held."""
    return f"{HELD.get(settings.method, 'the original weights')}, {settings.precision}"


def _said_by(four_bit: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that hold a base as an imported adapter's manifest says, which keeps no others."""
    how = read_four_bit({"origin": {"four_bit": four_bit}})
    quantization = {"bnb_4bit_use_double_quant": how.double_quant, "llm_int8_skip_modules": list(how.skipped)}
    return {"method": METHODS["nf4"], "precision": PRECISIONS[how.dtype], "quantization": quantization}


def _precision_of(base: Path) -> str:
    config = read_json(base / "config.json")
    parts = (config, config.get("text_config") or {})
    dtypes = [part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)]
    return PRECISIONS.get(dtypes[0], "fp32") if dtypes else "fp32"


def load_trained(
    base: Path,
    adapter: Path | None,
    settings: Train,
    *,
    vocabulary: int | None = None,
    gpus: Sequence[float],
    cleanup: ExitStack,
) -> Any:
    """
    Load a base and put a trained adapter on it, in the way that training put on a fresh one.

    Args:
        adapter: its folder; None for the base alone.
        settings: of `settings_as_trained`.
        vocabulary: rows that embedding and output head are to have, where the adapter has others than the base.
        gpus, cleanup: see lib.adapted_model.build_model.

    Raises:
        BaseModelError: transformers cannot load the base.
        TrainedModelError: the adapter has what this base has no place for.
    """
    attach = _keep if adapter is None else _attach_saved(adapter, vocabulary)
    return build_model(base, settings, gpus=gpus, cleanup=cleanup, attach=attach).eval()


def _keep(model: Any, _: Train, **__: Any) -> Any:
    return model


def _attach_saved(adapter: Path, vocabulary: int | None) -> Callable[..., Any]:
    def attach(model: Any, _: Train, **__: Any) -> Any:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        from safetensors.torch import load_file

        if vocabulary is not None:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        config = LoraConfig.from_pretrained(adapter)
        # As in training: what is not frozen stays on the device when blocks are streamed. How factors began is past.
        config.inference_mode, config.init_lora_weights = False, True
        config.base_model_name_or_path = None  # peft would warn that it is now another
        model.config.use_cache = False
        adapted = get_peft_model(model, config)
        unknown = set_peft_model_state_dict(adapted, load_file(adapter / WEIGHTS)).unexpected_keys
        # With a grown vocabulary peft also saves modules as they were before, and a tied pair twice.
        if factors := [name for name in unknown if ".lora_" in name]:
            raise TrainedModelError(f"{adapter} has factors that its config puts nowhere, first {factors[0]}")
        return adapted

    return attach


def check_held(model: Any, adapter: Mapping[str, Any]) -> None:
    """
    Hold how the base is held now against what the adapter's manifest says of its training.

    Raises:
        TrainedModelError: it is another number of layers, or another form of NF4.
    """
    now, then = model.get_base_model().four_bit, read_four_bit(adapter)
    if now is None or {**now, "device": None} != {**vars(then), "device": None}:
        raise TrainedModelError(f"the base is held otherwise than in training:\n  then {vars(then)}\n  now  {now}")
    if now["device"] != then.device:
        say(f"in training the base was quantized on {then.device}; on {now['device']} a few of its magnitudes differ")


def predict_chunks(model: Any, read: LogitsFile, settings: Train, *, start: int | None) -> Iterator[ndarray]:
    """The logits of each chunk that are kept, (predictions, vocabulary), float32."""
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    place = inner.get_input_embeddings().weight.device
    kept = read.context - first_predicting(read.context)
    # The logits of a whole chunk would be twice as large; some models always compute them.
    takes = "logits_to_keep" in inspect.signature(type(inner).forward).parameters
    fewer = {"logits_to_keep": kept} if takes else {}
    dtype = getattr(torch, DTYPES[settings.precision])
    with progress("computing logits", total=read.chunks, unit="chunk") as bar:
        for row in read.tokens:
            chunk = torch.tensor(row.tolist(), device=place)
            if start is not None:
                chunk[0] = start
            # Mixed as in training; both for this call alone, since whoever takes the logits runs in between.
            mixed = nullcontext() if dtype is torch.float32 else torch.autocast(place.type, dtype)
            with torch.no_grad(), mixed:
                logits = model(input_ids=chunk[None], use_cache=False, **fewer).logits
            yield logits[0, -kept:, : read.vocabulary][: predictions(read.context)].float().cpu().numpy()
            bar.advance()
