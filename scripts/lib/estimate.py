"""
What each step needs, from the model's shape and the config alone: milliseconds, no torch.

Memory and disk in MB (10^6 bytes, as Snakemake counts), time in minutes. These are first estimates, on the safe
side of what was seen so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lib.adapter_folder import WEIGHTS as ADAPTER_WEIGHTS
from lib.calibration import CHUNK_TOKENS
from lib.quant_types import BITS_PER_WEIGHT
from lib.spec import Hardware, Model, Shape

INTERPRETER_BYTES = 0.8e9  # Python with torch, transformers and peft imported
CUDA_BYTES = 0.6e9  # a CUDA context with its libraries, on each card
CUDA_HOST_BYTES = 3e9  # what it takes of RAM
GIB = 1 << 30
# Of a weight of a linear layer: NF4 with double quantization takes 4.127 bits (Dettmers et al. 2023), LLM.int8 8 and
# two scales a row.
LINEAR_BYTES = {"int8": 1.01, "4-bit": 0.52}
# Bytes per second and per core of what a step does; slow enough for a laptop's disk.
DOWNLOAD_BYTES, MERGE_BYTES, CONVERT_BYTES, DISK_BYTES = 20e6, 100e6, 150e6, 200e6
QUANTIZE_WEIGHTS = 9e6  # per second and thread (Q4_K)
DIRECT_WEIGHTS = 15e6  # per second and thread (Q4_K), of merging and quantizing
IMATRIX_PRODUCTS = 5e9  # of a weight and an activation, per second and thread
# Assumed number of threads of the heavy steps when their time is estimated.
THREADS = 8


@dataclass(frozen=True)
class Needs:
    """What one job asks for."""

    mem_mb: int
    disk_mb: int
    runtime: int
    gpu: int = 0
    gpu_mem_mb: int = 0


def shape_of(model: Model) -> Shape:
    """The model's shape; the resolver has seen to it that there is one."""
    if model.base.shape is None:
        raise ValueError("a resolved model has a shape")
    return model.base.shape


def weight_bytes(model: Model, quant: str) -> float:
    """Size of the model's weights in a type, in bytes."""
    shape, bits = shape_of(model), BITS_PER_WEIGHT[quant]
    # Types with blocks of 256 weights: rows that do not fill them fall back, Q4_K to Q5_0, Q6_K to Q8_0, small
    # ones to IQ4_NL.
    if shape.hidden_size % 256 and ("k" in quant or quant.startswith(("iq", "tq"))) and quant != "iq4_nl":
        bits = min(8.5, max(5.5, 1.35 * bits))
    return shape.parameters * bits / 8


def lora_parameters(shape: Shape, rank: int) -> int:
    """Weights of an adapter of that rank on every linear layer but the output head."""
    head = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    queries, keys = head * shape.num_attention_heads, head * shape.num_key_value_heads
    widths = 2 * (shape.hidden_size + queries) + 2 * (shape.hidden_size + keys)
    widths += 3 * (shape.hidden_size + shape.intermediate_size)
    return shape.num_hidden_layers * rank * widths


def adapter_bytes(model: Model) -> int:
    """Size of the adapter's weights, which are float32 where it is trained here."""
    adapter = model.adapter
    if adapter is None:
        return 0
    if adapter.train:
        return 4 * lora_parameters(shape_of(model), adapter.train.lora.r)
    return Path(adapter.path or "", ADAPTER_WEIGHTS).stat().st_size


def held_bytes(shape: Shape, kind: str) -> int:
    """
    The weights in memory, in bytes.

    Args:
        kind: fp32, fp16, int8 or 4-bit; of the latter two the embedding, and the output head, stay in 16 bits.
    """
    if kind in ("fp32", "fp16"):
        return round(shape.parameters * {"fp32": 4, "fp16": 2}[kind])
    embeddings = shape.embedding * (1 if shape.tie_word_embeddings else 2)
    return round(2 * embeddings + (shape.parameters - embeddings) * LINEAR_BYTES[kind])


def cache_bytes(shape: Shape, tokens: int) -> int:
    """Keys and values of a context in 16 bits, as llama.cpp and Ollama keep them."""
    head = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    return 2 * 2 * tokens * shape.num_hidden_layers * shape.num_key_value_heads * head


