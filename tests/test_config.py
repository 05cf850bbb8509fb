"""The schema of config.yaml itself, and what is said about a config that breaks it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

from lib.config import ConfigError, as_yaml, check_config, fill_by_method, put_over, schema, suggest, with_defaults

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


def problems(changes: dict[str, Any]) -> list[str]:
    """The lines that a changed config is refused with."""
    with pytest.raises(ConfigError) as refused:
        check_config(config(changes))
    title, *lines = str(refused.value).splitlines()
    assert title == "config.yaml:"
    return [line.strip() for line in lines]


def rules(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part of the schema that describes a value, by its path."""
    yield path, node
    for group in ("properties", "$defs"):
        for name, rule in node.get(group, {}).items():
            yield from rules(rule, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
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
    assert [path for path, _ in open_ones] == [".models", ".offload.max_memory", ".quantize.tensor_type"]
    assert all("propertyNames" in node for _, node in open_ones)


def test_every_default_is_allowed() -> None:
    with_default = [(path, rule) for path, rule in rules(schema()) if "default" in rule]
    assert len(with_default) > 50
    for path, rule in with_default:
        checker = jsonschema.Draft202012Validator({**rule, "$defs": schema()["$defs"]})
        assert [error.message for error in checker.iter_errors(rule["default"])] == [], path


def test_every_definition_is_used() -> None:
    used = {rule["$ref"].removeprefix("#/$defs/") for _, rule in rules(schema()) if "$ref" in rule}
    assert used == schema()["$defs"].keys()


def test_defaults_by_method_are_allowed_and_cover_every_method() -> None:
    tables = [rule for _, rule in rules(schema()) if "x-defaults-by-method" in rule]
    assert tables
    for section in tables:
        table, keys = section["x-defaults-by-method"], section["properties"]
        assert table.keys() == set(keys["method"]["enum"]) - {"auto"}
        for settings in table.values():
            for key, value in settings.items():
                assert "default" not in keys[key], f"{key} has two defaults"
                jsonschema.Draft202012Validator(keys[key]).validate(value)


def test_a_key_without_default_is_required_or_optional_by_method() -> None:
    """Otherwise with_defaults would leave a key out that the typed objects need."""
    for path, node in rules(schema()):
        if path.endswith("parameters") or path in ("", ".model"):
            continue
        by_method = {key for table in node.get("x-defaults-by-method", {}).values() for key in table}
        for name, rule in node.get("properties", {}).items():
            settled = "default" in referenced(rule) or name in node.get("required", ()) or name in by_method
            assert settled, f"{path}.{name}"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model", {}, "unknown key 'model'; did you mean 'models'?"),
        ("hardware.gpu", [24], "hardware: unknown key 'gpu'; did you mean 'gpus'?"),
        ("models.m.adaptor", {}, "models.m: unknown key 'adaptor'; did you mean 'adapter'?"),
        (
            "models.m.adapter.train.lora.rank",
            8,
            "models.m.adapter.train.lora: unknown key 'rank'; "
            "known are bias, lora_alpha, lora_dropout, r, target_modules, task_type, use_dora, use_rslora",
        ),
        ("models.m.base", ..., "models.m: missing key 'base'"),
        ("models.m.adapter.train.data", ..., "models.m.adapter.train: missing key 'data'"),
        ("models", ..., "missing key 'models'"),
        (
            "models.m.merge.dtype",
            "fp16",
            "models.m.merge.dtype: 'fp16' is none of float16, bfloat16, float32; did you mean",
        ),
        ("models.m.adapter.train.method", "dora", "'dora' is none of auto, lora, qlora, int8; did you mean 'lora'?"),
        ("models.m.adapter.train.dtype", "float32", "models.m.adapter.train: unknown key 'dtype'"),
        (
            "models.m.adapter.train.precision",
            "bfloat16",
            "'bfloat16' is none of fp32, bf16, fp16; did you mean 'bf16'?",
        ),
        ("models.m.adapter.train.offload.max_memory", {"gpu": "2GB"}, "offload.max_memory: 'gpu' is not of the form"),
        ("models.m.adapter.train.offload.max_memory", {"0": "2"}, "offload.max_memory.0: '2' is not of the form"),
        ("models.m.adapter.train.offload.max_memory", ["2GB"], "max_memory: expected object, found list ['2GB']"),
        (
            "models.m.adapter.train.offload.low_cpu_mem_usage",
            False,
            "offload.low_cpu_mem_usage: has to be true, found false",
        ),
        ("models.m.adapter.train.micro_batching.micro_batch_size", 0, "micro_batch_size: 0 is less than the minimum"),
        ("models.m.adapter.train.quantization.load_in_4bit", "yes", "load_in_4bit: expected boolean or null, found"),
        ("hardware.ram", "48", "hardware.ram: expected number, found string '48'"),
        ("hardware.gpus", 24, "hardware.gpus: expected array, found integer 24"),
        ("hardware.gpus", [24, 0], "hardware.gpus.1: 0 is less than or equal to the minimum of 0"),
        ("keep_intermediates", "no", "keep_intermediates: expected boolean, found string 'no'"),
        ("hardware", None, "hardware: expected object, found null"),
        ("models.m.adapter.train.lora.r", True, "models.m.adapter.train.lora.r: expected integer, found boolean True"),
        ("models.m.adapter.train.lora.r", 0, "models.m.adapter.train.lora.r: 0 is less than the minimum of 1"),
        ("models.m.base.hub", "model", "models.m.base.hub: 'model' is not of the form"),
        ("models.My Model", {"base": {"path": "x"}}, "models: 'My Model' is not of the form"),
        ("models.m.base.path", "x", "models.m.base: give exactly one of: hub, path, gguf, pypi with member"),
        ("models.m.base", {}, "models.m.base: give exactly one of: hub, path, gguf, pypi with member"),
        ("models.m.base", {"pypi": "a==1"}, "models.m.base: give exactly one of: hub, path, gguf, pypi with member"),
        ("models.m.base.revision", ..., "models.m.base: 'revision' is a dependency of 'hub': they belong together"),
        ("models.m.adapter", {}, "models.m.adapter: give exactly one of: train"),
        ("models.m.quantize.types", [], "models.m.quantize.types: [] should be non-empty"),
        ("llama_cpp.cmake_flags", ["GGML_CUDA"], "llama_cpp.cmake_flags.0: 'GGML_CUDA' is not of the form"),
        ("models.m.ollama.name", "my model", "models.m.ollama.name: 'my model' is not of the form"),
        ("models.m.ollama.name", "-mine", "models.m.ollama.name: '-mine' is not of the form"),
        ("models.m.ollama.name", "a/b/c/mine", "models.m.ollama.name: 'a/b/c/mine' is not of the form"),
        ("models.m.ollama.name", "mine:", "models.m.ollama.name: 'mine:' is not of the form"),
        (
            "models.m.ollama.name",
            "mine:w-0123456789ab",
            "models.m.ollama.name: 'mine:w-0123456789ab' is not of the form",
        ),
        ("models.m.ollama.name", "mine\n", "is not of the form"),
        ("models.m.ollama.name", "host:5000/mine", "models.m.ollama.name: 'host:5000/mine' is not of the form"),
        ("models.m.ollama.name", "my.host/mine", "models.m.ollama.name: 'my.host/mine' is not of the form"),
        ("models.m.ollama.name", "m" * 81, "is not of the form"),
        ("models.m.rag", {"documents": "d"}, "models.m.rag: missing key 'questions'"),
        (
            "models.m.rag",
            {"documents": "d", "questions": "q", "prompt": "{question}"},
            "rag.prompt: '{question}' is not",
        ),
        ("models.m.ollama.parameters.temprature", 1, "unknown key 'temprature'; did you mean 'temperature'?"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_remedy(path: str, value: Any, said: str) -> None:
    (line,) = problems({path: value})
    assert said in line


def test_a_number_that_yaml_reads_as_text_is_explained() -> None:
    """YAML 1.1 reads 1e-4 as text for want of a point; nobody sees why from the value alone."""
    learning_rate = yaml.safe_load("1e-4")
    (line,) = problems({"models.m.adapter.train.learning_rate": learning_rate})
    assert line.startswith("models.m.adapter.train.learning_rate: expected number, found string '1e-4'")
    assert "1.0e-4" in line


def test_no_models_at_all() -> None:
    (line,) = problems({"models": {}})
    assert line.startswith("models: ")
    assert "at least one" in line


def test_all_mistakes_are_listed() -> None:
    lines = problems(
        {
            "hardwear": {},
            "keep_intermediates": 1,
            "models.m.merge.dtype": "fp16",
            "models.m.adapter.train.lora.rank": 8,
            "models.m.adapter.train.lora.r": 0,
            "models.other": {"base": {"hub": "a/b"}},
        }
    )
    wanted = ["hardwear", "keep_intermediates", "merge.dtype", "'rank'", "lora.r:", "'revision'", "'shape'"]
    assert {word: sum(word in line for line in lines) for word in wanted} == dict.fromkeys(wanted, 1)
    assert len(lines) == len(wanted)


def test_every_missing_key_is_listed_once() -> None:
    lines = problems({"models.m.base.shape": {"hidden_size": 64, "vocab_size": 320}})
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
