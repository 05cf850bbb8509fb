"""
A GGUF file turned back into a Hugging Face checkpoint that can be trained, merged and converted again.

The weights go through transformers' own GGUF loader; the tokenizer is built by lib.gguf_tokenizer.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.checkpoint import weight_files
from lib.console import say
from lib.errors import first_line
from lib.gguf_file import GgufFile, read_gguf
from lib.gguf_tokenizer import (
    GgufImportError,
    Vocabulary,
    build_tokenizer,
    check_tokenizer,
    read_vocabulary,
    write_tokenizer,
)
from lib.jsonfile import read_json, write_json
from lib.outputs import finished_folder, scratch_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# What transformers raises over a file that is damaged, or not of a kind it knows.
BAD_FILE = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError, RuntimeError, OSError
)  # fmt: skip
DTYPES = ("float16", "bfloat16", "float32")
SHARD_SIZE = "5GB"  # what hub repositories use; one file `model.safetensors` below it

# Rope settings that a GGUF keeps as tensors, and transformers' loader drops without a word.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

# Settings of config.json that name a folder or the library's version: no part of what the checkpoint is.
UNWANTED_SETTINGS = ("_name_or_path", "_model_name_or_path", "transformers_version")


def import_gguf(*, gguf: Path, output: Path, dtype: str) -> None:
    """
    Turn a GGUF file into a Hugging Face checkpoint folder.

    Written are config.json, generation_config.json, the weights (model.safetensors, or shards of at most 5 GB
    with an index), tokenizer.json, tokenizer_config.json and, when the file has a chat template,
    chat_template.jinja with the same text as in tokenizer_config.json. The same file gives the same bytes in
    any folder. Quantized weights are unpacked; the whole model is held in memory, in `dtype`.

    Args:
        gguf: a complete model in one file, with a byte-level BPE tokenizer.
        output: folder of the result, in place of an earlier one; it appears only when complete.
        dtype: of the weights: float16, bfloat16 or float32.

    Raises:
        GgufError: no whole GGUF file.
        GgufImportError: one of several parts, an architecture or tokenizer that is not known, or something in it
            would be lost.
        LockedError: another run is writing `output`.
    """
    if dtype not in DTYPES:
        raise GgufImportError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    header = _read_whole(gguf)
    vocabulary = read_vocabulary(header=header)
    _refuse_lost_rope(header=header)
    backend = build_tokenizer(vocabulary=vocabulary, path=gguf)
    size = f"{sum(tensor.values for tensor in header.tensors) / 1e6:.0f} M weights"
    say(f"importing {gguf}: {header.architecture}, {size}, pre-tokenizer {vocabulary.pre}")
    with finished_folder(output) as checkpoint, _quiet_transformers():
        _write_weights(header=header, vocabulary=vocabulary, checkpoint=checkpoint, dtype=dtype)
        _check_weights(header=header, checkpoint=checkpoint, dtype=dtype)
        write_tokenizer(vocabulary=vocabulary, backend=backend, checkpoint=checkpoint)
        check_tokenizer(vocabulary=vocabulary, backend=backend, checkpoint=checkpoint)


def _read_whole(gguf: Path) -> GgufFile:
    header = read_gguf(gguf)
    parts = header.metadata.get("split.count", 1)
    if parts > 1:
        raise GgufImportError(f"{gguf}: one of {parts} parts; join them first, with llama-gguf-split --merge")
    return header


def _refuse_lost_rope(*, header: GgufFile) -> None:
    """Stop at rope settings that live in tensors: without them long texts go wrong, and nothing says so."""
    lost = [tensor.name for tensor in header.tensors if tensor.name in ROPE_TENSORS]
    if lost:
        raise GgufImportError(
            f"{header.path}: its rope scaling is kept in {', '.join(lost)}, which transformers does not "
            "read; use the model's original checkpoint as base"
        )


def _write_weights(*, header: GgufFile, vocabulary: Vocabulary, checkpoint: Path, dtype: str) -> None:
    """Unpack the weights into safetensors, with config.json and generation_config.json."""
    model, report = _load_model(header=header, checkpoint=checkpoint, dtype=dtype)
    _check_model(header=header, vocabulary=vocabulary, model=model, report=report)
    model.save_pretrained(checkpoint, max_shard_size=SHARD_SIZE)
    saved = read_json(checkpoint / "config.json")
    config = {key: value for key, value in saved.items() if key not in UNWANTED_SETTINGS}
    _refuse_lost_scaling(header=header, config=config)
    write_json(checkpoint / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    write_json(checkpoint / "generation_config.json", ids)
    for name in weight_files(checkpoint):
        shutil.copymode(checkpoint / "config.json", checkpoint / name)  # safetensors lets only the owner read


def _load_model(*, header: GgufFile, checkpoint: Path, dtype: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """
    Load the weights with transformers.

    It gets to see the file alone in a folder: it would also take up an adapter that happens to lie beside the
    GGUF, and prefers a file of the same name in the working directory.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig, __version__

    with scratch_folder(checkpoint / ".alone") as folder:
        # Transformers looks for a relative file in the folder, and for a relative folder on the Hub.
        alone = folder.absolute() / "model.gguf"
        alone.symlink_to(header.path.absolute())
        try:
            return AutoModelForCausalLM.from_pretrained(
                alone.parent,
                gguf_file=str(alone),
                quantization_config=GgufConfig(dequantize=True),
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                local_files_only=True,
            )
        except BAD_FILE as error:
            raise GgufImportError(
                f"{header.path}: transformers {__version__} cannot load this GGUF of architecture "
                f"{header.architecture!r}: {first_line(error)}"
            ) from error


