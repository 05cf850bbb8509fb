"""
llama.cpp's converter, run so that what it writes is checked and hashed meanwhile: no value that is not finite.

    python checked_converter.py DIGEST_FILE CONVERT_HF_TO_GGUF.PY ARGUMENT…

The converter casts a base's bfloat16 to float16 without a look at its range. A thread reads each tensor back from
the page cache once it is written, so that no second pass over the file is needed, neither for that nor for its digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import numpy as np

BLOCK_BYTES = 1 << 22
# Tensors that may wait to be looked at, so that they are still in the page cache.
MOST_WAITING = 2
# How a type's bits are read, its bits without the sign, and the least of these that is no finite number (IEEE 754).
NOT_FINITE = {
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
}


class Checker:
    """Reads a file that grows at its end alone, in a thread of its own; a second one hashes, a block behind."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._begin = b""  # what stands before the first tensor
        self._read = 0
        self._digest = hashlib.sha256()
        self._hashing = ThreadPoolExecutor(max_workers=1)
        self._hashed: Future[None] | None = None
        self._problem: str | None = None
        self._waiting: Queue[tuple[Path, str, str, int, int] | None] = Queue(MOST_WAITING)
        self._thread = Thread(target=self._work, daemon=True)

    def look_at(self, path: Path, start: int, stop: int, *, name: str, kind: str) -> None:
        """
        Check a tensor that was just written to the end of the file.

        Raises:
            ValueError: one before it holds a NaN or an infinity.
        """
        if self._path is None:
            self._path, self._begin = path, _read(path, 0, start)
            self._thread.start()
        self._waiting.put((path, name, kind, start, stop))
        self._raise()

    def finish(self, digest: Path) -> None:
        """
        Wait for the rest, and write size and SHA-256 of the file to `digest`.

        Raises:
            ValueError: a tensor holds a NaN or an infinity, or what stands before the tensors was changed since.
        """
        if self._path is None:
            return
        self._waiting.put(None)
        self._thread.join()
        self._raise()
        size = self._path.stat().st_size
        for block in _blocks(self._path, self._read, size):
            self._hash(block)
        self._hashing.shutdown()
        if _read(self._path, 0, len(self._begin)) != self._begin:
            raise ValueError(f"{self._path} was changed at its beginning after its tensors were written")
        digest.write_text(json.dumps({"size": size, "sha256": self._digest.hexdigest()}))

    def _raise(self) -> None:
        if self._problem:
            raise ValueError(self._problem)

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            if self._problem is None:
                try:
                    self._problem = self._check(*job)
                except OSError as error:
                    self._problem = f"{job[0]} cannot be read back: {error.strerror}"
                except RuntimeError as error:  # Python ends, after an error elsewhere, and takes no more work
                    self._problem = str(error)

    def _check(self, path: Path, name: str, kind: str, start: int, stop: int) -> str | None:
        for block in _blocks(path, self._read, start):
            self._hash(block)
        finite = True
        for block in _blocks(path, start, stop):
            self._hash(block)
            finite = finite and (kind not in NOT_FINITE or is_finite(block, kind=kind))
        self._read = stop
        if finite:
            return None
        return (
            f"{name} holds values that are not finite in {kind}: the checkpoint is damaged, or its "
            "values are beyond the range of 16-bit floats; bf16 has the range of float32"
        )

    def _hash(self, block: bytes) -> None:
        if self._hashed is not None:
            self._hashed.result()
        self._hashed = self._hashing.submit(self._digest.update, block)


class CheckedTensor:
    """Stands for a tensor of the converter's writer, and has what it writes checked."""

    def __init__(self, tensor: Any, checker: Checker, *, name: str, kind: str) -> None:
        self._tensor, self._checker, self._name, self._kind = tensor, checker, name, kind
        self.nbytes = tensor.nbytes

    def tofile(self, file: Any) -> None:
        """
        Write the tensor to a file that is open for writing, at its end.

        Raises:
            ValueError: an earlier one holds a NaN or an infinity.
        """
        file.flush()
        start = file.tell()
        self._tensor.tofile(file)
        file.flush()
        self._checker.look_at(Path(file.name), start, start + self.nbytes, name=self._name, kind=self._kind)


def is_finite(block: bytes, *, kind: str) -> bool:
    """
    Whether bytes hold finite numbers alone.

    Args:
        kind: type of the numbers, a key of NOT_FINITE.
    """
    width, unsigned, least = NOT_FINITE[kind]
    return bool((np.frombuffer(block, dtype=width) & unsigned).max(initial=0) < least)


def _blocks(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        for offset in range(start, stop, BLOCK_BYTES):
            yield os.pread(file.fileno(), min(BLOCK_BYTES, stop - offset), offset)


def _read(path: Path, start: int, stop: int) -> bytes:
    return b"".join(_blocks(path, start, stop))


def check_while_writing(writer: Any, checker: Checker) -> None:
    """Let the writer class of llama.cpp's gguf package have the tensors checked that are added to it."""
    add_tensor = writer.add_tensor

    def add_checked(self: Any, name: str, *arguments: Any, **options: Any) -> None:
        add_tensor(self, name, *arguments, **options)
        added = self.tensors[-1][name]
        added.tensor = CheckedTensor(added.tensor, checker, name=name, kind=added.dtype.name)

    writer.add_tensor = add_checked


def main() -> None:
    """Run the converter as if it were the program."""
    digest, script = Path(sys.argv[1]), Path(sys.argv[2])
    sys.argv = sys.argv[2:]
    # Where the converter looks for its own modules, and for the gguf package of its own version.
    sys.path[:1] = [str(script.parent), str(script.parent / "gguf-py")]
    import gguf

    checker = Checker()
    check_while_writing(gguf.GGUFWriter, checker)
    runpy.run_path(str(script), run_name="__main__")
    checker.finish(digest)


if __name__ == "__main__":
    main()
