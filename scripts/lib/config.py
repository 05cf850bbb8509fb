"""Checking config.yaml against its schema: every mistake at once, each with its remedy."""

from __future__ import annotations

import copy
import datetime
import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from lib.errors import ModelmillError

# YAML 1.1 takes a number with an exponent for text, unless it has a point and the exponent a sign.
EXPONENT = re.compile(r"[+-]?[0-9.]+[eE][+-]?[0-9]+")
LARGEST = 1 << 63  # bytes, weights or steps: nothing that is meant is larger
NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "list", dict: "mapping"}
NAMES |= {type(None): "null", datetime.date: "date", datetime.datetime: "time"}
SCHEMA_NAMES = {"object": "mapping", "array": "list"}
SWITCHES = "YAML reads on, off, yes and no as true and false"
SCHEMA_PATH = Path(__file__).resolve().parents[2] / "schemas" / "config.schema.yaml"


class ConfigError(ModelmillError):
    """config.yaml says something that cannot be built."""


@cache
def schema() -> dict[str, Any]:
    """The schema of config.yaml."""
    # libyaml, where PyYAML was built with it, is ten times faster, and every plan waits for this.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(SCHEMA_PATH.read_text(encoding="utf-8"), Loader=loader)


def definition(name: str) -> dict[str, Any]:
    """One of the schema's definitions, as in "train"."""
    return schema()["$defs"][name]


Place = tuple[str | int, ...]  # keys and numbers of entries, from the top


@dataclass(frozen=True)
class Mistake:
    """A part of a config that the schema does not allow, and what is said about it."""

    path: Place
    text: str

    def __str__(self) -> str:
        place = ".".join(map(str, self.path))
        return f"{place}: {self.text}" if place else self.text


def as_plain(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Mistake]]:
    """
    A config of plain mappings and lists, since Snakemake hands over types of its own.

    Returns:
        The config with texts as keys, and the keys that YAML read as something else: how they were written cannot be
        seen any more, and files would be called after them.
    """
    mistakes: list[Mistake] = []
    plain: dict[str, Any] = _plain(config, (), mistakes)
    return plain, mistakes


def _plain(value: Any, path: Place, mistakes: list[Mistake]) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(entry, (*path, number), mistakes) for number, entry in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    for key in value:
        # Devices of max_memory are numbers to everybody.
        if not isinstance(key, str) and not (type(key) is int and path[-1:] == ("max_memory",)):
            why = f" ({SWITCHES})" if isinstance(key, bool) else ""
            mistakes.append(Mistake(path, f"the key {_shown(key)} is no text{why}; write it in quotes"))
    named = {key if isinstance(key, str) else str(key).lower(): entry for key, entry in value.items()}
    return {key: _plain(entry, (*path, key), mistakes) for key, entry in named.items()}


def mistakes_in(value: Any, rules: dict[str, Any]) -> list[str]:
    """How a value differs from a part of the schema, one line per mistake; nothing where it is as allowed."""
    return list(dict.fromkeys(map(str, find_mistakes(value, rules))))


def find_mistakes(value: Any, rules: dict[str, Any]) -> list[Mistake]:
    """As `mistakes_in`, with their places."""
    errors = jsonschema.Draft202012Validator(rules).iter_errors(value)
    found = [
        Mistake(tuple(error.absolute_path), text)
        for error in sorted(errors, key=lambda e: [str(part) for part in e.path])
        for text in _explain(error)
    ]
    # Of what family a model is decides which keys it has: where that is not known, nothing else is told of it.
    unknown = {mistake.path[:2] for mistake in found if _is_kind(mistake.path)}
    found = [mistake for mistake in found if mistake.path[:2] not in unknown or _is_kind(mistake.path)]
    return found + [
        Mistake(path, problem) for path, leaf in _leaves(value) if (problem := _size_problem(leaf)) is not None
    ]


def _is_kind(path: Place) -> bool:
    return path[:1] == ("models",) and path[2:] == ("kind",)


