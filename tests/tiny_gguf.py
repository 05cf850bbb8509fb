"""Small GGUF files with a byte-level BPE vocabulary trained here: what an import and its tests start from."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lib.gguf_import import import_gguf

WIDTH, HEADS, KEY_VALUE_HEADS, LAYERS, INNER = 32, 4, 2, 2, 64
BARRIER = "<|im_start|>"  # a control token: text before and after it is tokenized as if alone
CONTROL = ("<|endoftext|>", BARRIER, "<|im_end|>", "<｜User｜>")
USER_DEFINED = ("<think>", "  ")
UNMERGED = ("ĠInternational", "midsummer")  # too long for the merges: only `ignore_merges` finds them
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}\n{% endfor %}"

TEXTS = [
    "The quick brown fox isn't lazy; it's HelloWorld, and WE'LL SEE, they've said.",
    "東京タワーの高さは333メートルです。\u3000全角。　スペース、「括弧」。　カタカナひらがな漢字",
    "0 12 123 1234 12345678 3.14159 1,234,567 ½ ² Ⅷ ١٢٣ １２３４",
    "def f(x: int) -> str:\n    return f'{x ** 2:04d}'  # ok\n\n\n\tif a != b:\r\n\t\tpass",
    "👩\u200d🔬🚀 😶\u200d🌫️ ✅🦙🦙",
    " a  b   c    d\t\te \n \n\n f \r\n\r\n g\u00a0\u2003h\u2028i\u0085j   ",
    "Привет, МИР! नमस्ते दुनिया مرحبا 안녕하세요 ไทย Ünïcödé ÀÉÎ Straße Աբգ აბგ",
    "...!!!??? ------===== ''''`````\"\"\"\" $5+3<=>^|~ “quoted” — …",
    "<think>plan</think> x<|im_end|>y <|im_end> z<｜User｜>hi",
    "midsummer, an International midsummer; International2026",
    "camelCaseABCDef iPhone's  indented\n    twice ",
    "!\u3000!\u3000!\u3000東\u3000京\u3000東\u3000京",
    "\n",
    " ",
    "",
]


@pytest.fixture(scope="session")
def vocabulary() -> dict[str, list]:
    """A byte-level BPE whose merges run over words, digits and spaces, so that every split shows in the ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=8,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), *USER_DEFINED, *UNMERGED]
    types = [TokenType.NORMAL] * len(tokens)
    for text in CONTROL:
        types[tokens.index(text)] = TokenType.CONTROL
    for text in USER_DEFINED:
        types[tokens.index(text)] = TokenType.USER_DEFINED
    return {"tokens": tokens, "types": types, "merges": [" ".join(pair) for pair in model["merges"]]}


def tensors(*, rows: int, architecture: str) -> dict[str, np.ndarray]:
    """Random weights of a tiny model, under llama.cpp's names."""
    random = np.random.default_rng(7)
    small = WIDTH // HEADS * KEY_VALUE_HEADS
    shapes = {"token_embd.weight": (rows, WIDTH), "output_norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}_norm.weight": (WIDTH,) for name in ("attn", "ffn")}
        shapes |= {f"blk.{i}.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "output")}
        shapes |= {f"blk.{i}.attn_{name}.weight": (small, WIDTH) for name in ("k", "v")}
        shapes |= {f"blk.{i}.ffn_{name}.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down.weight": (WIDTH, INNER)}
        if architecture == "qwen2":
            shapes |= {f"blk.{i}.attn_q.bias": (WIDTH,)}
            shapes |= {f"blk.{i}.attn_{name}.bias": (small,) for name in ("k", "v")}
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.fixture
def make_gguf(vocabulary: dict[str, list], tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small GGUF; `spoil` changes its tensors, other arguments its header."""

    def write(
        *,
        pre: str | None = "smollm",
        architecture: str = "llama",
        model: str | None = "gpt2",
        tokens: list[str] = vocabulary["tokens"],
        types: list[int] = vocabulary["types"],
        bos: str | None = BARRIER,
        flags: dict[str, bool] | None = None,
        scaling: str | None = None,
        parts: int = 1,
        template: str = TEMPLATE,
        spoil: Callable[[dict[str, np.ndarray]], Any] = lambda weights: None,
    ) -> Path:
        path = tmp_path / f"{pre}.gguf"
        writer = GGUFWriter(path, architecture)
        writer.add_context_length(256)
        writer.add_embedding_length(WIDTH)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KEY_VALUE_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(len(tokens))
        if scaling:
            writer.add_string(f"{architecture}.rope.scaling.type", scaling)
        if parts > 1:
            writer.add_uint16("split.count", parts)
        if model:
            writer.add_tokenizer_model(model)
            writer.add_token_list(tokens)
            writer.add_token_types(types)
            writer.add_token_merges(vocabulary["merges"])
            writer.add_eos_token_id(tokens.index("<|im_end|>"))
            writer.add_pad_token_id(tokens.index("<|endoftext|>"))
            writer.add_chat_template(template)
            writer.add_add_space_prefix(False)
            for key, value in (flags if flags is not None else {"add_bos_token": False}).items():
                writer.add_bool(f"tokenizer.ggml.{key}", value)
        if model and bos:
            writer.add_bos_token_id(tokens.index(bos))
        if model and pre:
            writer.add_tokenizer_pre(pre)
        weights = tensors(rows=len(tokens), architecture=architecture)
        spoil(weights)
        for name, values in weights.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def imported(gguf: Path, *, dtype: str = "float32", name: str = "checkpoint") -> Path:
    """Import into a new folder beside the GGUF."""
    folder = gguf.parent / name
    import_gguf(gguf=gguf, output=folder, dtype=dtype)
    return folder


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer as users get it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def llama_ids(tool: Path, gguf: Path, texts: list[str]) -> list[list[int]]:
    """Ids of each text according to llama.cpp, without BOS and EOS; one process for all."""
    barrier = GGUFReader(gguf).fields["tokenizer.ggml.tokens"].contents().index(BARRIER)
    answers: list[list[int]] = [[]]
    for token in run_tokenizer(tool, gguf, BARRIER.join(texts), "--no-bos"):
        if token == barrier:
            answers.append([])
        else:
            answers[-1].append(token)
    return answers


def run_tokenizer(tool: Path, gguf: Path, text: str, *options: str) -> list[int]:
    """Ids of one text according to llama.cpp."""
    command = [tool, "-m", gguf, "--ids", "--log-disable", "--no-escape", "--stdin", *options]
    return json.loads(subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout)
