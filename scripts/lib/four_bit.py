"""
The round trip of a 4-bit load: what a base's weights were while an adapter was trained on them.

bitsandbytes cuts a weight into blocks of 64 values in a row, divides each by its largest magnitude and takes the
nearest of 16 numbers (NF4); with double quantization the magnitudes are stored in 8 bits as well, less their mean.
Here the same is done to blocks of rows, by elementwise operations that give the same bits on any device. The mean is
one over the whole tensor, whose bits in bitsandbytes depend on threads and device: here it is summed in float64 in a
fixed order. A magnitude that lies within that difference of a boundary of its 8 bits can get the neighbouring code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lib.errors import ModelmillError
from lib.fixed_sum import sum_rows
from lib.safetensors_file import StoredTensor, read_values

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Module

# bitsandbytes' smallest magnitude of a block, so that a block of zeros divides by something.
LEAST = 1e-38
# Magnitudes in a block of the second quantization.
OUTER_BLOCK = 256
# Values that are read at once to find magnitudes, 16 MiB of float32.
READ_VALUES = 1 << 22


class FourBitError(ModelmillError):
    """It is not known how a base was held in 4 bits."""


@dataclass(frozen=True)
class FourBit:
    """
    How bitsandbytes held a base in training.

    Attributes:
        device: that quantized it, cpu or cuda: on the CPU, bitsandbytes 0.50.2 does not always take the nearest of the
            8-bit numbers (460 of 262,144 magnitudes of one matrix were its neighbour).
        dtype: that the weights were loaded in, and are again when they are used: "bfloat16".
        double_quant: whether the magnitudes were quantized as well.
        blocksize: values in a block.
        layers: number of layers in 4 bits.
        skipped: names of the modules whose matrices were left as they are.
    """

    device: str
    dtype: str
    double_quant: bool
    blocksize: int
    layers: int
    skipped: tuple[str, ...]

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of the base was in 4 bits."""
        return len(shape) == 2 and name.endswith(".weight") and name.removesuffix(".weight") not in self.skipped


def describe_four_bit(model: Module) -> dict[str, Any] | None:
    """How a model is held right after its load, for its adapter's manifest; None where no layer of it is in NF4."""
    from bitsandbytes.nn import Linear4bit

    held, skipped = [], []
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            held.append(module.weight)
        elif getattr(module, "weight", None) is not None and module.weight.dim() == 2:
            skipped.append(name)
    if not held or held[0].quant_state.quant_type != "nf4":
        return None
    state = held[0].quant_state
    return asdict(
        FourBit(
            device=held[0].device.type,
            dtype=str(state.dtype).removeprefix("torch."),
            double_quant=state.nested,
            blocksize=state.blocksize,
            layers=len(held),
            skipped=tuple(skipped),
        )
    )


def read_four_bit(adapter: Mapping[str, Any] | None) -> FourBit:
    """
    How the base was held while an adapter was trained.

    Args:
        adapter: digest and origin of the adapter, as lib.manifest.identify_folder gives them; None for no adapter.

    Raises:
        FourBitError: there is no adapter, or its manifest does not say.
    """
    if adapter is None:
        raise FourBitError("merge.base_weights: nf4 is the base as it was in training, and there is no adapter")
    said = (adapter["origin"] or {}).get("four_bit")
    if not isinstance(said, Mapping) or said.keys() != FourBit.__annotations__.keys():
        raise FourBitError(
            "merge.base_weights: nf4 is the base as it was in training, and this adapter's manifest does not say how "
            "its base was held in NF4; merge onto the original weights, or train it with method: qlora"
        )
    return FourBit(**{**said, "skipped": tuple(said["skipped"])})


def import_bitsandbytes() -> None:
    """Import what threads are going to compute with: where several import it at once, some find torch half imported."""
    import bitsandbytes.functional  # noqa: F401


@dataclass(frozen=True)
class BlockScales:
    """
    The magnitudes of a tensor's blocks, (blocks,) float32 each.

    Attributes:
        largest: as they are, by which values are divided.
        kept: as they were stored, by which they are multiplied again.
    """

    largest: Tensor
    kept: Tensor


def block_scales(tensor: StoredTensor, how: FourBit) -> BlockScales:
    """Read a whole tensor, a part at a time, for the magnitudes of its blocks."""
    import torch

    step = READ_VALUES - READ_VALUES % how.blocksize
    parts = []
    for first in range(0, tensor.values, step):
        values = _loaded(read_values(tensor, first, min(step, tensor.values - first)), how)
        values = torch.nn.functional.pad(values, (0, -len(values) % how.blocksize))
        parts.append(values.view(-1, how.blocksize).abs().amax(dim=1))
    largest = torch.cat(parts)
    return BlockScales(largest, _stored_twice(largest, how) if how.double_quant else largest)


def _stored_twice(largest: Tensor, how: FourBit) -> Tensor:
    """Magnitudes after their own quantization to 8 bits and back."""
    import torch
    from bitsandbytes.functional import create_dynamic_map, quantize_blockwise

    count, numbers = len(largest), create_dynamic_map()
    mean = (sum_rows(largest.double().unsqueeze(0))[0] / count).float()
    blocks = torch.nn.functional.pad(largest - mean, (0, -count % OUTER_BLOCK)).view(-1, OUTER_BLOCK)
    outer = blocks.abs().amax(dim=1)
    if how.device == "cpu":
        codes = quantize_blockwise(largest - mean, blocksize=OUTER_BLOCK)[0].long()
    else:
        codes = nearest(blocks, outer, numbers).flatten()[:count]
    return numbers[codes] * outer.repeat_interleave(OUTER_BLOCK)[:count] + mean


def round_trip(values: Tensor, first: int, scales: BlockScales, how: FourBit) -> Tensor:
    """
    Values of a tensor after a 4-bit load, float32.

    Args:
        values: (rows, columns), consecutive ones of the tensor, on any device.
        first: place of the first of them in the whole tensor.
    """
    import torch
    from bitsandbytes.functional import get_4bit_type

    before = first % how.blocksize
    flat = torch.nn.functional.pad(_loaded(values.flatten(), how), (before, -(before + values.numel()) % how.blocksize))
    blocks = flat.view(-1, how.blocksize)
    start = first // how.blocksize
    largest, kept = (each[start : start + len(blocks)].to(values.device) for each in (scales.largest, scales.kept))
    numbers = get_4bit_type("nf4", device=values.device)
    read = (numbers[nearest(blocks, largest, numbers)] * kept.unsqueeze(1)).flatten()[before : before + values.numel()]
    return _loaded(read, how).view(values.shape)


def nearest(blocks: Tensor, largest: Tensor, numbers: Tensor) -> Tensor:
    """
    Which of some numbers is the nearest to each value, in terms of the largest magnitude of its block.

    Args:
        blocks: (blocks, values), float32.
        largest: (blocks,).
        numbers: in rising order.

    Returns:
        Places in `numbers`, (blocks, values), int32.
    """
    import torch

    scaled = (blocks * (1.0 / largest.clamp(min=LEAST)).unsqueeze(1)).clamp(-1, 1)
    return torch.bucketize(scaled, (numbers[:-1] + numbers[1:]) / 2, out_int32=True)


def _loaded(values: Tensor, how: FourBit) -> Tensor:
    """Values rounded to the dtype of the load, float32."""
    import torch

    dtype: torch.dtype = getattr(torch, how.dtype)
    return values.to(dtype).float()