def fetch_needs(model: Model) -> Needs:
    """Downloading holds a few blocks; importing a GGUF holds all weights, in float32 and once more."""
    size = weight_bytes(model, "f16")
    if model.base.path:
        return Needs(mem_mb=_mb(0.2e9), disk_mb=1, runtime=_minutes(size / 500e6))
    imported = model.base.gguf or model.base.pypi
    memory = INTERPRETER_BYTES + (4 * size if imported else 0)
    return Needs(_mb(memory), disk_mb=_mb(1.6 * size if imported else size), runtime=_minutes(size / DOWNLOAD_BYTES))


def train_needs(model: Model, hardware: Hardware) -> Needs:
    """Weights as the method holds them, the adapter with its optimizer, activations and logits of one batch."""
    if model.adapter is None or model.adapter.train is None:
        return small_needs()
    train, shape = model.adapter.train, shape_of(model)
    held = {"fp32": 4, "bf16": 2, "fp16": 2}[train.precision]
    embeddings = shape.embedding * (1 if shape.tie_word_embeddings else 2)
    linear = {"qlora": LINEAR_BYTES["4-bit"], "int8": LINEAR_BYTES["int8"]}.get(train.method, held)
    weights = embeddings * held + (shape.parameters - embeddings) * linear
    adapter = 16 * lora_parameters(shape, train.lora.r)  # float32 weight, gradient, two moments
    tokens = train.per_device_train_batch_size * train.max_length
    # As computed, in float32, and their gradient; lib.token_loss has no more than this at a time.
    logits = min(tokens * shape.vocab_size, 1 << 26) * (held + 8)
    kept = 1 if train.gradient_checkpointing else shape.num_hidden_layers
    activations = tokens * held * (10 * shape.hidden_size + 3 * shape.intermediate_size) * kept
    activations += tokens * held * shape.hidden_size * shape.num_hidden_layers
    total = 1.1 * (weights + adapter + logits + activations)
    if train.device == "cpu":
        return Needs(mem_mb=_mb(total + INTERPRETER_BYTES), disk_mb=100, runtime=_minutes(7e-4 * shape.parameters**0.8))
    card = min(hardware.gpus, default=24.0) * GIB
    count = max(1, min(len(hardware.gpus), math.ceil(total / (card - CUDA_BYTES))))
    # Whole layers go to one card or another, and the logits to the last.
    uneven = 1.3 if count > 1 else 1.0
    return Needs(
        mem_mb=_mb(INTERPRETER_BYTES + 4 * shape.embedding + 5e9),
        disk_mb=1000,
        runtime=240,
        gpu=count,
        gpu_mem_mb=min(_mb(uneven * total / count + CUDA_BYTES), _mb(card)),
    )


def merge_needs(model: Model) -> Needs:
    """A few blocks of rows, whatever the model's size."""
    size = weight_bytes(model, "f32" if model.merge.dtype == "float32" else "f16")
    needs = Needs(mem_mb=_mb(1.5e9), disk_mb=_mb(size), runtime=_minutes(size / MERGE_BYTES))
    if model.merge.device == "cuda":
        return replace(needs, mem_mb=_mb(1.5e9 + CUDA_HOST_BYTES), gpu=1, gpu_mem_mb=_mb(CUDA_BYTES + 2e9))
    return needs


def convert_needs(model: Model) -> Needs:
    """llama.cpp's converter holds one tensor at a time, in two forms."""
    size = weight_bytes(model, "f16")
    memory = INTERPRETER_BYTES + 6 * shape_of(model).embedding
    return Needs(mem_mb=_mb(memory), disk_mb=_mb(size), runtime=_minutes(size / CONVERT_BYTES))


def quantize_needs(model: Model, quant: str) -> Needs:
    """llama-quantize holds its largest tensor as read, as float32 and quantized."""
    shape = shape_of(model)
    seconds = 2 * shape.parameters / (QUANTIZE_WEIGHTS * THREADS)
    memory = 0.3e9 + 7 * shape.embedding
    return Needs(mem_mb=_mb(memory), disk_mb=_mb(weight_bytes(model, quant)), runtime=_minutes(seconds))


