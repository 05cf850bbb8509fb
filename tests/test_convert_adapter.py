"""An adapter as GGUF over its base says what the merged model says; what a GGUF cannot say is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_adapter import convert_adapter
from convert_gguf import convert_gguf
from merge_adapter import merge_adapter
from peft import LoraConfig, get_peft_model
from tiny import SHAPE
from tiny_adapter import write_constants
from tiny_chain import problems
from transformers import AutoModelForCausalLM

from lib.gguf_file import read_gguf
from lib.llama_cpp import LlamaCpp
from lib.llama_server import serving
from lib.lora import LoraError
from lib.manifest import read_file_manifest

ATTENTION = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "rsLoRA": {"target_modules": "all-linear", "use_rslora": True},
    "ranks by pattern": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 8, "layers.0.mlp.up_proj": 2}},
    "one alpha by pattern": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"[qv]_proj": 24}},
}


def train(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter that peft made, of values that change what the model says."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings))
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(folder)
    return folder


def to_gguf(base: Path, adapter: Path, output: Path, llama_cpp: LlamaCpp) -> Path:
    convert_adapter(
        base=base,
        base_manifest=None,
        adapter=adapter,
        adapter_manifest=None,
        name="tiny",
        output=output,
        llama_cpp=llama_cpp,
        threads=2,
    )
    return output


def checkpoint_to_gguf(checkpoint: Path, artifact: str, output: Path, llama_cpp: LlamaCpp) -> Path:
    given = {"manifest": None, "artifact": artifact, "name": "tiny", "outtype": "f16", "threads": 2}
    convert_gguf(checkpoint=checkpoint, output=output, llama_cpp=llama_cpp, **given)
    return output


@pytest.fixture(scope="module")
def base_gguf(tiny_base: Path, llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_to_gguf(tiny_base, "base", tmp_path_factory.mktemp("base") / "base.gguf", llama_cpp)


def next_tokens(gguf: Path, program: Path) -> dict[int, float]:
    """The logarithms of all tokens' probabilities behind a text, by llama.cpp."""
    with serving(gguf, program=program, threads=2) as server:
        body = {"prompt": "What builds the model?", "n_predict": 1, "n_probs": SHAPE["vocab_size"], "temperature": 0.0}
        answer = server._post("/completion", body)
    return {each["id"]: each["logprob"] for each in answer["completion_probabilities"][0]["top_logprobs"]}


def distance(one: dict[int, float], other: dict[int, float]) -> float:
    return max(abs(one[token] - other[token]) for token in one.keys() & other.keys())


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_base_and_adapter_say_what_the_merged_model_says(
    settings: str, tiny_base: Path, base_gguf: Path, tmp_path: Path, llama_cpp: LlamaCpp
) -> None:
    adapter = train(tiny_base, tmp_path / "adapter", **SETTINGS[settings])
    merge_adapter(
        base=tiny_base,
        base_manifest=None,
        adapter=adapter,
        adapter_manifest=None,
        dtype="float16",
        base_weights="original",
        device="cpu",
        max_shard_size=5000,
        output=tmp_path / "merged",
        threads=2,
    )
    merged = checkpoint_to_gguf(tmp_path / "merged", "merged", tmp_path / "merged.gguf", llama_cpp)
    lora = to_gguf(tiny_base, adapter, tmp_path / "tiny.adapter.gguf", llama_cpp)
    program = llama_cpp.tool("llama-server")
    with_adapter = tmp_path / "llama-server"
    with_adapter.write_text(f'#!/bin/sh\nexec {program} "$@" --lora {lora}\n')
    with_adapter.chmod(0o755)
    expected = next_tokens(merged, program)
    assert len(expected) > 100
    # Rounding the merged weights to 16 bits is the whole difference.
    assert distance(next_tokens(base_gguf, with_adapter), expected) < 0.05
    assert distance(next_tokens(base_gguf, program), expected) > 0.5


@pytest.mark.slow
def test_the_same_bytes_in_any_folder(tiny_base: Path, tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    adapter = train(tiny_base, tmp_path / "adapter", target_modules=["q_proj"])
    first = to_gguf(tiny_base, adapter, tmp_path / "one" / "a.gguf", llama_cpp)
    shutil.copytree(tiny_base, tmp_path / "another base")
    shutil.copytree(adapter, tmp_path / "別 adapter")
    second = to_gguf(tmp_path / "another base", tmp_path / "別 adapter", tmp_path / "two" / "a.gguf", llama_cpp)
    assert first.read_bytes() == second.read_bytes()
    origin = read_file_manifest(first)["origin"]
    assert origin["type"] == "lora" and set(origin) == {"adapter", "base", "llama_cpp", "type"}
    metadata = read_gguf(first).metadata
    assert (metadata["adapter.lora.alpha"], metadata["general.name"]) == (8.0, "tiny")
    assert metadata["general.description"].startswith(
        f"LoRA adapter sha256:{origin['adapter']['digest']}; for the base"
    )
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"a.gguf", "a.gguf.json"}
    assert problems(first) == []
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    assert [line for line in problems(first) if "sha256" in line]


def constants(folder: Path, **config: Any) -> Path:
    return write_constants(folder, layers=ATTENTION, **config)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda folder: constants(folder, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 16}),
            "scaled as by alpha 4, model.layers.1.self_attn.q_proj.weight as by 16; a GGUF adapter has one alpha",
        ),
        (lambda folder: constants(folder, lora_alpha=0), "alpha is 0"),
        (lambda folder: constants(folder, fan_in_fan_out=True), r"stored \(in, out\)"),
        (lambda folder: constants(folder, use_dora=True), "DoRA"),
    ],
)
def test_what_a_gguf_adapter_cannot_say_is_refused(
    make: Callable[[Path], Path], said: str, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make(tmp_path / "adapter")
    with pytest.raises(LoraError, match=said):
        to_gguf(tiny_base, adapter, tmp_path / "a.gguf", llama_cpp=None)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA's magnitudes"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens.weight: more than a product"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head.weight: more than a product"),
        (
            {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 16}},
            "a GGUF adapter has one alpha",
        ),
    ],
)
def test_adapters_of_pefts_that_are_refused(
    settings: dict[str, Any], said: str, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = train(tiny_base, tmp_path / "adapter", **settings)
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with pytest.raises(LoraError, match=said):
        to_gguf(tiny_base, adapter, tmp_path / "a.gguf", llama_cpp=None)


def test_an_adapter_of_another_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    adapter = write_constants(tmp_path / "adapter", layers=ATTENTION, width=SHAPE["hidden_size"] * 2)
    with pytest.raises(LoraError, match="q_proj"):
        to_gguf(tiny_base, adapter, tmp_path / "a.gguf", llama_cpp=None)
