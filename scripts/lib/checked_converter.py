"""
llama.cpp's converter, run so that every tensor is checked when it is written: no value that is not finite.

    python checked_converter.py CONVERT_HF_TO_GGUF.PY ARGUMENT…

The converter casts a base's bfloat16 to float16 without a look at its range. What was just written is read back
from the page cache, block by block, so that no second pass over the file is needed.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np

BLOCK_BYTES = 1 << 22
# How a type's bits are read, its bits without the sign, and the least of these that is no finite number (IEEE 754).
NOT_FINITE = {
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
}


class CheckedTensor:
    """Stands for a tensor of the converter's writer, and checks what it writes."""

    def __init__(self, tensor: Any, *, name: str, kind: str) -> None:
        self._tensor, self._name, self._kind = tensor, name, kind
        self.nbytes = tensor.nbytes

    def tofile(self, file: Any) -> None:
        """
        Write the tensor to a file that is open for writing, at its position.

        Raises:
            ValueError: it holds a NaN or an infinity.
        """
        file.flush()
        start = file.tell()
        self._tensor.tofile(file)
        file.flush()
        if self._kind in NOT_FINITE and not is_finite(Path(file.name), start, self.nbytes, kind=self._kind):
            raise ValueError(
                f"{self._name} holds values that are not finite in {self._kind}: the checkpoint is damaged, or its "
                "values are beyond the range of 16-bit floats; bf16 has the range of float32"
            )


def is_finite(path: Path, start: int, size: int, *, kind: str) -> bool:
    """
    Whether `size` bytes of a file from `start` on hold finite numbers alone.

    Args:
        kind: type of the numbers, a key of NOT_FINITE.
    """
    width, unsigned, least = NOT_FINITE[kind]
    with path.open("rb", buffering=0) as file:
        for offset in range(start, start + size, BLOCK_BYTES):
            block = np.frombuffer(os.pread(file.fileno(), min(BLOCK_BYTES, start + size - offset), offset), dtype=width)
            if (block & unsigned).max(initial=0) >= least:
                return False
    return True


def check_while_writing(writer: Any) -> None:
    """Let the writer class of llama.cpp's gguf package check the tensors that are added to it."""
    add_tensor = writer.add_tensor

    def add_checked(self: Any, name: str, *arguments: Any, **options: Any) -> None:
        add_tensor(self, name, *arguments, **options)
        added = self.tensors[-1][name]
        added.tensor = CheckedTensor(added.tensor, name=name, kind=added.dtype.name)

    writer.add_tensor = add_checked


def main() -> None:
    """Run the converter as if it were the program."""
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    # Where the converter looks for its own modules, and for the gguf package of its own version.
    sys.path[:1] = [str(script.parent), str(script.parent / "gguf-py")]
    import gguf

    check_while_writing(gguf.GGUFWriter)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
