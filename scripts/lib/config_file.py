"""
A config file as its text: whether it can be read at all, and keys that stand in it twice.

Snakemake reads the file as well, but of one that is no YAML it tells neither name nor line, and of two equal keys YAML
keeps the last without a word, so that a model would silently take another's place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lib.config import put_over
from lib.errors import ModelmillError
from lib.spec import Project, resolve_project

# libyaml, where PyYAML was built with it, is ten times faster, and every plan waits for this.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MERGE = "tag:yaml.org,2002:merge"


class ConfigFileError(ModelmillError):
    """There is no config that could be read."""


def read_project(paths: Sequence[Path], changes: Mapping[str, Any]) -> Project:
    """
    The resolved config of files, each over the one before, and of changes over them.

    Raises:
        ConfigFileError: no file, or no YAML.
        ConfigError: listing every mistake.
    """
    config = put_over(read_config(paths), changes)
    return resolve_project(config, known=[line for path in paths for line in repeated_keys(path)])


def read_config(paths: Sequence[Path]) -> dict[str, Any]:
    """What files say, each put over the one before; not checked yet."""
    config: dict[str, Any] = {}
    for path in paths:
        config = put_over(config, read_config_file(path))
    return config


def read_config_file(path: Path) -> dict[str, Any]:
    """
    What a config file says, in YAML or JSON.

    Raises:
        ConfigFileError: no file, or no keys with values in it; with the place where that can be told.
    """
    text = _read_text(path)
    try:
        found = json.loads(text)
    except RecursionError:
        raise ConfigFileError(f"{path}: is nested too deeply") from None
    except ValueError:
        found = _parse_yaml(path, text)
    if found is None:
        raise ConfigFileError(f"{path}: is empty; name at least one model under 'models'")
    if not isinstance(found, dict):
        raise ConfigFileError(f"{path}: expected keys with values, as in 'models:', found {found!r:.60}")
    return found


def repeated_keys(path: Path) -> list[str]:
    """The keys that stand twice in a mapping of a file that can be read, a line each."""
    root = yaml.compose(_read_text(path), Loader=LOADER)
    return [f"{path}: {line}" for line in _repeated(root, "")] if root else []


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigFileError(f"{path}: there is no such file; name another with --configfile") from None
    except UnicodeDecodeError as error:
        raise ConfigFileError(
            f"{path}: is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigFileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _parse_yaml(path: Path, text: str) -> Any:
    try:
        root = yaml.compose(text, Loader=LOADER)
        if root is not None and (line := _endless(root, ())):
            raise ConfigFileError(f"{path}, line {line}: what stands here contains itself; take the alias (*) out")
        return yaml.load(text, Loader=LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigFileError(f"{path}{place}: is no YAML: {error.problem or error.context}{_remedy(text)}") from None
    except yaml.YAMLError as error:
        raise ConfigFileError(f"{path}: is no YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigFileError(f"{path}: is nested too deeply") from None
    except ValueError as error:  # of Python's, about a date that is none, or a number of thousands of digits
        found = str(error).partition(";")[0]
        raise ConfigFileError(f"{path}: holds a value that cannot be: {found}; write it in quotes") from None


def _remedy(text: str) -> str:
    indented = any("\t" in line[: len(line) - len(line.lstrip())] for line in text.splitlines())
    return "; indent with spaces, not with tabs" if indented else ""


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        yield from (child for pair in node.value for child in pair)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _endless(node: yaml.Node, above: tuple[int, ...]) -> int:
    """The line of a node that is among its own children; 0 where there is none."""
    if id(node) in above:
        return node.start_mark.line + 1
    return next((line for child in _children(node) if (line := _endless(child, (*above, id(node))))), 0)


def _repeated(node: yaml.Node, where: str) -> Iterator[str]:
    if isinstance(node, yaml.MappingNode):
        first: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            place = f"{where}.{name}" if where else name
            if (earlier := first.get((key.tag, name))) and key.tag != MERGE:
                yield f"{place}: stands twice, in line {earlier} and in line {line}; take one out, or rename it"
            first[key.tag, name] = line
            yield from _repeated(value, place)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _repeated(value, f"{where}.{number}")
