"""`--set a.b=c`: what it says, and what is said where it names nothing or takes no such value."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from conftest import ROOT

from lib.cli import UsageError
from lib.config import mistakes_in, schema
from lib.set_option import parse_settings, place_of, setting_paths


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ([], {}),
        (["ollama.parameters.temperature=0.2"], {"ollama": {"parameters": {"temperature": 0.2}}}),
        (["quantize.types=[q8_0, q4_k_m]"], {"quantize": {"types": ["q8_0", "q4_k_m"]}}),
        (["merge.dtype=bfloat16", "quantize.pure=true"], {"merge": {"dtype": "bfloat16"}, "quantize": {"pure": True}}),
        (["quantize.path=direct", "quantize.path=staged"], {"quantize": {"path": "staged"}}),
        (["ollama={name: me/x}", "ollama.system=a=b"], {"ollama": {"name": "me/x", "system": "a=b"}}),
        (["ollama.system=答えは短く。"], {"ollama": {"system": "答えは短く。"}}),
        (["base.shape=null"], {"base": {"shape": None}}),
        ([r"quantize.tensor_type.blk\.1\.ffn=q6_k"], {"quantize": {"tensor_type": {r"blk\.1\.ffn": "q6_k"}}}),
    ],
)
def test_words_become_settings(words: list[str], settings: dict[str, Any]) -> None:
    assert parse_settings(words, section="model") == settings


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("qantize.path=direct", "--set qantize.path: unknown key 'qantize'; did you mean 'quantize'?"),
        ("quantize.tpyes=[q8_0]", "--set quantize.tpyes: unknown key 'tpyes'; did you mean 'types'?"),
        ("temperature=1", "--set temperature: unknown key 'temperature'; did you mean 'ollama.parameters.temp"),
        ("lora.r=32", "--set lora.r: unknown key 'lora'; did you mean 'adapter.train.lora.r'?"),
        ("merge.dtype.x=1", "--set merge.dtype.x: unknown key 'x'"),
        ("merge.=1", "--set merge.: expected mapping, found integer 1"),
        ("=1", "--set : unknown key ''"),
        ("merge.dtype", "--set merge.dtype: say what, as in key=value"),
        ("merge.dtype=fp16", "--set merge.dtype: 'fp16' is none of float16, bfloat16, float32; did you mean 'f"),
        ("quantize.types=q8_0", "--set quantize.types: 'q8_0' is not of the form: auto, or a list of types"),
        ("quality.types=q8_0", "--set quality.types: expected list, found string 'q8_0'; write it as a list, [q8_0]"),
        ("ollama.parameters={heat: 1}", "--set ollama.parameters: unknown key 'heat'"),
        ("merge.max_shard_size=0", "--set merge.max_shard_size: 0 is less than the minimum of 1"),
    ],
)  # fmt: skip
def test_words_that_say_nothing_are_refused(word: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_settings([word], section="model")
    assert str(refused.value).startswith(said)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UsageError) as refused:
        parse_settings(["merge.dtpye=float16", "quantize.path=direct", "smoke.min_gain=-1"], section="model")
    first, second = str(refused.value).splitlines()
    assert "'dtpye'" in first and second.startswith("  --set smoke.min_gain: -1 is less than")


def test_every_setting_of_the_shipped_config_has_a_place() -> None:
    def leaves(value: Any, path: str) -> list[tuple[str, Any]]:
        if not isinstance(value, dict):
            return [(path, value)]
        return [each for key, entry in value.items() for each in leaves(entry, f"{path}.{key}" if path else key)]

    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    for model in config["models"].values():
        words = [f"{path}={yaml.safe_dump(value, default_flow_style=True)}" for path, value in leaves(model, "")]
        settings = parse_settings(words, section="heatmap_model" if "kind" in model else "model")
        assert settings == model
        assert mistakes_in({"models": {"m": settings}}, schema()) == []


def test_paths_and_places_are_each_others_inverse() -> None:
    paths = list(setting_paths("model"))
    assert {"base.shape.vocab_size", "adapter.train.lora.r", "adapter.train.micro_batching.oom_retries"} <= set(paths)
    assert all(place_of(path, section="model")[0] == path.split(".") for path in paths)
