"""
What each step needs, from the model's shape and the config alone: milliseconds, no torch.

Memory and disk in MB (10^6 bytes, as Snakemake counts), time in minutes. The memory of training, merging, converting
and quantizing is held against the measurements of docs/measurements.md, "What steps need"; all else is on the safe side
of what was seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lib.adapter_folder import WEIGHTS as ADAPTER_WEIGHTS
from lib.budget import AUTO
from lib.calibration import CHUNK_TOKENS
from lib.logits_file import logits_bytes
from lib.sizes import CUDA_BYTES, GIB, cache_bytes, file_bytes
from lib.spec import Hardware, Model, Shape
from lib.token_loss import LOGITS_AT_ONCE
from lib.train_settings import Train

PYTHON_BYTES = 0.415e9  # Python with torch imported
INTERPRETER_BYTES = 0.8e9  # Python with torch, transformers and peft imported
ADAPTER_STATE, ADAPTER_GRADIENT = 12, 4  # bytes a weight: itself and two moments, in float32; its gradient
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

    def then(self, later: Needs) -> Needs:
        """What this job and then another ask for."""
        ram, gpu = max(self.mem_mb, later.mem_mb), max(self.gpu, later.gpu)
        disk, runtime = self.disk_mb + later.disk_mb, self.runtime + later.runtime
        return Needs(ram, disk, runtime, gpu, max(self.gpu_mem_mb, later.gpu_mem_mb))


def shape_of(model: Model) -> Shape:
    """The model's shape; the resolver has seen to it that there is one."""
    if model.base.shape is None:
        raise ValueError("a resolved model has a shape")
    return model.base.shape


def weight_bytes(model: Model, quant: str) -> float:
    """Size of the model's weights in a type, in bytes; of `auto` in the largest that may be chosen."""
    return file_bytes(shape_of(model), model.quantize.candidates[0] if quant == AUTO else quant)


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


def fetch_needs(model: Model) -> Needs:
    """Downloading holds a few blocks; importing a GGUF holds all weights, in float32 and once more."""
    size = weight_bytes(model, "f16")
    if model.base.path:
        return Needs(mem_mb=in_mb(0.2e9), disk_mb=1, runtime=in_minutes(size / 500e6))
    imported = model.base.gguf or model.base.pypi
    memory = INTERPRETER_BYTES + (4 * size if imported else 0)
    return Needs(
        in_mb(memory), disk_mb=in_mb(1.6 * size if imported else size), runtime=in_minutes(size / DOWNLOAD_BYTES)
    )


def train_needs(model: Model, hardware: Hardware) -> Needs:
    """What training_bytes says, on as many of the planned cards as it takes."""
    if model.adapter is None or model.adapter.train is None:
        return small_needs()
    train, shape = model.adapter.train, shape_of(model)
    if train.device == "cpu":
        memory = PYTHON_BYTES + training_bytes(shape, train)
        return Needs(mem_mb=in_mb(memory), disk_mb=100, runtime=in_minutes(7e-4 * shape.parameters**0.8))
    card = min(hardware.gpus, default=24.0) * GIB
    most = max(1, len(hardware.gpus))
    fitting = (n for n in range(1, most + 1) if training_bytes(shape, train, cards=n) <= card - CUDA_BYTES)
    count = next(fitting, most)
    each = in_mb(training_bytes(shape, train, cards=count) + CUDA_BYTES)
    memory = training_ram(shape, train, cards=count)
    return Needs(in_mb(memory), disk_mb=1000, runtime=240, gpu=count, gpu_mem_mb=each)


