"""Turning plain mappings into frozen dataclasses by their type hints."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints


def build(kind: Any, value: Any) -> Any:
    """
    Make an object of `kind` from values read from YAML or the command line.

    Args:
        kind: a dataclass, a tuple, a mapping, an optional of these, or a plain type.
        value: mappings for dataclasses, with a key for every field; others are ignored.
    """
    options = [option for option in get_args(kind) if option is not types.NoneType]
    if get_origin(kind) in (types.UnionType, typing.Union):
        return None if value is None else build(options[0], value)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: build(hints[field.name], value[field.name]) for field in dataclasses.fields(kind)})
    if get_origin(kind) is tuple:
        return tuple(value)
    if get_origin(kind) is Mapping:
        return types.MappingProxyType({key: build(options[1], entry) for key, entry in value.items()})
    return value
