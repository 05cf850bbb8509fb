"""
What each step of a heatmap model needs, from its backbone's numbers and the config alone: milliseconds, no torch.

Weights are counted. The memory of training on cards is held against the measurements of docs/measurements.md,
"Memory of training heatmap models"; all else is on the safe side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Any

from lib.estimate import (
    ADAPTER_GRADIENT,
    ADAPTER_STATE,
    DOWNLOAD_BYTES,
    INTERPRETER_BYTES,
    LINEAR_BYTES,
    THREADS,
    Needs,
    in_mb,
    in_minutes,
    small_needs,
)
from lib.heatmap_settings import PREFETCHED, READERS, Heatmap
from lib.heatmap_spec import FPN, HeatmapModel
from lib.sizes import CUDA_BYTES

TRAINED = ADAPTER_STATE + ADAPTER_GRADIENT
FLOATS = {"fp32": 4, "bf16": 2, "fp16": 2, "float32": 4, "bfloat16": 2, "float16": 2}
COLOURS, IMAGE_SIZE = 3, 224
STEM = 4  # sides of a ConvNeXt's first patches
# Of a layer's outputs, how many are there at a time, as wide as the model and as its feed-forward layer.
KEPT, KEPT_WIDE, KEPT_DECODER = 12, 5, 8
# Of a layer of the decoder, how many numbers are kept for the backward pass in float32 (of norms), and as many besides.
KEPT_NORMS = 3
# What is allocated beside tensors that are kept, and what was not counted: 5 to 20 % above every measured peak.
MARGIN = 1.14
FRAMES = 20_000  # of TrackNet's own data, where nobody says how many there are
EVALUATED_BATCH = 8
JPEG_BYTES = 0.4  # per pixel, of a drawn frame
DRAWN_FRAMES, READ_BYTES = 10, 50e6  # per second
PRODUCTS = {"cpu": 3e10, "cuda": 5e12}  # per second, that a training computes


@dataclass(frozen=True)
class Layers:
    """
    Layers of one size.

    Attributes:
        count: of the layers.
        hidden: numbers of a frame, as wide as the model.
        wide: the same, as wide as the feed-forward layer.
        attention: each has attention beside its feed-forward layer.
    """

    count: int
    hidden: int
    wide: int
    attention: bool

    def kept_bytes(self, held: int, method: str, *, adapted: bool) -> float:
        """
        What one layer keeps of a frame for its backward pass.

        Args:
            held: bytes of a number in the training's precision.
            adapted: there is a LoRA on each linear layer.
        """
        # Inputs of norms are float32 at any precision; the others are what linear layers and attention multiply.
        norms, others = (2, 6) if self.attention else (1, 3)
        kept = norms * self.hidden * 4 + (others * self.hidden + 2 * self.wide) * held
        inputs = (5 if self.attention else 1) * self.hidden + self.wide  # of all linear layers
        projected = 3 * self.hidden if self.attention else 0  # queries, keys and values
        if adapted:
            kept += inputs + projected * held  # each dropout's mask, and its output where three layers share an input
        if method == "int8":
            kept += 2 * (inputs + projected)  # bitsandbytes keeps its own, in 16 bits
        if method == "qlora":
            kept += (4 - held) * self.wide  # float32, as the sum of the layer and its adapter is
        return kept


@dataclass(frozen=True)
class Backbone:
    """
    Numbers of a backbone.

    Attributes:
        linear: weights of its linear layers, which can be quantized and adapted.
        others: all its other weights.
        widths: of inputs and outputs of the linear layers, together: a LoRA of rank 1 has so many weights.
        layers: by size.
        layer: numbers of a frame in the largest layer.
        products: multiplications of a frame.
    """

    linear: int
    others: int
    widths: int
    layers: tuple[Layers, ...]
    layer: int
    products: int

    @property
    def parameters(self) -> int:
        return self.linear + self.others


def backbone_of(model: HeatmapModel) -> Backbone:
    """The numbers of a model's backbone, at the size of its input."""
    width, height = model.heatmap.input_size
    shape = model.base.shape
    return _convnext(shape, width, height) if model.heatmap.model == FPN else _vit(shape, width, height)