def training_bytes(shape: Shape, train: Train, *, cards: int = 1) -> float:
    """
    The most that tensors take of a card, or of RAM where that is trained on, in bytes.

    Beside what is spread over the cards (weights, adapter, activations that are kept) it is either the logits of the
    tokens that are computed at a time, or one block computed again, with the adapter's gradients.
    """
    on_cpu = train.device == "cpu"
    held = {"fp32": 4, "bf16": 2, "fp16": 2}[train.precision]
    linear = {"qlora": LINEAR_BYTES["4-bit"], "int8": LINEAR_BYTES["int8"]}.get(train.method, held)
    embeddings = shape.embedding * (1 if shape.tie_word_embeddings else 2)
    weights = embeddings * held + (shape.parameters - embeddings) * linear
    adapter = lora_parameters(shape, train.lora.r)
    tokens = train.per_device_train_batch_size * train.max_length
    hidden, wide = shape.hidden_size, shape.intermediate_size
    # Of int8 the inputs of the widest layer are kept once more; on the CPU nothing is compiled, so that more is kept.
    copies = 1 if train.method == "int8" else 0
    kept, wides = (10, 5 + copies) if on_cpu else (7, 3 + copies)
    every_block = 0 if train.gradient_checkpointing else kept * hidden + wides * wide
    spread = weights + ADAPTER_STATE * adapter + tokens * held * shape.num_hidden_layers * (hidden + every_block)
    if cards > 1:
        # Whole layers go to one card or another, and the output head to the last.
        spread *= 1.11 / cards
    logits = min(tokens * shape.vocab_size, LOGITS_AT_ONCE) * (17 + 2.5 * held if on_cpu else 13)
    logits += 2.4 * tokens * shape.vocab_size if on_cpu else 0
    block = tokens * held * (16 * hidden + (6.5 + copies) * wide) if train.gradient_checkpointing else 0
    return 1.1 * (spread + max(logits, block, ADAPTER_GRADIENT * adapter / cards + block))


def training_ram(shape: Shape, train: Train, *, cards: int = 1) -> float:
    """
    RAM of a training on cards, in bytes, without mapped checkpoints and libraries, which the kernel takes back.

    Most of it is for Python, torch and CUDA; a part grows with the weights (measured from 0.5B to 32B).
    """
    quantizing = {"qlora": 0.05e9, "int8": 0.1e9}.get(train.method, 0.0)
    memory = 1.1 * (1.41e9 + 0.017 * shape.parameters + quantizing + 0.1e9 * (cards - 1))
    if train.offload.use_cpu_offload:
        # Weights beyond the cards, and the activations that are kept.
        tokens = train.per_device_train_batch_size * train.max_length
        memory += held_bytes(shape, {"qlora": "4-bit", "int8": "int8"}.get(train.method, "fp16"))
        memory += 2 * tokens * shape.num_hidden_layers * shape.hidden_size
    return memory


def merge_needs(model: Model, threads: int = THREADS) -> Needs:
    """A few blocks of rows for each thread, and the mapped adapter, whatever the model's size."""
    size = weight_bytes(model, "f32" if model.merge.dtype == "float32" else "f16")
    needs = Needs(mem_mb=0, disk_mb=in_mb(size), runtime=in_minutes(size / MERGE_BYTES))
    shape = shape_of(model)
    block = 14.3 * min(1 << 22, shape.hidden_size * shape.intermediate_size)
    return _streamed(needs, model, threads, block_bytes=block, cuda_bytes=1.45e9)


def direct_needs(model: Model, quants: Sequence[str], threads: int = THREADS) -> Needs:
    """As merging, and the header of the file."""
    seconds = len(quants) * shape_of(model).parameters / (DIRECT_WEIGHTS * THREADS)
    size = sum(weight_bytes(model, quant) + 0.1e9 for quant in quants)
    needs = Needs(mem_mb=0, disk_mb=in_mb(size), runtime=in_minutes(seconds))
    return _streamed(needs, model, threads, block_bytes=25e6, cuda_bytes=0.85e9)


def _streamed(needs: Needs, model: Model, threads: int, *, block_bytes: float, cuda_bytes: float) -> Needs:
    """With the memory of a step that goes through the weights in blocks, on the CPU or on a GPU."""
    adapter = adapter_bytes(model)
    if model.merge.device == "cuda":
        return replace(needs, mem_mb=in_mb(cuda_bytes + adapter), gpu=1, gpu_mem_mb=in_mb(CUDA_BYTES + 2e9))
    return replace(needs, mem_mb=in_mb(PYTHON_BYTES + adapter + block_bytes * threads))


def convert_needs(model: Model) -> Needs:
    """llama.cpp's converter holds one tensor at a time, in two forms."""
    size = weight_bytes(model, "f16")
    shape = shape_of(model)
    memory = 0.45e9 + 1.85 * shape.embedding * (1.0 if shape.tie_word_embeddings else 1.5)
    return Needs(mem_mb=in_mb(memory), disk_mb=in_mb(size), runtime=in_minutes(size / CONVERT_BYTES))


