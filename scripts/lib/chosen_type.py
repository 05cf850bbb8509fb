"""Which type `quantize.types: auto` stands for, as choose_type.py wrote it down."""

from __future__ import annotations

from pathlib import Path

from lib.errors import ModelmillError
from lib.jsonfile import read_json
from lib.quant_types import QUANTIZED_TYPES


class ChosenTypeError(ModelmillError):
    """No type is told."""


def read_chosen(path: Path) -> str:
    """
    The type that choose_type.py wrote down.

    Raises:
        ChosenTypeError: the file does not tell one.
    """
    try:
        quant = read_json(path)["type"]
    except (OSError, ValueError, TypeError, KeyError):
        quant = None
    if quant not in QUANTIZED_TYPES:
        raise ChosenTypeError(f"{path} tells no type; choose_type.py writes it")
    return str(quant)