def _vit(shape: Mapping[str, Any], width: int, height: int) -> Backbone:
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    wide = shape.get("intermediate_size") or ceil(hidden * shape.get("mlp_ratio", 4))
    patch, image = (_side(shape.get(key, default)) for key, default in (("patch_size", 16), ("image_size", IMAGE_SIZE)))
    tokens = ceil(width / patch) * ceil(height / patch) + 5  # class and register tokens
    block = 4 * hidden**2 + 2 * hidden * wide
    # Patches, positions, class token, biases and norms, and the pooler that some families have.
    others = COLOURS * patch**2 * hidden + (image // patch) ** 2 * hidden + layers * (10 * hidden + wide) + hidden**2
    return Backbone(
        linear=layers * block,
        others=others,
        widths=layers * (8 * hidden + 2 * (hidden + wide)),
        layers=(Layers(layers, tokens * hidden, tokens * wide, attention=True),),
        layer=tokens * (KEPT * hidden + KEPT_WIDE * wide),
        products=tokens * layers * (block + 2 * tokens * hidden),
    )


def _convnext(shape: Mapping[str, Any], width: int, height: int) -> Backbone:
    sizes, depths = list(shape["hidden_sizes"]), list(shape["depths"])
    places = [ceil(width / STEM / 2**stage) * ceil(height / STEM / 2**stage) for stage in range(len(sizes))]
    stages = list(zip(sizes, depths, places, strict=True))
    between = sum(4 * fine * coarse + 2 * fine + coarse for fine, coarse in pairwise(sizes))
    stem = COLOURS * STEM**2 * sizes[0] + 3 * sizes[0]
    return Backbone(
        linear=sum(8 * size**2 * depth for size, depth, _ in stages),
        others=stem + between + sum((49 + 9) * size * depth for size, depth, _ in stages) + 2 * sizes[-1],
        widths=sum(10 * size * depth for size, depth, _ in stages),
        layers=tuple(Layers(depth, size * place, 4 * size * place, attention=False) for size, depth, place in stages),
        layer=max((KEPT + 4 * KEPT_WIDE) * size * place for size, _, place in stages),
        products=sum((8 * size**2 + 49 * size) * depth * place for size, depth, place in stages),
    )


def _side(size: Any) -> int:
    return max(size) if isinstance(size, list | tuple) else size


def decoder_parameters(model: HeatmapModel) -> int:
    """Weights of decoder, head and what mixes several frames."""
    heatmap, shape = model.heatmap, model.base.shape
    mixer = COLOURS**2 * heatmap.frames + COLOURS if heatmap.frames > 1 else 0
    if heatmap.model == FPN:
        return mixer + _pyramid_parameters(heatmap, list(shape["hidden_sizes"]))
    widths, total = [shape["hidden_size"], *heatmap.channels], mixer + heatmap.channels[-1] + 1
    for (inner, outer), factor in zip(pairwise(widths), heatmap.factors, strict=True):
        total += (inner + 1) * outer * factor**2 + outer**2 + 13 * outer
        squeezed = max(8, outer // 4)
        total += 2 * outer * squeezed + outer + squeezed if heatmap.squeeze_excite else 0
    return total


def _pyramid_parameters(heatmap: Heatmap, sizes: list[int]) -> int:
    channels = heatmap.fpn_channels
    inner = channels * (2 if heatmap.fusion == "concat" else 1)
    refine = (len(sizes) - 1) * (9 * inner * channels + 3 * channels)
    return sum((size + 1) * channels for size in sizes) + refine + channels + 1


def _decoder_outputs(model: HeatmapModel) -> int:
    """Numbers of a frame that leave the decoder's layers."""
    heatmap, shape = model.heatmap, model.base.shape
    width, height = heatmap.input_size
    if heatmap.model == FPN:
        finest = ceil(width / STEM) * ceil(height / STEM)
        return ceil(1.34 * heatmap.fpn_channels * finest)
    patch = _side(shape.get("patch_size", 16))
    places, outputs = ceil(width / patch) * ceil(height / patch), 0
    for channels, factor in zip(heatmap.channels, heatmap.factors, strict=True):
        places *= factor**2
        outputs += channels * places
    return outputs


def _loss_numbers(model: HeatmapModel) -> int:
    """Numbers of a frame that a heatmap and its loss take."""
    return 4 * model.heatmap.heatmap_size[0] * model.heatmap.heatmap_size[1]


def _decoder_numbers(model: HeatmapModel) -> int:
    """Numbers of a frame in decoder and heatmap."""
    return KEPT_DECODER * _decoder_outputs(model) + _loss_numbers(model)


def parameters(model: HeatmapModel) -> int:
    """Weights of the whole model."""
    return backbone_of(model).parameters + decoder_parameters(model)


def held_bytes(model: HeatmapModel, kind: str) -> int:
    """
    The weights in memory, in bytes.

    Args:
        kind: fp32, fp16, int8 or 4-bit; of the latter two only the backbone's linear layers, all else being in 16 bits.
    """
    if kind in LINEAR_BYTES:
        linear = backbone_of(model).linear
        return round(LINEAR_BYTES[kind] * linear + 2 * (parameters(model) - linear))
    return FLOATS[kind] * parameters(model)


def trained_parameters(model: HeatmapModel) -> int:
    """Weights that the training changes."""
    train = model.adapter.train
    if train.method == "full":
        return parameters(model)
    lora = backbone_of(model).widths * train.lora.r if train.lora.enabled else 0
    return decoder_parameters(model) + lora


def training_bytes(model: HeatmapModel) -> float:
    """The most that tensors take of the card, or of RAM where that is trained on, in bytes."""
    train, backbone = model.adapter.train, backbone_of(model)
    held = FLOATS[train.precision]
    if train.method == "full":
        weights: float = 0 if held == 4 else held * parameters(model)  # what autocast makes of them
    else:
        linear = {"qlora": LINEAR_BYTES["4-bit"], "int8": LINEAR_BYTES["int8"]}.get(train.method, held)
        weights = linear * backbone.linear + held * backbone.others
    kept = train.per_device_train_batch_size * _kept_bytes(model)
    return MARGIN * (weights + TRAINED * trained_parameters(model) + kept)


def _kept_bytes(model: HeatmapModel) -> float:
    """What a training keeps of a frame for its backward pass."""
    train, layers = model.adapter.train, backbone_of(model).layers
    held = FLOATS[train.precision]
    adapted = train.method != "full" and train.lora.enabled
    each = [layer.kept_bytes(held, train.method, adapted=adapted) for layer in layers]
    decoder = _decoder_outputs(model) * KEPT_NORMS * (4 + held) + 4 * _loss_numbers(model)
    if not train.gradient_checkpointing:
        return decoder + sum(layer.count * kept for layer, kept in zip(layers, each, strict=True))
    # What goes from layer to layer is float32, but from bitsandbytes' 8-bit layers it comes in 16 bits. The decoder is
    # let go before the first layer is computed again, whose gradients are there as well.
    between = held if train.method == "int8" else 4
    return sum(layer.count * layer.hidden * between for layer in layers) + max(decoder, 1.5 * max(each))


def fetch_needs(model: HeatmapModel) -> Needs:
    """Downloading holds a few blocks; a random backbone is made whole."""
    size = 4 * backbone_of(model).parameters
    if model.base.path:
        return Needs(mem_mb=in_mb(0.2e9), disk_mb=1, runtime=in_minutes(size / 500e6))
    memory = INTERPRETER_BYTES + (2 * size if model.base.random is not None else 0)
    return Needs(in_mb(memory), disk_mb=in_mb(size) + 1, runtime=in_minutes(size / DOWNLOAD_BYTES))


def frames_of(model: HeatmapModel) -> int:
    """Frames of the clips: as many as are drawn, or as TrackNet's data have."""
    drawn = model.clips.synthetic
    return drawn.games * drawn.clips * drawn.frames if drawn else FRAMES


def make_clips_needs(model: HeatmapModel) -> Needs:
    """One frame at a time."""
    drawn = model.clips.synthetic
    if drawn is None:
        return small_needs()
    size = frames_of(model) * (drawn.size[0] * drawn.size[1] * JPEG_BYTES + 4096)
    return Needs(small_needs().mem_mb, disk_mb=in_mb(size), runtime=in_minutes(frames_of(model) / DRAWN_FRAMES))


def check_clips_needs(model: HeatmapModel) -> Needs:
    """The frames are read once, in blocks, for their digests."""
    width, height = model.clips.synthetic.size if model.clips.synthetic else (1280, 720)
    size = frames_of(model) * width * height * JPEG_BYTES
    return Needs(small_needs().mem_mb, disk_mb=1, runtime=in_minutes(size / READ_BYTES))


def train_needs(model: HeatmapModel) -> Needs:
    """What training_bytes says, on one card or the CPU; on disk two checkpoints, and pictures for TensorBoard."""
    train, backbone = model.adapter.train, backbone_of(model)
    disk = 2 * 12 * trained_parameters(model) + 4 * trained_parameters(model) + 100e6
    products = 3 * (backbone.products + _decoder_numbers(model) * 32) * frames_of(model) * train.num_train_epochs
    runtime = in_minutes(2 * products / PRODUCTS[train.device])
    workers = _reading_bytes(model)
    if train.device == "cpu":
        return Needs(in_mb(INTERPRETER_BYTES + training_bytes(model) + workers), in_mb(disk), runtime)
    memory = 2.5e9 + 2 * 4 * backbone.parameters + workers
    if train.offload.use_cpu_offload:
        memory += training_bytes(model)
    return Needs(in_mb(memory), in_mb(disk), runtime, gpu=1, gpu_mem_mb=in_mb(training_bytes(model) + CUDA_BYTES))


def _readers(model: HeatmapModel) -> int:
    """Processes that read frames while a model is trained, at most."""
    asked = model.adapter.train.dataloader_num_workers
    return READERS if asked is None else asked


def _reading_bytes(model: HeatmapModel) -> float:
    """Of these processes: 48 MB of its own were seen at 16 frames a batch and 107 at 64, and batches lie ready."""
    train, (width, height) = model.adapter.train, model.heatmap.input_size
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    frame = COLOURS * model.heatmap.frames * width * height
    return _readers(model) * (0.1e9 + (PREFETCHED + 3) * batch * frame)


def train_threads(model: HeatmapModel) -> int:
    """Cores that a training is given: for the reading processes and itself, or for the arithmetic on the CPU."""
    return max(THREADS, _readers(model) + 1)


def written_bytes(model: HeatmapModel) -> int:
    """Size of the merged model, and of the ONNX file."""
    return FLOATS[model.merge.dtype] * parameters(model)


def merge_needs(model: HeatmapModel) -> Needs:
    """The model in float32, what it was trained to, and what is written."""
    memory = INTERPRETER_BYTES + 3 * 4 * parameters(model)
    return Needs(in_mb(memory), disk_mb=in_mb(written_bytes(model)) + 1, runtime=5)


def export_needs(model: HeatmapModel) -> Needs:
    """The model, the exporter's graph, its file, and a frame computed by both."""
    computed = 4 * (backbone_of(model).layer + _decoder_numbers(model))
    memory = INTERPRETER_BYTES + 0.5e9 + 5 * 4 * parameters(model) + 2 * computed
    return Needs(in_mb(memory), disk_mb=in_mb(2 * written_bytes(model)) + 2, runtime=10)


def evaluate_needs(model: HeatmapModel) -> Needs:
    """The model, and a batch of frames on their way through it; overlays are a few pictures of each clip."""
    device = model.adapter.train.device
    computed = EVALUATED_BATCH * 4 * (2 * backbone_of(model).layer + _decoder_numbers(model))
    memory = 1.2 * (4 * parameters(model) + computed)
    runtime = in_minutes(2 * backbone_of(model).products * frames_of(model) / PRODUCTS[device])
    if device == "cpu":
        return Needs(in_mb(INTERPRETER_BYTES + memory), disk_mb=200, runtime=runtime)
    return Needs(in_mb(2.5e9), disk_mb=200, runtime=runtime, gpu=1, gpu_mem_mb=in_mb(memory + CUDA_BYTES))
