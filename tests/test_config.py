"""The schema of config.yaml itself, and what is said about a config that breaks it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from lib.config import as_yaml, fill_by_method, mistakes_in, put_over, schema, suggest, with_defaults

GOOD = """
models:
  m:
    base:
      hub: maker/model
      revision: main
      shape: {hidden_size: 64, num_hidden_layers: 2, intermediate_size: 96, num_attention_heads: 4,
              num_key_value_heads: 2, vocab_size: 320, tie_word_embeddings: false}
    adapter: {train: {data: talks.jsonl}}
    smoke: {questions: asked.jsonl}
"""


BY = ("method", "device")  # what the tables of defaults are by


def config(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """GOOD, with values set at dotted paths; `...` takes a key out."""
    value = yaml.safe_load(GOOD)
    for path, new in (changes or {}).items():
        *parents, last = path.split(".")
        place = value
        for key in parents:
            place = place.setdefault(key, {})
        if new is ...:
            del place[last]
        else:
            place[last] = new
    return value


def rules(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part of the schema that describes a value, by its path."""
    yield path, node
    for group in ("properties", "$defs"):
        for name, rule in node.get(group, {}).items():
            yield from rules(rule, f"{path}.{name}")
    for key in ("items", "additionalProperties", "then", "else"):
        if isinstance(node.get(key), dict):
            yield from rules(node[key], f"{path}[{key}]")


def referenced(rule: dict[str, Any]) -> dict[str, Any]:
    return schema()["$defs"][rule["$ref"].removeprefix("#/$defs/")] if "$ref" in rule else rule


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_every_key_is_described() -> None:
    named = [
        (f"{path}.{name}", rule) for path, node in rules(schema()) for name, rule in node.get("properties", {}).items()
    ]
    assert len(named) > 80
    assert [name for name, rule in named if not referenced(rule).get("description", "").strip()] == []


def test_every_object_refuses_unknown_keys_but_the_maps_by_name() -> None:
    objects = [(path, node) for path, node in rules(schema()) if "object" in node.get("type", ())]
    assert len(objects) > 10
    open_ones = [(path, node) for path, node in objects if node.get("additionalProperties") is not False]
    assert sorted({path for path, _ in open_ones}) == [
        ".heatmap_base.random",  # a config.json of transformers
        ".heatmap_base.shape",
        ".models",
        ".offload.max_memory",
        ".quantize.tensor_type",
    ]
    assert all("propertyNames" in node for _, node in open_ones)


def test_every_default_is_allowed() -> None:
    with_default = [(path, rule) for path, rule in rules(schema()) if "default" in rule]
    assert len(with_default) > 50
    for path, rule in with_default:
        checker = jsonschema.Draft202012Validator({**rule, "$defs": schema()["$defs"]})
        assert [error.message for error in checker.iter_errors(rule["default"])] == [], path


def test_every_pattern_is_given_in_words_and_ends_with_the_text() -> None:
    """A `$` lets a line break through, and few can read the rest."""
    places = [rule for _, node in rules(schema()) for rule in (node, node.get("propertyNames", {}))]
    patterns = [rule for rule in places if "pattern" in rule]
    assert len(patterns) >= 10
    for rule in patterns:
        assert rule["x-form"] and not rule["pattern"].endswith("$"), rule


def test_every_definition_is_used() -> None:
    used = {rule["$ref"].removeprefix("#/$defs/") for _, rule in rules(schema()) if "$ref" in rule}
    assert used == schema()["$defs"].keys()


def test_defaults_by_method_are_allowed_and_cover_every_method() -> None:
    tables = [(by, rule) for _, rule in rules(schema()) for by in BY if f"x-defaults-by-{by}" in rule]
    assert len(tables) == 3
    for by, section in tables:
        table, keys = section[f"x-defaults-by-{by}"], section["properties"]
        assert table.keys() == set(keys[by]["enum"]) - {"auto"}
        for settings in table.values():
            for key, value in settings.items():
                assert "default" not in keys[key], f"{key} has two defaults"
                jsonschema.Draft202012Validator(keys[key]).validate(value)


