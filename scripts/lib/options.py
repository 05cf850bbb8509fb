"""
Settings of the config as options of a script, and back.

The schema is the one place where a setting's name, type, limits, default and description stand: a script's
options are made from it and held against it, and a rule writes a resolved section as exactly those options.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lib.config import definition, fill_by_method, mistakes_in, with_defaults

TYPES = {"integer": int, "number": float, "string": str}


class _WithinLimits(argparse.Action):
    """Take an option's whole value, if the schema allows it."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, rules: dict[str, Any], **shared: Any) -> None:
        super().__init__(option_strings, dest, **shared)
        self.rules = rules

    def __call__(self, _: Any, namespace: argparse.Namespace, value: Any, __: str | None = None) -> None:
        """
        Raises:
            argparse.ArgumentError: naming the option, what was found and what is allowed; the script ends with 2.
        """
        if mistakes := mistakes_in(value, self.rules):
            raise argparse.ArgumentError(self, "; ".join(mistakes))
        setattr(namespace, self.dest, with_defaults(value, self.rules))


class _Switch(argparse.BooleanOptionalAction):
    """Take --name or --no-name, if the schema allows it."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, rules: dict[str, Any], **shared: Any) -> None:
        super().__init__(option_strings, dest, **shared)
        self.rules = rules

    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        """
        Raises:
            argparse.ArgumentError: see _WithinLimits.
        """
        super().__call__(parser, namespace, value, option)
        if mistakes := mistakes_in(getattr(namespace, self.dest), self.rules):
            raise argparse.ArgumentError(self, "; ".join(mistakes))


def add_settings(parser: argparse.ArgumentParser, section: str, *, without: tuple[str, ...] = ()) -> None:
    """Add an option for each setting of a section of the schema, as in "train"; nested ones get a group."""
    for name, rule in definition(section)["properties"].items():
        if name in without:
            continue
        if "$ref" in rule:
            nested = rule["$ref"].rpartition("/")[2]
            add_settings(parser.add_argument_group(nested, definition(nested)["description"]), nested)
        else:
            option = rule.get("x-option", name)
            _add_setting(parser, option, rule, required=name in definition(section).get("required", ()))


def add_setting(parser: Any, section: str, name: str, *, required: bool = False) -> None:
    """Add an option for one setting of a section of the schema."""
    _add_setting(parser, name, definition(section)["properties"][name], required=required)


def _add_setting(parser: Any, name: str, rule: dict[str, Any], *, required: bool) -> None:
    if rule.get("type") == "object":
        add_json_setting(parser, name, rule)
        return
    kind = rule.get("type", "string")
    kind = next(each for each in kind if each != "null") if isinstance(kind, list) else kind
    shared = {"default": rule.get("default"), "help": rule["description"].replace("%", "%%"), "required": required}
    shared["rules"] = rule
    if kind == "boolean":
        parser.add_argument(option_name(name), action=_Switch, **shared)
        return
    shared["action"] = _WithinLimits
    if kind == "array":
        of = rule["items"]["type"]
        parser.add_argument(
            option_name(name), nargs="*", type=TYPES[of], metavar="NAME" if of == "string" else of.upper(), **shared
        )
    elif "enum" in rule:
        choices = [value for value in rule["enum"] if value is not None]
        parser.add_argument(option_name(name), choices=choices, **shared)
    else:
        parser.add_argument(option_name(name), type=TYPES[kind], metavar=kind.upper(), **shared)


def add_json_setting(parser: Any, name: str, rules: dict[str, Any]) -> None:
    """Add an option that takes a whole mapping of the schema as JSON."""
    parser.add_argument(
        option_name(name),
        action=_WithinLimits,
        rules=rules,
        type=_parse_json,
        metavar="JSON",
        default=rules["default"],
        help=rules["description"].replace("%", "%%"),
    )


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is no valid JSON: {error}") from error


def json_mapping(text: str) -> dict[str, Any]:
    """A mapping of any keys, as an option gives it."""
    value = _parse_json(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected an object, found {text[:60]}")
    return value


def settings_from(arguments: argparse.Namespace, section: str) -> dict[str, Any]:
    """The section that a script's options say, nested and with every key, as the config has it."""
    settings: dict[str, Any] = {}
    for name, rule in definition(section)["properties"].items():
        if "$ref" in rule:
            settings[name] = settings_from(arguments, rule["$ref"].rpartition("/")[2])
        else:
            settings[name] = getattr(arguments, rule.get("x-option", name), None)
    fill_by_method(section, settings)
    return settings


def as_options(section: Any) -> str:
    """A resolved section of the config as command-line options, quoted for the shell."""
    return shlex.join(option_words(section))


def option_words(section: Any) -> Iterator[str]:
    """A resolved section of the config as command-line options, word by word."""
    for field in dataclasses.fields(section):
        name, value = field.metadata.get("option", field.name), getattr(section, field.name)
        if not field.metadata.get("setting", True):
            continue
        if dataclasses.is_dataclass(value):
            yield from option_words(value)
        elif isinstance(value, Mapping):
            # Sorted, so that another order is no other setting, unless the order says something.
            in_order = field.metadata.get("ordered", False)
            yield f"{option_name(name)}={json.dumps(dict(value), sort_keys=not in_order)}"
        elif isinstance(value, bool):
            yield option_name(name if value else f"no_{name}")
        elif isinstance(value, tuple | list):
            yield from (option_name(name), *map(str, value)) if value else ()
        elif value is not None:
            yield f"{option_name(name)}={value}"  # one word, so that the value may begin with a dash


def option_name(setting: str) -> str:
    """The option of a setting, as in "lora_alpha" → "--lora-alpha"."""
    return "--" + setting.replace("_", "-")