def without_mistakes(config: dict[str, Any], mistakes: list[Mistake]) -> tuple[dict[str, Any], set[Place]]:
    """
    A copy with defaults, without the sections that hold a mistake, so that what the others say is checked as well.

    Returns:
        The copy, and the places of these sections: of a model's, of the top level, or of what holds an unknown key.
    """
    broken = {mistake.path[: 3 if mistake.path[:1] == ("models",) else 1] for mistake in mistakes}
    sound = copy.deepcopy(config)
    models = sound.get("models")
    for path in filter(_is_kind, list(broken)):  # no section of such a model can be understood
        family = follow_reference(schema()["properties"]["models"]["additionalProperties"]["else"])
        broken |= {(*path[:2], key) for key in [*family["properties"], *models[path[1]]]}
    sound["models"] = (
        {name: model for name, model in models.items() if isinstance(model, dict)} if isinstance(models, dict) else {}
    )
    _take_out(sound, broken)
    filled = with_defaults(sound)
    _take_out(filled, broken)
    return filled, broken


def _take_out(config: dict[str, Any], sections: Iterable[Place]) -> None:
    """Remove sections of models and of the top level; whole models stay."""
    for path in sections:
        if len(path) == 3:
            config["models"].get(path[1], {}).pop(path[2], None)
        elif len(path) == 1 and path != ("models",):
            config.pop(path[0], None)


def config_error(lines: list[str]) -> ConfigError:
    """The error for a list of mistakes."""
    return ConfigError("\n".join(["config.yaml:", *(f"  {line}" for line in lines)]))


def with_defaults(value: Any, rules: dict[str, Any] | None = None) -> Any:
    """
    A copy in which every key is present, absent ones with the schema's default, and numbers are as declared.

    Args:
        value: a checked config, or a checked value for the part of the schema that `rules` are.
    """
    filled = copy.deepcopy(value)
    _fill(filled, schema() if rules is None else rules)
    return filled


def fill_by_method(section: str, settings: dict[str, Any]) -> None:
    """Set the defaults that depend on `method` or `device`, from the section's tables in the schema, if nothing is."""
    for by in ("method", "device"):
        for key, value in definition(section).get(f"x-defaults-by-{by}", {}).get(settings.get(by), {}).items():
            if settings.get(key) is None:
                settings[key] = value


def _fill(value: Any, rules: dict[str, Any]) -> None:
    rules = follow_reference(_chosen(rules, value))
    if not isinstance(value, dict):
        return
    for key, rule in rules.get("properties", {}).items():
        resolved = follow_reference(rule)
        if key not in value and "default" in resolved:
            value[key] = copy.deepcopy(resolved["default"])
        if key in value:
            value[key] = _as_declared(value[key], resolved)
            _fill(value[key], resolved)
    if isinstance(rules.get("additionalProperties"), dict):
        for entry in value.values():
            _fill(entry, rules["additionalProperties"])


def _chosen(rules: dict[str, Any], value: Any) -> dict[str, Any]:
    """Where it depends on the value which part of the schema holds, that part."""
    if "if" not in rules:
        return rules
    return rules["then" if jsonschema.Draft202012Validator(rules["if"]).is_valid(value) else "else"]


