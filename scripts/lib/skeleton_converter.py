"""
llama.cpp's converter, run on a checkpoint whose matrices are holes: what it calls each, and how it orders their rows.

    python skeleton_converter.py CONVERT_HF_TO_GGUF.PY < WORDS

Its imports take longer than all else, so it is started before its checkpoint is there, and told on standard input, as
a JSON list: the file to write the orders of rows into, and the converter's own arguments.

Matrices stay holes in the file that it writes, of the size that they would have. Each goes through the architecture's
own `modify_tensors` twice: as the converter wants it, and as a matrix of which every value tells its row and column.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

# Columns of the matrix that shows where rows go: two, so that a change of their order is seen as well.
PROBE_COLUMNS = 2
# What this ends with if an architecture's matrices are not the rows of a checkpoint's in some order.
UNSTREAMED, REFUSAL = 65, "cannot be streamed"


class Hole:
    """Stands for a matrix of the converter's writer, and leaves out what it would write."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def tofile(self, file: Any) -> None:
        """Move to where the matrix would end; the file is as long from then on."""
        end = file.tell() + self.nbytes
        file.truncate(end)
        file.seek(end)


def row_orders(
    modify: Callable[[Any], Iterable[tuple[str, Any]]], shape: tuple[int, ...]
) -> dict[str, list[int] | None]:
    """
    What a conversion makes of a matrix, if that is the same rows in some order.

    Args:
        modify: `modify_tensors` of the architecture, for this matrix.
        shape: of the matrix.

    Returns:
        By the name of each result: for each of its rows the row of the matrix; None where the order is the same.

    Raises:
        ValueError: it makes something else of it.
    """
    import torch

    if len(shape) != 2:
        raise ValueError(f"has {len(shape)} dimensions")
    rows = shape[0]
    probe = torch.arange(rows, dtype=torch.float32)[:, None] + rows * torch.arange(PROBE_COLUMNS)
    orders: dict[str, list[int] | None] = {}
    for name, found in modify(probe):
        order = found[:, 0].long() if tuple(found.shape) == tuple(probe.shape) else torch.zeros(1)
        if not torch.equal(order.sort().values, torch.arange(rows)) or not torch.equal(found, probe[order]):
            raise ValueError("is made of more than the rows of one matrix")
        orders[name] = None if torch.equal(order, torch.arange(rows)) else order.tolist()
    return orders


def leave_holes(writer: Any, rows: dict[str, Any]) -> None:
    """Let the writer class of llama.cpp's gguf package leave out the tensors that `rows` names."""
    add_tensor = writer.add_tensor

    def add_hole(self: Any, name: str, *arguments: Any, **options: Any) -> None:
        add_tensor(self, name, *arguments, **options)
        if name in rows:
            added = self.tensors[-1][name]
            added.tensor = Hole(added.nbytes)

    writer.add_tensor = add_hole


def note_rows(model: Any, rows: dict[str, Any]) -> None:
    """Let the converter's class of all models note into `rows` what becomes of each matrix."""
    prepare = model.prepare_tensors

    def prepare_noted(self: Any) -> None:
        modify = self.modify_tensors

        def modify_noted(tensor: Any, name: str, block: int | None) -> list[tuple[str, Any]]:
            made = list(modify(tensor, name, block))
            if len(tensor.shape) > 1 and made:
                try:
                    if any(tuple(each.shape) != tuple(tensor.shape) for _, each in made):
                        raise ValueError("is put together with others")
                    orders = row_orders(lambda probe: modify(probe, name, block), tuple(tensor.shape))
                except Exception as error:  # an architecture's own code may raise anything of a probe
                    print(f"{type(self).__name__} {REFUSAL}: {name} {error or type(error).__name__}", file=sys.stderr)
                    sys.exit(UNSTREAMED)
                rows.update((new, {"source": name, "order": order}) for new, order in orders.items())
            return made

        self.modify_tensors = modify_noted
        prepare(self)

    model.prepare_tensors = prepare_noted


def main() -> None:
    """Run the converter as if it were the program."""
    script = Path(sys.argv[1])
    # Where the converter looks for its own modules, and for the gguf package of its own version.
    sys.path[:1] = [str(script.parent), str(script.parent / "gguf-py")]
    import gguf
    from transformers import AutoTokenizer  # noqa: F401 - the converter imports it when it has read the weights

    models = import_module("conversion.base").ModelBase

    target, *arguments = json.load(sys.stdin)
    sys.argv = [str(script), *arguments]
    rows: dict[str, Any] = {}
    leave_holes(gguf.GGUFWriter, rows)
    note_rows(models, rows)
    runpy.run_path(str(script), run_name="__main__")
    Path(target).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
