"""Settings as a script's options, and back."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
from tiny import SHAPE

from lib.config import definition
from lib.options import add_json_setting, add_settings, as_options, option_name, settings_from
from lib.spec import Smoke, resolve_project
from lib.tensor_types import TensorTypes
from lib.train_settings import Train
from lib.typed import build, plain


def resolved(folder: Path, *, data: str = "talks.jsonl", smoke: dict[str, Any] | None = None, **train: Any) -> Any:
    """The one model of a config with these settings."""
    for name in (data, "asked.jsonl", train.get("eval_data") or "held.jsonl"):
        (folder / name).write_text("{}\n")
    base = {"hub": "maker/model", "revision": "main", "shape": SHAPE}
    model = {"base": base, "adapter": {"train": {"data": data, **train}}}
    model["smoke"] = {"questions": "asked.jsonl", **(smoke or {})}
    return resolve_project({"models": {"m": model}}).models["m"]


def parse(words: list[str], section: str, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_settings(parser, section, without=without)
    return settings_from(parser.parse_args(words), section)


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"method": "lora", "device": "cuda", "threads": 7, "precision": "fp16"},
        {"gradient_checkpointing": True, "lora": {"use_rslora": True, "use_dora": True, "bias": "lora_only"}},
        {"method": "qlora", "quantization": {"bnb_4bit_use_double_quant": False, "bnb_4bit_quant_type": "fp4"}},
        {"quantization": {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_compute_dtype": "float16"}},
        {"quantization": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "up_proj"]}},
        {"eval_data": "held; out.jsonl", "eval_steps": 0, "load_best_model_at_end": True, "torch_compile": "off"},
        {"eval_fraction": 0.1, "packing": True, "max_steps": 7, "deterministic": True},
        {"micro_batching": {"adaptive_micro_batch": False, "micro_batch_size": 3, "mb_backoff_factor": 1.5}},
        {"micro_batching": {"min_micro_batch_size": 2, "oom_retries": 0}},
        {"offload": {"use_disk_offload": True, "max_memory": {"0": "20GiB", "1": "18.5 GB", "cpu": "0MB"}}},
        {"offload": {"use_cpu_offload": True, "offload_folder": "my disk/$HOME", "low_cpu_mem_usage": True}},
        {"learning_rate": 1.0e-5, "num_train_epochs": 0.1, "weight_decay": 1 / 3, "warmup_steps": 100},
        {"lora": {"target_modules": ["q_proj", "model.layers.0.mlp"], "lora_alpha": 0.5, "lora_dropout": 0.05}},
        {"lora": {"target_modules": []}, "seed": 2**31},
        {"lora": {"r": 8.0}},
        {"data": "my talks, 会話; $HOME's.jsonl"},
        {"data": "-dash.jsonl"},
        {"data": "100%.jsonl"},
    ],
)
def test_training_settings_survive_the_command_line(
    train: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = resolved(tmp_path, **train).adapter.train
    read = build(Train, parse(shlex.split(as_options(settings)), "train"))
    # Why it is that method goes another way; it is no setting.
    assert read == dataclasses.replace(settings, method_reason=read.method_reason)
    for key, value in train.items():
        written = plain(getattr(read, key))
        for name, entry in value.items() if isinstance(value, dict) else ():
            assert written[name] == entry
        assert isinstance(value, dict) or written == value


def test_why_it_is_the_method_is_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a changed sentence would train a 32B anew."""
    monkeypatch.chdir(tmp_path)
    settings = resolved(tmp_path).adapter.train
    assert settings.method_reason.startswith("auto: ")
    assert as_options(settings) == as_options(dataclasses.replace(settings, method_reason="another"))
    assert "reason" not in as_options(settings)


def test_settings_that_are_null_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(as_options(resolved(tmp_path).adapter.train))
    options = {word.partition("=")[0] for word in words}
    nullable = ("eval_data", "load_in_4bit", "bnb_4bit_compute_dtype", "micro_batch_size", "offload_folder")
    assert not options & {option_name(name) for name in nullable}
    assert not options & {"--no-load-in-4bit", "--no-load-in-8bit"}


def test_other_sections_survive_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    smoke = resolved(tmp_path, smoke={"min_gain": 0, "max_tokens": 3}).smoke
    assert build(Smoke, parse(shlex.split(as_options(smoke)), "smoke")) == smoke


def test_types_of_single_tensors_survive_it_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pattern that matches a tensor counts."""
    monkeypatch.chdir(tmp_path)
    chosen = {r"blk\.(0|1)\.attn_v": "q8_0", "attn": "q5_k", "a$ 'b": "f16"}
    types = dataclasses.replace(
        resolved(tmp_path).quantize.tensor_types,
        tensor_type=chosen,
        leave_output_tensor=True,
        output_tensor_type="q6_k",
    )
    read = build(TensorTypes, parse(shlex.split(as_options(types)), "quantize", without=("types", "imatrix", "budget")))
    assert read == types
    assert list(read.tensor_type) == list(chosen) != sorted(chosen)


def test_mappings_without_an_order_have_one_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"1": "18GB", "0": "20GB"}
    one, other = (
        as_options(resolved(tmp_path, offload={"max_memory": memory}).adapter.train)
        for memory in (sizes, dict(sorted(sizes.items())))
    )
    assert one == other


def test_the_same_number_is_the_same_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 and 3.0 epochs are one run: a rule's parameters must not differ, or it would train anew."""
    monkeypatch.chdir(tmp_path)
    whole, point = (as_options(resolved(tmp_path, num_train_epochs=n).adapter.train) for n in (3, 3.0))
    assert whole == point