def direct_needs(model: Model, quants: Sequence[str]) -> Needs:
    """Blocks of rows for each thread, and the header of the file; 1.2 GB were seen with 16 threads at 32B."""
    seconds = len(quants) * shape_of(model).parameters / (DIRECT_WEIGHTS * THREADS)
    size = sum(weight_bytes(model, quant) + 0.1e9 for quant in quants)
    needs = Needs(mem_mb=_mb(2e9), disk_mb=_mb(size), runtime=_minutes(seconds))
    if model.merge.device == "cuda":
        return replace(needs, mem_mb=_mb(2e9 + CUDA_HOST_BYTES), gpu=1, gpu_mem_mb=_mb(CUDA_BYTES + 2e9))
    return needs


def imatrix_needs(model: Model, hardware: Hardware) -> Needs:
    """
    llama-imatrix holds logits, keys, values and activations of one chunk; the weights are mapped.

    Weights beyond the planned machine's memory are read from disk again for every chunk, so that no more is asked for.
    """
    if model.quantize.imatrix is None:
        return small_needs()
    shape = shape_of(model)
    head = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    token = 2 * shape.vocab_size + 10 * shape.hidden_size + 3 * shape.intermediate_size
    token += shape.num_hidden_layers * shape.num_key_value_heads * head
    held = 0.5e9 + 4 * CHUNK_TOKENS * token
    memory = max(held, min(held + weight_bytes(model, "f16"), 0.9 * hardware.ram * GIB))
    sums = 4 * shape.num_hidden_layers * (6 * shape.hidden_size + shape.intermediate_size)
    products = shape.parameters * CHUNK_TOKENS * model.quantize.imatrix.chunks
    return Needs(_mb(memory), disk_mb=_mb(2 * sums), runtime=_minutes(products / (IMATRIX_PRODUCTS * THREADS)))


def answer_needs(model: Model, quant: str) -> Needs:
    """llama.cpp maps the file, and keeps keys and values of a short context."""
    return Needs(mem_mb=_mb(INTERPRETER_BYTES + 1.1 * weight_bytes(model, quant)), disk_mb=1, runtime=30)


def convert_adapter_needs(model: Model) -> Needs:
    """llama.cpp's converter holds the adapter, which is as large in float32 as its rank says."""
    train = model.adapter.train if model.adapter else None
    size = adapter_bytes(model) * (1 if train else 2)
    return Needs(_mb(INTERPRETER_BYTES + 2 * size), disk_mb=_mb(size) + 1, runtime=_minutes(size / CONVERT_BYTES))


def register_needs(model: Model) -> Needs:
    """Our side sends a file; the server, if it is on this machine, keeps up to four copies of it for a while."""
    size = weight_bytes(model, model.default_quant)
    return Needs(small_needs().mem_mb, disk_mb=_mb(4 * size), runtime=30 + _minutes(4 * size / DISK_BYTES))


def build_needs() -> Needs:
    """One compiler a thread; a build on 2 threads was sampled at 0.9 GB in all, so 0.7 GB each is on the safe side."""
    return Needs(mem_mb=_mb(0.7e9 * THREADS), disk_mb=600, runtime=60)


def modelfile_needs(model: Model) -> Needs:
    """A Python with transformers, and llama-server, which maps the weights and keeps 512 tokens of a context."""
    shape = shape_of(model)
    kept = 2 * 2 * 512 * shape.num_hidden_layers * shape.hidden_size
    seconds = weight_bytes(model, model.default_quant) / DISK_BYTES
    return Needs(_mb(2 * INTERPRETER_BYTES + kept), disk_mb=1, runtime=5 + _minutes(seconds))


def small_needs() -> Needs:
    """A step that reads headers and writes text."""
    return Needs(mem_mb=500, disk_mb=1, runtime=5)


def check_base_needs() -> Needs:
    """Two Pythons with torch and transformers, ours and the converter's; of the weights only headers are read."""
    return Needs(mem_mb=_mb(2 * INTERPRETER_BYTES), disk_mb=20, runtime=5)


def import_needs(model: Model) -> Needs:
    """An adapter is there already, so its size is known; its weights are copied and hashed in blocks."""
    if model.adapter is None or model.adapter.path is None:
        return small_needs()
    size = Path(model.adapter.path, ADAPTER_WEIGHTS).stat().st_size
    return Needs(mem_mb=small_needs().mem_mb, disk_mb=_mb(size) + 1, runtime=_minutes(size / MERGE_BYTES))


def _mb(size: float) -> int:
    return math.ceil(size / 1e6)


def _minutes(seconds: float) -> int:
    return max(5, math.ceil(seconds / 60))
