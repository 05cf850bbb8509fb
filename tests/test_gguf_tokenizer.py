"""Tokenizers out of GGUF files made here, compared with what llama.cpp itself makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tiny_gguf import CONTROL, TEMPLATE, TEXTS, USER_DEFINED, imported, llama_ids, load_tokenizer, run_tokenizer
from tokenizers import Tokenizer

from lib.gguf_file import GgufFile
from lib.gguf_tokenizer import GgufImportError, build_tokenizer, read_vocabulary


def test_qwen_architecture_keeps_the_tokenizer(make_gguf, llama_cpp):
    gguf = make_gguf(architecture="qwen2", pre="deepseek-r1-qwen")
    folder = imported(gguf)
    texts = [*TEXTS, "e\u0301"]
    expected = llama_ids(llama_cpp.tool("llama-tokenize"), gguf, texts)
    from_file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [from_file.encode(text).ids for text in texts] == expected
    # transformers insists on Qwen2Tokenizer here, which composes the last text's accent; llama.cpp does not.
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS] == expected[:-1]


def test_refuses_a_qwen_model_with_another_pre_tokenizer(make_gguf):
    with pytest.raises(GgufImportError, match="as a Qwen2Tokenizer, which gives other ids"):
        imported(make_gguf(architecture="qwen2", pre="smollm"))


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
def test_bos_and_eos(make_gguf, llama_cpp, pre, flags):
    gguf = make_gguf(pre=pre, flags=flags)
    folder = imported(gguf)
    expected = run_tokenizer(llama_cpp.tool("llama-tokenize"), gguf, "Hello 42")
    assert load_tokenizer(folder).encode("Hello 42") == expected
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Hello 42").ids == expected
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config.get("add_bos_token") == flags.get("add_bos_token", True if pre == "llama-bpe" else None)
    assert config.get("add_eos_token") == flags.get("add_eos_token")


def test_control_tokens_are_special_and_users_tokens_are_not(make_gguf, vocabulary):
    tokenizer = load_tokenizer(imported(make_gguf()))
    flags = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert flags == dict.fromkeys(CONTROL, True) | dict.fromkeys(USER_DEFINED, False)
    ids = tokenizer.encode("<think>ab<|im_end|>")
    assert [ids[0], ids[-1]] == [vocabulary["tokens"].index(text) for text in ("<think>", "<|im_end|>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>ab"


def test_mistyped_end_of_turn_is_control_as_in_llama_cpp(make_gguf, llama_cpp, vocabulary):
    tokens, types = vocabulary["tokens"] + ["<|eot_id|>"], vocabulary["types"] + [TokenType.NORMAL]
    gguf = make_gguf(tokens=tokens, types=types)
    text = "a<|eot_id|>b"
    expected = llama_ids(llama_cpp.tool("llama-tokenize"), gguf, [text])[0]
    assert len(expected) == 3
    assert load_tokenizer(imported(gguf)).encode(text) == expected


def test_bytes_without_a_token_are_dropped_but_keep_their_neighbours_apart(make_gguf, llama_cpp, vocabulary):
    used = {part for merge in vocabulary["merges"] for part in merge.split(" ")}
    lost = sorted(set("#$%&@GJKNOQRVXYZ") - used)
    tokens = [f"<unused{text}>" if text in lost else text for text in vocabulary["tokens"]]
    gguf = make_gguf(tokens=tokens)
    texts = [f"the{byte}quick{byte}{byte} t{byte}he 1{byte}2" for byte in lost]
    assert texts
    expected = llama_ids(llama_cpp.tool("llama-tokenize"), gguf, texts)
    tokenizer = load_tokenizer(imported(gguf))
    assert [tokenizer.encode(text) for text in texts] == expected


def test_chat_template_is_the_same_in_both_places(make_gguf):
    folder = imported(make_gguf())
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    messages = [{"role": "user", "content": "Hi"}]
    assert load_tokenizer(folder).apply_chat_template(messages, tokenize=False) == "<|im_start|>Hi\n"


def header(**changes: Any) -> GgufFile:
    """A header with three tokens and one merge; `changes` replace what follows `tokenizer.ggml.`."""
    types = [TokenType.NORMAL] * 3
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "token_type": types, "merges": ["a b"]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in {**values, **changes}.items()}
    return GgufFile(path=Path("model.gguf"), metadata=metadata, tensors=[], places={})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "no tokenizer in the file"),
        ({"tokens": ["a", "b", "a"]}, r"more than once: \['a'\]"),
        ({"token_type": [TokenType.NORMAL] * 2}, "3 tokens, but types for 2"),
        ({"merges": []}, "no merges in the file"),
        ({"merges": ["ab"]}, "merge 'ab' is not two tokens"),
        ({"merges": ["a b", "b a"]}, r"no token: \[\('b', 'a'\)\]"),
        ({"eos_token_id": 3, "bos_token_id": 1}, "not among its 3 tokens: eos_token 3$"),
        ({"add_eos_token": True}, "wrapped in a eos_token"),
    ],
)
def test_refuses_a_vocabulary_that_contradicts_itself(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GgufImportError, match=f"^model.gguf: .*{message}"):
        build_tokenizer(vocabulary=read_vocabulary(header=header(**changes)), path=Path("model.gguf"))


def test_texts_that_llama_cpp_renames_and_padding_that_it_adds() -> None:
    tokens = ["a", "b", "ab", "", "[PAD4]"]
    types = [TokenType.NORMAL] * 4 + [TokenType.UNUSED]
    vocabulary = read_vocabulary(header=header(tokens=tokens, token_type=types))
    assert vocabulary.tokens == ("a", "b", "ab", "[EMPTY_3]")