def quantize_needs(model: Model, quant: str) -> Needs:
    """llama-quantize holds its largest tensor as read, as float32 and quantized."""
    shape = shape_of(model)
    seconds = 2 * shape.parameters / (QUANTIZE_WEIGHTS * THREADS)
    memory = 0.08e9 + 7.1 * shape.embedding
    return Needs(mem_mb=in_mb(memory), disk_mb=in_mb(weight_bytes(model, quant)), runtime=in_minutes(seconds))


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
    return Needs(in_mb(memory), disk_mb=in_mb(2 * sums), runtime=in_minutes(products / (IMATRIX_PRODUCTS * THREADS)))


def measuring_bytes(model: Model) -> int:
    """Disk that comparing types takes meanwhile: what the 16-bit file says of each token, and the largest type made."""
    if model.quality is None:
        return 0
    made = [quant for quant in model.compared_types if model.quantize.is_auto or model.quantize.uses_imatrix(quant)]
    logits = logits_bytes(vocabulary=shape_of(model).vocab_size, chunks=model.quality.chunks)
    return round(logits + max((weight_bytes(model, quant) for quant in made), default=0))


def measure_needs(model: Model, hardware: Hardware) -> Needs:
    """
    llama-perplexity holds logits, their logarithms and activations of one chunk; the weights are mapped, or on cards.

    Weights beyond the planned machine's memory are read from disk again for every chunk, see imatrix_needs.
    """
    if model.quality is None:
        return small_needs()
    shape, quality, types = shape_of(model), model.quality, model.compared_types
    token = 40 * shape.hidden_size + 12 * shape.intermediate_size
    computed = CHUNK_TOKENS * token + cache_bytes(shape, CHUNK_TOKENS)
    held = 0.2e9 + 7 * CHUNK_TOKENS * shape.vocab_size + computed
    made = sum(model.quantize.uses_imatrix(quant) for quant in types) * (2 if quality.general_text else 1)
    products = (1 + len(types) + made) * shape.parameters * CHUNK_TOKENS * quality.chunks
    made += len(model.quantize.candidates)
    seconds = products / (IMATRIX_PRODUCTS * THREADS) + made * 2 * shape.parameters / (QUANTIZE_WEIGHTS * THREADS)
    size, disk = weight_bytes(model, "f16"), in_mb(measuring_bytes(model))
    if quality.device == "cuda":
        beside = CUDA_BYTES + 0.3e9 + 4 * CHUNK_TOKENS * shape.vocab_size + computed
        card = min(hardware.gpus) * GIB - beside
        cards = min(len(hardware.gpus), math.ceil(size / card)) if card > 0 else len(hardware.gpus)
        each = in_mb(size / cards + beside)
        return Needs(in_mb(held + 1e9), disk, in_minutes(seconds), gpu=cards, gpu_mem_mb=each)
    return Needs(in_mb(max(held, min(held + size, 0.9 * hardware.ram * GIB))), disk, in_minutes(seconds))


def measure_tuning_needs(model: Model, hardware: Hardware) -> Needs:
    """As much as measuring one type takes; what lies on disk are logits of held-out tokens, and no file is made."""
    if model.quality is None:
        return small_needs()
    logits = logits_bytes(vocabulary=shape_of(model).vocab_size, chunks=model.quality.chunks)
    return replace(measure_needs(model, hardware), disk_mb=in_mb(logits))