def _as_declared(value: Any, rules: dict[str, Any]) -> Any:
    """16.0 is a whole number to the schema, and 3 a number: one setting has one form."""
    if isinstance(value, list) and "type" in rules.get("items", {}):
        return [_as_declared(entry, rules["items"]) for entry in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(value) if "integer" in rules["type"] else float(value)


def _leaves(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from _leaves(entry, (*path, key))
    if not isinstance(value, dict | list):
        yield path, value


def _size_problem(value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no finite number"
    if isinstance(value, int | float) and abs(value) >= LARGEST:
        return f"{_shown(value)} is too large; give less than 2^63"
    return None


def follow_reference(rules: dict[str, Any]) -> dict[str, Any]:
    """A part of the schema; where it only names a definition, that one."""
    reference = rules.get("$ref")
    return definition(reference.removeprefix("#/$defs/")) if reference else rules


def _explain(error: jsonschema.ValidationError) -> Iterator[str]:
    rule, found = error.validator_value, error.instance
    match error.validator:
        case "additionalProperties":
            known = sorted(error.schema.get("properties", {}))
            for key in sorted(map(str, found.keys() - set(known))):
                yield f"unknown key {_shown(key)}{_other_family(key, error.schema) or suggest(key, known)}"
        case "required":
            yield from (f"missing key {key!r}" for key in rule if key not in found)
        case "dependentRequired":
            yield f"{error.message}: they belong together"
        case "oneOf":
            yield f"give exactly one of: {', '.join(' with '.join(option['required']) for option in rule)}"
        case "minProperties" | "maxProperties":
            one_of = error.schema.get("properties")
            yield f"give exactly one of: {', '.join(one_of)}" if one_of else "give at least one entry"
        case "minItems" | "maxItems" if "x-form" in error.schema:
            yield f"{_shown(found)} is not of the form: {error.schema['x-form']}"
        case "minItems":
            yield "is an empty list; give at least one entry"
        case "minLength":
            yield "is an empty text; write something, or take it out"
        case "uniqueItems":
            twice = next(entry for number, entry in enumerate(found) if entry in found[:number])
            yield f"{_shown(twice)} stands there twice; take one out"
        case "pattern":
            yield f"{_shown(found)} is not of the form: {error.schema.get('x-form', rule)}"
        case "type":
            wanted = [rule] if isinstance(rule, str) else rule
            names = " or ".join(SCHEMA_NAMES.get(name, name) for name in wanted)
            yield f"expected {names}, found {_name_type(found)}{_hint(wanted, found)}"
        case "enum":
            allowed = ["null" if option is None else str(option) for option in rule]
            hint = f"; {SWITCHES}: write it in quotes" if isinstance(found, bool) else suggest(str(found), allowed)
            yield f"{_shown(found)} is none of {', '.join(allowed)}{hint}"
        case "const":
            shown = json.dumps(found) if isinstance(found, bool) else _shown(found)
            yield f"has to be {json.dumps(rule)}, found {shown}"
        case _:
            yield error.message


def _other_family(key: str, section: dict[str, Any]) -> str:
    """What is said of a key that the same section of the other family of models has."""
    if "x-other" not in section or key not in definition(section["x-other"])["properties"]:
        return ""
    if section["x-kind"] == "heatmap":
        return "; language models have it, and this is a heatmap model (kind): take it out"
    return "; heatmap models have it, and this is a language model: take it out, or set kind: heatmap"


def _hint(wanted: list[str], found: Any) -> str:
    """How to write what is wanted, where it can be guessed why something else was found."""
    if found is None:
        return "; give it a value, or take the key out"
    if "string" in wanted and not isinstance(found, dict | list):
        return f"; {SWITCHES}: write it in quotes" if isinstance(found, bool) else "; write it in quotes"
    if "array" in wanted and not isinstance(found, dict):
        return f"; write it as a list, [{_shown(found).strip(chr(39))}]"
    if "boolean" in wanted:
        return "; write true or false"
    if "object" in wanted:
        return "; keys with values belong there"
    if isinstance(found, str) and EXPONENT.fullmatch(found):
        return "; YAML reads an exponent only with a point and a sign, as in 1.0e-4"
    return "; write a number, without quotes or unit" if isinstance(found, str) else ""


def put_over(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config with changes in it; mappings are changed key by key, everything else is replaced."""
    changed = dict(config)
    for key, value in changes.items():
        old = changed.get(key)
        changed[key] = put_over(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return changed


def as_yaml(value: Any) -> Any:
    """What --config says, read as config.yaml is: Snakemake leaves "false", and numbers within lists, as texts."""
    if isinstance(value, Mapping):
        return {key: as_yaml(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [as_yaml(entry) for entry in value]
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def suggest(found: str, known: list[str]) -> str:
    """The end of an error about a misspelt word: the nearest known ones, or all of them when few."""
    near = difflib.get_close_matches(found.lower(), known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(known)}" if known and len(known) <= 16 else ""


def _name_type(value: Any) -> str:
    name = NAMES.get(type(value), type(value).__name__)
    return name if value is None else f"{name} {_shown(value)}"


def _shown(value: Any) -> str:
    shown = str(value) if isinstance(value, datetime.date) else repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}…"