def test_a_key_without_default_is_required_or_optional_by_method() -> None:
    """Otherwise with_defaults would leave a key out that the typed objects need."""
    for path, node in rules(schema()):
        if path.endswith(("parameters", "heatmap_base.random", "heatmap_base.shape")) or path in ("", ".model"):
            continue
        by_method = {key for by in BY for table in node.get(f"x-defaults-by-{by}", {}).values() for key in table}
        for name, rule in node.get("properties", {}).items():
            settled = "default" in referenced(rule) or name in node.get("required", ()) or name in by_method
            assert settled, f"{path}.{name}"


def test_every_missing_key_is_listed_once() -> None:
    lines = mistakes_in(config({"models.m.base.shape": {"hidden_size": 64, "vocab_size": 320}}), schema())
    missing = schema()["$defs"]["shape"]["required"][1:]
    missing.remove("vocab_size")
    assert sorted(lines) == sorted(f"models.m.base.shape: missing key {key!r}" for key in missing)


def test_defaults_fill_what_is_absent_and_nothing_else() -> None:
    given = config({"models.m.adapter.train.lora.r": 4, "hardware.gpus": [24], "models.other": {"base": {"path": "x"}}})
    before = copy.deepcopy(given)
    filled = with_defaults(given)
    assert given == before
    lora = schema()["$defs"]["lora"]["properties"]
    expected = {key: rule["default"] for key, rule in lora.items()} | {"r": 4}
    assert filled["models"]["m"]["adapter"]["train"]["lora"] == expected
    assert filled["hardware"]["gpus"] == [24]
    assert filled["hardware"]["ram"] == schema()["properties"]["hardware"]["properties"]["ram"]["default"]
    assert filled["models"]["other"]["adapter"] is None
    assert filled["models"]["other"]["quantize"]["types"] == ["q4_k_m"]


def test_filled_defaults_are_no_shared_lists() -> None:
    first, second = with_defaults(config()), with_defaults(config())
    first["models"]["m"]["quantize"]["types"].append("f16")
    assert second["models"]["m"]["quantize"]["types"] == ["q4_k_m"]


@pytest.mark.parametrize("method", ["lora", "qlora", "int8"])
@pytest.mark.parametrize("written", [None, 5e-5])
def test_a_default_by_method_gives_way_to_what_is_written(method: str, written: float | None) -> None:
    settings = {"method": method, "learning_rate": written}
    fill_by_method("train", settings)
    table = schema()["$defs"]["train"]["x-defaults-by-method"]
    assert settings["learning_rate"] == (written or table[method]["learning_rate"])


@pytest.mark.parametrize(
    ("found", "known", "said"),
    [
        ("gpu", ["disk", "gpus", "ram"], "; did you mean 'gpus'?"),
        ("zzz", ["disk", "gpus", "ram"], "; known are disk, gpus, ram"),
        ("zzz", [f"key{i}" for i in range(17)], ""),
        ("zzz", [], ""),
    ],
)
def test_suggest(found: str, known: list[str], said: str) -> None:
    assert suggest(found, known) == said


def test_what_the_command_line_changes() -> None:
    """As Snakemake's --config gives it: "false", and numbers in lists, are texts."""
    told = {
        "keep_intermediates": "false",
        "hardware": {"gpus": ["24", "24"], "ram": 48},
        "models": {"m": {"a": "1: ["}},
    }
    typed = as_yaml(told)
    assert typed == {
        "keep_intermediates": False,
        "hardware": {"gpus": [24, 24], "ram": 48},
        "models": {"m": {"a": "1: ["}},
    }
    config = {"hardware": {"gpus": [], "disk": 9}, "models": {"m": 1, "n": {"b": 2}}}
    assert put_over(config, typed) == {
        "keep_intermediates": False,
        "hardware": {"gpus": [24, 24], "ram": 48, "disk": 9},
        "models": {"m": {"a": "1: ["}, "n": {"b": 2}},
    }
    assert config == {"hardware": {"gpus": [], "disk": 9}, "models": {"m": 1, "n": {"b": 2}}}
