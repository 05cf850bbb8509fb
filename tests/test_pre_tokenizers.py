"""Every name in `tokenizer.ggml.pre`, compared with what llama.cpp itself makes of it."""

from __future__ import annotations

import pytest
from tiny_gguf import TEXTS, imported, llama_ids, load_tokenizer

from lib.pre_tokenizers import PRE_TOKENIZERS

ONE_OF_EACH_KIND = (
    "smollm", "gpt-2", "default", "llama-bpe", "glm4", "dbrx", "qwen2", "deepseek-r1-qwen", "qwen35", "gpt-4o",
    "tekken", "deepseek-llm", "deepseek-coder", "deepseek-v3", "falcon", "bloom", "viking",
)  # fmt: skip


@pytest.mark.parametrize("pre", ONE_OF_EACH_KIND)
def test_ids_are_those_of_llama_cpp(make_gguf, llama_cpp, pre):
    gguf = make_gguf(pre=pre)
    tokenizer = load_tokenizer(imported(gguf))
    expected = llama_ids(llama_cpp.tool("llama-tokenize"), gguf, TEXTS)
    assert [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS] == expected


def test_every_kind_of_pre_tokenizer_is_compared():
    assert {PRE_TOKENIZERS[name] for name in ONE_OF_EACH_KIND} == set(PRE_TOKENIZERS.values())


def test_missing_name_means_default(make_gguf, llama_cpp):
    gguf = make_gguf(pre=None)
    tokenizer = load_tokenizer(imported(gguf))
    expected = llama_ids(llama_cpp.tool("llama-tokenize"), gguf, TEXTS)
    assert [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS] == expected


def test_smollm_takes_digits_one_by_one(make_gguf):
    tokenizer = load_tokenizer(imported(make_gguf(pre="smollm")))
    assert tokenizer.tokenize("12345") == list("12345")
