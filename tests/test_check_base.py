"""The early check of a base: what llama.cpp's converter would refuse after hours is refused in seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from check_base import ConversionError, check_base
from conftest import run_snakemake
from real_tokenizers import R1_DISTILL_QWEN, write_tokenizer
from safetensors.torch import load_file, save_file
from test_rebuild import set_in_config
from transformers import Qwen2Config, Qwen2ForCausalLM

from lib.llama_cpp import LlamaCpp

ROWS = 152_064  # of the R1 distillations; their tokenizer has 151,665 tokens


def write_qwen(folder: Path) -> Path:
    """A Qwen2 of one narrow layer with the tokenizer and the number of embeddings of the 32B."""
    config = Qwen2Config(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return write_tokenizer(R1_DISTILL_QWEN, folder)


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def check(base: Path, folder: Path, llama_cpp: LlamaCpp) -> dict[str, Any]:
    output = folder / "found.json"
    check_base(base=base, output=output, llama_cpp=llama_cpp)
    return json.loads(output.read_text(encoding="utf-8"))


def test_a_llama_is_taken(tiny_base: Path, tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    found = check(tiny_base, tmp_path, llama_cpp)
    assert found["architecture"] == "llama"
    assert found["tokens"] == 384


@pytest.mark.slow
def test_the_reference_models_tokenizer_is_taken(tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    """Its embedding has more rows than there are tokens, which the converter fills up."""
    found = check(write_qwen(tmp_path / "base"), tmp_path, llama_cpp)
    assert (found["architecture"], found["pre_tokenizer"]) == ("qwen2", "deepseek-r1-qwen")
    assert found["tokens"] == ROWS


@pytest.mark.slow
def test_an_unknown_pre_tokenizer(tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    base = write_qwen(tmp_path / "base")
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    change_json(base / "tokenizer.json", model=tokenizer["model"] | {"merges": tokenizer["model"]["merges"][:1000]})
    with pytest.raises(ConversionError, match="BPE pre-tokenizer was not recognized"):
        check(base, tmp_path, llama_cpp)
    assert not (tmp_path / "found.json").exists()


def name_another_architecture(base: Path) -> None:
    change_json(base / "config.json", architectures=["GPT9ForCausalLM"])


def promise_more_tokens(base: Path) -> None:
    change_json(base / "config.json", vocab_size=400)


def add_a_tensor(base: Path) -> None:
    index = base / "model.safetensors.index.json"
    listed = json.loads(index.read_text(encoding="utf-8"))
    shard = sorted(set(listed["weight_map"].values()))[0]
    save_file({**load_file(base / shard), "model.layers.0.mlp.extra.weight": torch.ones(4, 4)}, base / shard)
    listed["weight_map"]["model.layers.0.mlp.extra.weight"] = shard
    index.write_text(json.dumps(listed), encoding="utf-8")


def add_another_template(base: Path) -> None:
    change_json(base / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (name_another_architecture, ["GPT9ForCausalLM", "cannot convert this base", "llama_cpp.path"]),
        (promise_more_tokens, ["model.embed_tokens.weight has 384 rows", "400 tokens", "set vocab_size to 384"]),
        (add_a_tensor, ["model.layers.0.mlp.extra.weight", "cannot convert this base"]),
        (add_another_template, ["chat_template.jinja", "tokenizer_config.json", "make them the same"]),
    ],
)
def test_what_is_refused(
    edit: Callable[[Path], None], parts: list[str], tiny_base: Path, tmp_path: Path, llama_cpp: LlamaCpp
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    edit(base)
    with pytest.raises(ConversionError) as caught:
        check(base, tmp_path, llama_cpp)
    for part in parts:
        assert part in str(caught.value), caught.value
    assert not (tmp_path / "found.json").exists()


@pytest.mark.slow
def test_nothing_is_trained_on_a_base_that_cannot_be_converted(
    project: Path, tiny_base: Path, llama_cpp: LlamaCpp
) -> None:
    name_another_architecture(shutil.copytree(tiny_base, project / "strange"))
    set_in_config("models", "tiny", "base", "path", value="strange")(project, project)
    done = run_snakemake(project, "-j1", "models/tiny.q4_k_m.gguf")
    assert done.returncode == 1
    assert "GPT9ForCausalLM" in done.stderr and "Traceback" not in done.stderr
    assert not (project / "adapters").exists()
    assert not (project / "models").exists()