def compare_merges_needs(model: Model, hardware: Hardware) -> Needs:
    """
    The model as it was trained, run over a chunk at a time; on the cards that training had, or in RAM.

    The last term is of tensors on their way, as seen with a model of 0.5B; on disk lie both merges, and twice what a
    model says of each token.
    """
    train = model.adapter.train if model.adapter else None
    if model.quality is None or train is None:
        return small_needs()
    shape, merge = shape_of(model), direct_needs(model, ["q8_0"])
    kind = {"qlora": "4-bit", "int8": "int8"}.get(train.method, "fp32" if train.precision == "fp32" else "fp16")
    logits = logits_bytes(vocabulary=shape.vocab_size, chunks=model.quality.chunks)
    disk = in_mb(2 * weight_bytes(model, "q8_0") + 2 * logits)
    held = held_bytes(shape, kind) + 4 * lora_parameters(shape, train.lora.r)
    computed = CHUNK_TOKENS // 2 * shape.vocab_size * (8 if train.precision == "fp32" else 6) + 0.9e9
    runtime = 2 * merge.runtime + measure_needs(model, hardware).runtime
    if train.device != "cuda":
        memory = max(in_mb(INTERPRETER_BYTES + held + computed), merge.mem_mb)
        return Needs(memory, disk, runtime)
    cards = train_needs(model, hardware).gpu
    memory = max(in_mb(training_ram(shape, train)), merge.mem_mb)
    return Needs(memory, disk, runtime, gpu=cards, gpu_mem_mb=in_mb(1.11 * held / cards + computed + CUDA_BYTES))


def answer_needs(model: Model, quant: str) -> Needs:
    """llama.cpp maps the file, and keeps keys and values of a short context."""
    return Needs(mem_mb=in_mb(INTERPRETER_BYTES + 1.1 * weight_bytes(model, quant)), disk_mb=1, runtime=30)


def convert_adapter_needs(model: Model) -> Needs:
    """llama.cpp's converter holds the adapter, which is as large in float32 as its rank says."""
    train = model.adapter.train if model.adapter else None
    size = adapter_bytes(model) * (1 if train else 2)
    return Needs(in_mb(INTERPRETER_BYTES + 2 * size), disk_mb=in_mb(size) + 1, runtime=in_minutes(size / CONVERT_BYTES))


def register_needs(model: Model) -> Needs:
    """Our side sends a file; the server, if it is on this machine, keeps up to four copies of it for a while."""
    size = weight_bytes(model, model.default_quant)
    return Needs(small_needs().mem_mb, disk_mb=in_mb(4 * size), runtime=30 + in_minutes(4 * size / DISK_BYTES))


def build_needs() -> Needs:
    """One compiler a thread; a build on 2 threads was sampled at 0.9 GB in all, so 0.7 GB each is on the safe side."""
    return Needs(mem_mb=in_mb(0.7e9 * THREADS), disk_mb=600, runtime=60)


def modelfile_needs(model: Model) -> Needs:
    """A Python with transformers, and llama-server, which maps the weights and keeps 512 tokens of a context."""
    shape = shape_of(model)
    kept = 2 * 2 * 512 * shape.num_hidden_layers * shape.hidden_size
    seconds = weight_bytes(model, model.default_quant) / DISK_BYTES
    return Needs(in_mb(2 * INTERPRETER_BYTES + kept), disk_mb=1, runtime=5 + in_minutes(seconds))


def small_needs() -> Needs:
    """A step that reads headers and writes text."""
    return Needs(mem_mb=500, disk_mb=1, runtime=5)


def render_needs(model: Model) -> Needs:
    """All samples are held as tokens, 14 bytes for each of the data's (measured); they are read at 1 MB/s."""
    train = model.adapter and model.adapter.train
    if train is None:
        return small_needs()
    size = sum(Path(file).stat().st_size for file in (train.data, train.eval_data) if file)
    minutes = 5 + in_minutes(size / 0.5e6)
    return Needs(in_mb(INTERPRETER_BYTES + 20 * size), disk_mb=in_mb(2 * size) + 1, runtime=minutes)


def check_base_needs() -> Needs:
    """Two Pythons with torch and transformers, ours and the converter's; of the weights only headers are read."""
    return Needs(mem_mb=in_mb(2 * INTERPRETER_BYTES), disk_mb=20, runtime=5)


def import_needs(model: Model) -> Needs:
    """An adapter is there already, so its size is known; its weights are copied and hashed in blocks."""
    if model.adapter is None or model.adapter.path is None:
        return small_needs()
    size = Path(model.adapter.path, ADAPTER_WEIGHTS).stat().st_size
    return Needs(mem_mb=small_needs().mem_mb, disk_mb=in_mb(size) + 1, runtime=in_minutes(size / MERGE_BYTES))


def in_mb(size: float) -> int:
    return math.ceil(size / 1e6)


def in_minutes(seconds: float) -> int:
    return max(5, math.ceil(seconds / 60))
