"""`--set a.b=c`: single settings of a model, named by their place in the schema."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lib.cli import UsageError
from lib.config import as_yaml, follow_reference, mistakes_in, put_over, schema, suggest


def parse_settings(words: Sequence[str], *, section: str) -> dict[str, Any]:
    """
    Take words like "ollama.parameters.temperature=0.2" apart; of one setting said twice the later counts.

    Args:
        words: dotted keys of the schema, each with its value as YAML.
        section: the definition that the keys begin in, as in "model".

    Returns:
        What they say, nested as in config.yaml.

    Raises:
        UsageError: a line per word that names no setting, or a value that the setting does not take.
    """
    settings: dict[str, Any] = {}
    problems: list[str] = []
    for word in words:
        path, equals, text = word.partition("=")
        try:
            keys, rules = place_of(path, section=section)
        except UsageError as error:
            problems.append(f"--set {path}: {error}")
            continue
        value = as_yaml(text)
        mistakes = (
            mistakes_in(value, {**rules, "$defs": schema()["$defs"]}) if equals else ["say what, as in key=value"]
        )
        problems += [f"--set {path}: {mistake}" for mistake in mistakes]
        for key in reversed(keys):
            value = {key: value}
        settings = put_over(settings, value)
    if problems:
        raise UsageError("\n  ".join(problems))
    return settings


def place_of(path: str, *, section: str) -> tuple[list[str], dict[str, Any]]:
    """
    The keys of a dotted path from a definition on, and what the schema says of the last.

    What stands behind a mapping with keys of the user's own is one key, dots and all.

    Raises:
        UsageError: there is no such setting; the nearest one is named.
    """
    rules, keys, rest = follow_reference({"$ref": f"#/$defs/{section}"}), [], path
    while rest or not keys:
        known = rules.get("properties", {})
        if not known and isinstance(rules.get("additionalProperties"), dict):
            return [*keys, rest], follow_reference(rules["additionalProperties"])
        key, _, rest = rest.partition(".")
        if key not in known:
            raise UsageError(f"unknown key {key!r}{_nearest(path, key, list(known), section=section)}")
        keys.append(key)
        rules = follow_reference(known[key])
    return keys, rules


def setting_paths(section: str) -> Iterator[str]:
    """The dotted path of every setting from a definition on."""
    for key, rules in follow_reference({"$ref": f"#/$defs/{section}"}).get("properties", {}).items():
        yield from _paths(key, rules)


def _paths(path: str, rules: dict[str, Any]) -> Iterator[str]:
    yield path
    for key, nested in follow_reference(rules).get("properties", {}).items():
        yield from _paths(f"{path}.{key}", nested)


def _nearest(path: str, key: str, known: list[str], *, section: str) -> str:
    """The end of the error: the setting of that name elsewhere, if there is just one, else what is spelt alike here."""
    last = path.rpartition(".")[2]
    elsewhere = [each for each in setting_paths(section) if each.rpartition(".")[2] == last]
    return f"; did you mean {elsewhere[0]!r}?" if len(elsewhere) == 1 else suggest(key, sorted(known))