def _check_model(*, header: GgufFile, vocabulary: Vocabulary, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """See that no weight was left at random, and that there is a row of embeddings for every token."""
    missing = sorted(report["missing_keys"])
    misfits = sorted(str(key) for key in report["mismatched_keys"])
    if missing or misfits:
        raise GgufImportError(
            f"{header.path}: tensors that the model needs are missing: {', '.join(missing) or 'none'}; "
            f"have another shape: {', '.join(misfits) or 'none'}"
        )
    tokens, rows = len(vocabulary.tokens), model.get_input_embeddings().weight.shape[0]
    if tokens > rows or rows != model.config.vocab_size:
        raise GgufImportError(
            f"{header.path}: {tokens} tokens, {rows} rows of embeddings and a vocab_size of "
            f"{model.config.vocab_size} do not fit together"
        )


def _refuse_lost_scaling(*, header: GgufFile, config: dict[str, Any]) -> None:
    """Stop if the file stretches its context and the checkpoint would not."""
    asked = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    kept = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if asked not in ("none", kept.get("rope_type")):
        raise GgufImportError(
            f"{header.path}: transformers does not carry over its rope scaling ({asked}); "
            "use the model's original checkpoint as base"
        )


def _check_weights(*, header: GgufFile, checkpoint: Path, dtype: str) -> None:
    """Reopen the weights: all finite, all of the wanted type, as many as in the GGUF."""
    import torch
    from safetensors import safe_open

    faults, count = [], 0
    for file in weight_files(checkpoint):
        with safe_open(checkpoint / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118, a shard is no mapping
                tensor = shard.get_tensor(name)
                count += tensor.numel()
                faults += _faults(name=name, tensor=tensor, dtype=getattr(torch, dtype))
    if faults:
        raise GgufImportError(f"{header.path}: not fit to be written as {dtype}: {'; '.join(faults)}")
    held = sum(tensor.values for tensor in header.tensors)
    if count != held:
        raise GgufImportError(
            f"{header.path}: it holds {held} weights, but transformers makes {count} of them, so something "
            "would be lost; use the model's original checkpoint as base"
        )


def _faults(*, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> list[str]:
    """What is wrong with one tensor."""
    faults = []
    if tensor.dtype != dtype:
        faults.append(f"{name} is {tensor.dtype}")
    if not bool(tensor.isfinite().all()):
        faults.append(f"{name} has values that are not finite")
    return faults


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide transformers' warnings, and its bars where they would fill a log with carriage returns."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    unseen = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with unseen:
            yield
    finally:
        logging.set_verbosity(before)
