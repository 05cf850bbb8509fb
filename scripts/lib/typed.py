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
        value: mappings for dataclasses, with a key for every field without a default; others are ignored.
    """
    options = [option for option in get_args(kind) if option is not types.NoneType]
    if get_origin(kind) in (types.UnionType, typing.Union):
        return None if value is None else build(options[0], value)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        keys = {field.name: setting_of(field) for field in dataclasses.fields(kind)}
        given = (field for field in dataclasses.fields(kind) if keys[field.name] in value or _is_required(field))
        return kind(**{field.name: build(hints[field.name], value[keys[field.name]]) for field in given})
    if get_origin(kind) is tuple:
        return tuple(value)
    if get_origin(kind) is Mapping:
        return types.MappingProxyType({key: build(options[1], entry) for key, entry in value.items()})
    return value


def setting_of(field: dataclasses.Field[Any]) -> str:
    """The key that a field is read from: its name, or what its metadata says where Python keeps that for itself."""
    return field.metadata.get("key", field.name)


def plain(value: Any) -> Any:
    """The other way round: dataclasses and mappings as dicts, tuples as lists."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