def test_options_alone_have_the_schemas_defaults() -> None:
    settings = parse(["--data", "x.jsonl"], "train")
    rules = definition("train")
    plain = {key: rule["default"] for key, rule in rules["properties"].items() if "default" in rule}
    assert {key: settings[key] for key in plain} == plain
    assert settings["lora"]["r"] == definition("lora")["properties"]["r"]["default"]
    assert settings["offload"]["max_memory"] == {}
    # These wait for the method, which `auto` leaves open here.
    assert (settings["learning_rate"], settings["precision"]) == (None, None)
    for method, chosen in rules["x-defaults-by-method"].items():
        filled = parse(["--data", "x.jsonl", "--method", method], "train")
        assert {key: filled[key] for key in chosen} == chosen


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--data"),
        (["--data", "x", "--method", "dora"], "'lora', 'qlora'"),
        (["--data", "x", "--dtype", "float32"], "--dtype"),
        (["--data", "x", "--bnb-4bit-compute-dtype", "fp16"], "'float32', 'bfloat16', 'float16'"),
        (["--data", "x", "--r", "many"], "--r"),
        (["--data", "x", "--rank", "8"], "--rank"),
        (["--data", "x", "--learning", "1e-4"], "--learning"),
    ],
)
def test_wrong_options_are_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(words, "train")
    assert stopped.value.code == 2
    assert said.replace("'", "") in capsys.readouterr().err.replace("'", "")


def test_help_shows_every_setting_with_its_description() -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, "train")
    text = "".join(parser.format_help().split())  # lines are broken at hyphens too
    for section in ("train", "lora", "bitsandbytes", "micro_batching", "offload"):
        for name, rule in definition(section)["properties"].items():
            if "$ref" not in rule:
                assert option_name(name) in text
                assert "".join(rule["description"].split()) in text


def test_settings_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Groups as well: a script that takes the shape as JSON must not ask for its sizes one by one."""
    assert parse(["--path", "x"], "base", without=("gguf", "shape"))["path"] == "x"
    with pytest.raises(SystemExit):
        parse(["--path", "x", "--gguf", "y"], "base", without=("gguf", "shape"))
    assert "--gguf" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "words", "said"),
    [
        ("train", ["--learning-rate", "-1"], "--learning-rate: -1.0 is less than or equal to the minimum of 0"),
        ("train", ["--learning-rate", "nan"], "--learning-rate: nan is no finite number"),
        ("train", ["--weight-decay", "inf"], "--weight-decay: inf is no finite number"),
        ("train", ["--threads", "0"], "--threads: 0 is less than the minimum of 1"),
        ("train", ["--per-device-train-batch-size", "0"], "0 is less than the minimum of 1"),
        ("train", ["--num-train-epochs", "0"], "0.0 is less than or equal to the minimum of 0"),
        ("train", ["--lora-dropout", "1"], "1.0 is greater than or equal to the maximum of 1"),
        ("train", ["--target-modules", "q_proj", "q_proj"], "--target-modules"),
        ("train", ["--r", "0"], "--r: 0 is less than the minimum of 1"),
        ("train", ["--eval-fraction", "1"], "--eval-fraction: 1.0 is greater than or equal to the maximum of 1"),
        ("train", ["--max-steps", "-2"], "--max-steps: -2 is less than the minimum of -1"),
        ("train", ["--mb-backoff-factor", "1"], "1.0 is less than or equal to the minimum of 1"),
        ("train", ["--max-memory", '{"0": "20"}'], "--max-memory: 0: '20' is not of the form"),
        ("train", ["--max-memory", '{"gpu": "20GB"}'], "--max-memory: 'gpu' is not of the form"),
        ("train", ["--max-memory", '{"cpu": 20}'], "--max-memory: cpu: expected string, found integer 20"),
        ("train", ["--max-memory", "20GB"], "--max-memory: '20GB' is no valid JSON"),
        ("train", ["--no-low-cpu-mem-usage"], "--no-low-cpu-mem-usage: has to be true, found false"),
        ("merge", ["--max-shard-size", "-5"], "--max-shard-size: -5 is less than the minimum of 1"),
        ("smoke", ["--questions", "x", "--max-tokens", "0"], "--max-tokens: 0 is less than the minimum of 1"),
        ("base", ["--sha256", "abc"], "--sha256: 'abc' is not of the form"),
        ("base", ["--hub", "no-owner"], "--hub: 'no-owner' is not of the form"),
    ],
)
def test_the_schemas_limits_hold_for_options(
    section: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--data", "x", *words] if section == "train" else words, section, without=("shape",))
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_mapping_as_json_is_held_against_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_json_setting(parser, "parameters", definition("ollama")["properties"]["parameters"])
    assert parser.parse_args([]).parameters == {}
    read = parser.parse_args(["--parameters", '{"num_ctx": 8192.0, "temperature": 1, "stop": ["END"]}']).parameters
    assert repr(read) == "{'num_ctx': 8192, 'temperature': 1.0, 'stop': ['END']}", "numbers as in a config"
    for text, said in (
        ("{bad", "'{bad' is no valid JSON"),
        ("[" * 100_000, "is no valid JSON"),
        ("[1]", "expected mapping, found list [1]"),
        ('{"temprature": 1}', "unknown key 'temprature'; did you mean 'temperature'?"),
        ('{"stop": "END"}', "stop: expected list, found string 'END'"),
        ('{"num_ctx": 0, "top_p": NaN}', "num_ctx: 0 is less than the minimum of 1; top_p: nan is no finite number"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(["--parameters", text])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
