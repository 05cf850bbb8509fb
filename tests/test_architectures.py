"""Architectures that users bring: llama.cpp reads from the F16 file what transformers reads from the checkpoint."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from convert_gguf import convert_gguf
from real_tokenizers import R1_DISTILL_QWEN, write_tokenizer
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer, PreTrainedModel
from transformers.convert_slow_tokenizer import generate_merges

from lib.llama_cpp import LlamaCpp
from lib.llama_server import LlamaServer, serving

pytestmark = pytest.mark.slow

TEXT = "Which type? 既定の量子化は q4_k_m です。 GPU 2枚, 24 GB: 1234567890 🚀\n\tdef f(x):\n        return x ** 2"
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
BYTE = re.compile("<0x[0-9A-F]{2}>")
# Largest difference of a log-probability, over the 300 likeliest tokens: llama.cpp rounds what it multiplies to F16.
CLOSE = 0.01


def sentencepiece(tiny_base: Path, folder: Path) -> int:
    """The tokenizer kind of Llama 2 and Mistral; gives the number of tokens."""
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_base / name).is_file():
            shutil.copy(tiny_base / name, folder)
    return 384


def gemma(tiny_base: Path, folder: Path) -> int:
    """Gemma's tokenizer kind: SentencePiece without a space before the text, single digits, turns as special tokens."""
    pieces = folder / "tokenizer.model"
    (folder / "text").write_text(f"{TEXT}\n" * 40)
    turns = ["<start_of_turn>", "<end_of_turn>"]
    SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(pieces.with_suffix("")),
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        hard_vocab_limit=False,
        user_defined_symbols=turns,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "minloglevel": 2},
        **{f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
    )
    read = SentencePieceProcessor(str(pieces))
    vocabulary = {read.id_to_piece(number): number for number in range(read.get_piece_size())}
    special = (read.is_control, read.is_unknown, read.is_byte)
    merged = {
        piece: read.get_score(number)
        for piece, number in vocabulary.items()
        if piece not in turns and not any(is_one(number) for is_one in special)
    }
    tokenizer = GemmaTokenizer(
        vocab=vocabulary,
        merges=generate_merges(vocabulary, merged),
        mask_token="<unk>",
        additional_special_tokens=turns,
    )
    tokenizer.save_pretrained(folder)
    for left in ("text", "tokenizer.vocab"):
        (folder / left).unlink()
    return len(vocabulary)


def byte_level(tiny_base: Path, folder: Path) -> int:
    """The R1 distillations' own, as on Qwen2 and Qwen3; their embedding is longer than the vocabulary."""
    write_tokenizer(R1_DISTILL_QWEN, folder)
    return 152_064


MODELS: dict[str, tuple[str, Callable[[Path, Path], int], dict[str, Any]]] = {
    "llama": ("Llama", sentencepiece, {}),
    "mistral": ("Mistral", sentencepiece, {"sliding_window": None}),
    "gemma": ("Gemma", gemma, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", byte_level, {}),
    "qwen2-tied": ("Qwen2", byte_level, {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", byte_level, {"head_dim": 32}),
}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in float16, with weights large enough to tell one token from another."""
    name, write, options = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    folder.mkdir()
    vocabulary = write(tiny_base, folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **{"tie_word_embeddings": False, **SIZES, **options}, vocab_size=vocabulary, initializer_range=0.1
    )
    model: PreTrainedModel = getattr(transformers, f"{name}ForCausalLM")(config)
    model.to(torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, llama_cpp: LlamaCpp) -> Any:
    gguf = tmp_path_factory.mktemp("gguf") / "model.f16.gguf"
    convert_gguf(
        checkpoint=checkpoint,
        manifest=None,
        artifact="merged",
        name="model",
        outtype="f16",
        output=gguf,
        llama_cpp=llama_cpp,
        threads=2,
    )
    with serving(gguf, program=llama_cpp.tool("llama-server"), threads=2) as running:
        yield running
    gguf.unlink()


def test_tokens_are_the_same(checkpoint: Path, server: LlamaServer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    special = tokenizer.eos_token
    # Behind a special token llama.cpp puts the space that SentencePiece begins a text with once more; transformers
    # does not.
    behind = "" if tokenizer.tokenize("a")[0].startswith("▁") else TEXT
    text = f"{TEXT}{special}{behind}"
    assert special and tokenizer.convert_tokens_to_ids(special) in tokenizer.encode(text, add_special_tokens=False)
    assert server.tokenize(text, parse_special=True) == tokenizer.encode(text, add_special_tokens=False)


def test_logits_agree(checkpoint: Path, server: LlamaServer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = tokenizer.encode(TEXT)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1], dim=-1)
    body = {"prompt": tokens, "n_predict": 1, "n_probs": 300, "temperature": -1.0, "cache_prompt": False}
    # Of an answer that is a single byte llama-server tells no probabilities; they are those before such a bias.
    body["logit_bias"] = [[number, False] for token, number in tokenizer.get_vocab().items() if BYTE.fullmatch(token)]
    answered = server._post("/completion", body)["completion_probabilities"][0]["top_logprobs"]
    found = {each["id"]: each["logprob"] for each in answered}
    assert len(found) == 300
    differences = [abs(logprob - float(expected[token])) for token, logprob in found.items()]
    print(f"largest difference of a log-probability: {max(differences):.5f}")
    assert max(differences) < CLOSE
    assert max(found, key=found.get) == int(expected.argmax())
