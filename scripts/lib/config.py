"""Checking config.yaml against its schema: every mistake at once, each with its remedy."""

from __future__ import annotations

import copy
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from lib.errors import ModelmillError

# YAML 1.1 takes a number with an exponent for text, unless it has a point and the exponent a sign.
EXPONENT = re.compile(r"[+-]?[0-9.]+[eE][+-]?[0-9]+")
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


def read_config(paths: Sequence[Path]) -> dict[str, Any]:
    """
    What files of YAML say, each put over the one before; not checked yet.

    Raises:
        ConfigError: no file, or no YAML.
    """
    config: dict[str, Any] = {}
    for path in paths:
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path}: expected keys and values, found {found!r:.60}")
        config = put_over(config, found)
    return config


def check_config(config: dict[str, Any]) -> None:
    """
    Compare the config with the schema.

    Raises:
        ConfigError: one line per mistake, with the key's path, what was found and what is allowed.
    """
    if lines := mistakes_in(config, schema()):
        raise config_error(lines)


def mistakes_in(value: Any, rules: dict[str, Any]) -> list[str]:
    """How a value differs from a part of the schema, one line per mistake; nothing where it is as allowed."""
    errors = jsonschema.Draft202012Validator(rules).iter_errors(value)
    lines = [line for error in sorted(errors, key=lambda e: [str(p) for p in e.path]) for line in _explain(error)]
    for where, leaf in _leaves(value):
        if _is_endless(leaf):
            lines.append(f"{where}: {leaf} is no finite number".removeprefix(": "))
    return list(dict.fromkeys(lines))


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
    """Set the defaults that depend on `method`, from the section's table in the schema, where nothing is set."""
    for key, value in definition(section).get("x-defaults-by-method", {}).get(settings.get("method"), {}).items():
        if settings.get(key) is None:
            settings[key] = value


def _fill(value: Any, rules: dict[str, Any]) -> None:
    rules = follow_reference(rules)
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


def _as_declared(value: Any, rules: dict[str, Any]) -> Any:
    """16.0 is a whole number to the schema, and 3 a number: one setting has one form."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(value) if "integer" in rules["type"] else float(value)


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from _leaves(entry, f"{where}.{key}" if where else str(key))
    if not isinstance(value, dict | list):
        yield where, value


def _is_endless(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def follow_reference(rules: dict[str, Any]) -> dict[str, Any]:
    """A part of the schema; where it only names a definition, that one."""
    reference = rules.get("$ref")
    return definition(reference.removeprefix("#/$defs/")) if reference else rules


def _explain(error: jsonschema.ValidationError) -> Iterator[str]:
    where = ".".join(str(part) for part in error.absolute_path)
    prefix = f"{where}: " if where else ""
    if error.validator == "additionalProperties":
        known = sorted(error.schema.get("properties", {}))
        for key in sorted(map(str, error.instance.keys() - set(known))):
            yield f"{prefix}unknown key {key!r}{suggest(key, known)}"
    elif error.validator == "required":
        yield from (f"{prefix}missing key {key!r}" for key in error.validator_value if key not in error.instance)
    elif error.validator == "dependentRequired":
        yield f"{prefix}{error.message}: they belong together"
    elif error.validator == "oneOf":
        alternatives = [" with ".join(option["required"]) for option in error.validator_value]
        yield f"{prefix}give exactly one of: {', '.join(alternatives)}"
    elif error.validator in ("minProperties", "maxProperties"):
        one_of = error.schema.get("properties")
        yield f"{prefix}give exactly one of: {', '.join(one_of)}" if one_of else f"{prefix}give at least one entry"
    elif error.validator == "pattern":
        yield f"{prefix}{error.instance!r} is not of the form {error.validator_value}"
    elif error.validator == "type":
        wanted = error.validator_value
        wanted = wanted if isinstance(wanted, str) else " or ".join(wanted)
        number = isinstance(error.instance, str) and EXPONENT.fullmatch(error.instance)
        hint = "; YAML reads an exponent only with a point and a sign, as in 1.0e-4" if number else ""
        hint = f"; a list is [{error.instance}]" if wanted == "array" and isinstance(error.instance, str) else hint
        yield f"{prefix}expected {wanted}, found {_name_type(error.instance)} {error.instance!r}{hint}"
    elif error.validator == "enum":
        allowed = [str(option) for option in error.validator_value]
        yield f"{prefix}{error.instance!r} is none of {', '.join(allowed)}{suggest(str(error.instance), allowed)}"
    elif error.validator == "const":
        yield f"{prefix}has to be {json.dumps(error.validator_value)}, found {json.dumps(error.instance)}"
    else:
        yield f"{prefix}{error.message}"


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
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "list", dict: "mapping"}
    return names.get(type(value), "null")
