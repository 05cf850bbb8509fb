"""`quantize.types: auto`: which types may fit `quantize.budget`, and which of them is the best as measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lib.errors import ModelmillError
from lib.sizes import CUDA_BYTES, GIB, file_bytes

if TYPE_CHECKING:
    from lib.spec import Shape

AUTO = "auto"  # in the place of a type, in config.yaml and in names of files
# What is measured where `quality.types` names nothing: of each size the type that llama.cpp's own table has for best.
LADDER = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "iq3_xxs", "q2_k", "iq2_xs")
# The largest that fit: more bits are mostly, but not always, nearer to the 16-bit file.
MEASURED = 4
# The share of its estimated size that a file has at least; where rows do not fill a block of 256 weights, other types
# take their place, tensor by tensor.
LEAST_SHARE, LEAST_SHARE_OF_ROWS = 0.94, 0.85


class BudgetError(ModelmillError):
    """No type fits."""


@dataclass(frozen=True)
class Budget:
    """
    How large the default file may be; one of both is given.

    Attributes:
        file: GiB of the file itself.
        gpu_memory: GiB of a card that runs it, keys and values of `num_ctx` tokens included.
    """

    file: float | None
    gpu_memory: float | None

    def room(self, cache: int) -> int:
        """
        Bytes that the file may have.

        Args:
            cache: of the keys and values, in bytes.
        """
        if self.file is not None:
            return int(self.file * GIB)
        return int((self.gpu_memory or 0) * GIB - CUDA_BYTES - cache)

    def describe(self, cache: int) -> str:
        """As in "0.5 GiB of file"."""
        if self.file is not None:
            return f"{self.file:g} GiB of file"
        rest = f"{max(self.room(cache), 0) / 1e9:.2f} GB for the file beside {cache / 1e9:.2f} GB of keys and values"
        return f"{self.gpu_memory:g} GiB of GPU memory ({rest})"

    @property
    def remedy(self) -> str:
        """What to change where no type fits."""
        cache = "" if self.file is not None else "lower ollama.parameters.num_ctx, "
        return f"raise quantize.budget, {cache}or name smaller types in quality.types"


def candidates(shape: Shape, room: int, types: Iterable[str]) -> list[str]:
    """The types that are measured, large ones first: as many as MEASURED of those that may fit."""
    share = LEAST_SHARE_OF_ROWS if shape.hidden_size % 256 else LEAST_SHARE
    sizes = {quant: file_bytes(shape, quant) for quant in types}
    fitting = [quant for quant, size in sizes.items() if share * size <= room]
    return sorted(fitting, key=lambda quant: -sizes[quant])[:MEASURED]


def choose(rows: Sequence[Mapping[str, Any]], budget: Budget, cache: int) -> Mapping[str, Any]:
    """
    The type with the least divergence of those that fit.

    Args:
        rows: figures of measure_types.py.
        budget: how large the file may be.
        cache: of the keys and values, in bytes.

    Raises:
        BudgetError: none fits.
    """
    own = [row for row in rows if not row["variant"]]
    fitting = [row for row in own if row["size"] <= budget.room(cache)]
    if not fitting:
        least = min(own, key=lambda row: row["size"])
        raise BudgetError(
            f"no type fits quantize.budget, {budget.describe(cache)}: {least['type']}, the smallest that was measured, "
            f"has {least['size'] / GIB:.3f} GiB; {budget.remedy}"
        )
    return min(fitting, key=lambda row: (row["mean_kld"], row["size"]))
