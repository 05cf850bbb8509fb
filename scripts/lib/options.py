"""
Settings of the config as options of a script, and back.

The schema is the one place where a setting's name, type, default and description stand: a script's
options are made from it, and a rule writes a resolved section as exactly those options.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from lib.config import definition, fill_by_method

TYPES = {"integer": int, "number": float, "string": str}


def add_settings(parser: argparse.ArgumentParser, section: str, *, without: tuple[str, ...] = ()) -> None:
    """Add an option for each setting of a section of the schema, as in "train"; nested ones get a group."""
    for name, rule in definition(section)["properties"].items():
        if name in without:
            continue
        if "$ref" in rule:
            nested = rule["$ref"].rpartition("/")[2]
            add_settings(parser.add_argument_group(nested, definition(nested)["description"]), nested)
        else:
            _add_setting(parser, name, rule, required=name in definition(section).get("required", ()))


def _add_setting(parser: Any, name: str, rule: dict[str, Any], *, required: bool) -> None:
    kind = rule.get("type", "string")
    kind = next(each for each in kind if each != "null") if isinstance(kind, list) else kind
    shared = {"default": rule.get("default"), "help": rule["description"].replace("%", "%%"), "required": required}
    if kind == "boolean":
        parser.add_argument(option_name(name), action=argparse.BooleanOptionalAction, **shared)
    elif kind == "array":
        parser.add_argument(option_name(name), nargs="*", metavar="NAME", **shared)
    elif "enum" in rule:
        parser.add_argument(option_name(name), choices=rule["enum"], **shared)
    else:
        parser.add_argument(option_name(name), type=TYPES[kind], metavar=kind.upper(), **shared)


def settings_from(arguments: argparse.Namespace, section: str) -> dict[str, Any]:
    """The section that a script's options say, nested and with every key, as the config has it."""
    settings: dict[str, Any] = {}
    for name, rule in definition(section)["properties"].items():
        if "$ref" in rule:
            settings[name] = settings_from(arguments, rule["$ref"].rpartition("/")[2])
        else:
            settings[name] = getattr(arguments, name, None)
    fill_by_method(section, settings)
    return settings


def as_options(section: Any) -> str:
    """A resolved section of the config as command-line options, quoted for the shell."""
    return shlex.join(_words(dataclasses.asdict(section)))


def _words(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _words(value)
        elif isinstance(value, bool):
            yield option_name(name if value else f"no_{name}")
        elif isinstance(value, tuple | list):
            yield from (option_name(name), *map(str, value)) if value else ()
        elif value is not None:
            yield f"{option_name(name)}={value}"  # one word, so that the value may begin with a dash


def option_name(setting: str) -> str:
    """The option of a setting, as in "lora_alpha" → "--lora-alpha"."""
    return "--" + setting.replace("_", "-")
