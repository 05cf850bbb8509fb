"""GGUF files made here, imported, and compared with what llama.cpp itself makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lib.gguf_import import PRE_TOKENIZERS, GgufImportError, import_gguf

WIDTH, HEADS, KEY_VALUE_HEADS, LAYERS, INNER = 32, 4, 2, 2, 64
BARRIER = "<|im_start|>"  # a control token: text before and after it is tokenized as if alone
CONTROL = ("<|endoftext|>", BARRIER, "<|im_end|>", "<｜User｜>")
USER_DEFINED = ("<think>", "  ")
UNMERGED = ("ĠInternational", "midsummer")  # too long for the merges: only `ignore_merges` finds them
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}\n{% endfor %}"
ONE_OF_EACH_KIND = (
    "smollm", "gpt-2", "default", "llama-bpe", "glm4", "dbrx", "qwen2", "deepseek-r1-qwen", "qwen35", "gpt-4o",
    "tekken", "deepseek-llm", "deepseek-coder", "deepseek-v3", "falcon", "bloom", "viking",
)  # fmt: skip
FILES = {
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip

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
def make(vocabulary: dict[str, list], tmp_path: Path) -> Callable[..., Path]:
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
            writer.add_chat_template(TEMPLATE)
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
    command = [tool, "-m", gguf, "--ids", "--log-disable", "--no-escape", "--stdin", *options]
    return json.loads(subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout)


@pytest.mark.parametrize("pre", ONE_OF_EACH_KIND)
def test_ids_are_those_of_llama_cpp(make, llama_cpp, pre):
    gguf = make(pre=pre)
    tokenizer = load_tokenizer(imported(gguf))
    expected = llama_ids(llama_cpp.tool("llama-tokenize"), gguf, TEXTS)
    assert [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS] == expected


def test_every_kind_of_pre_tokenizer_is_compared():
    assert {PRE_TOKENIZERS[name] for name in ONE_OF_EACH_KIND} == set(PRE_TOKENIZERS.values())


def test_qwen_architecture_keeps_the_tokenizer(make, llama_cpp):
    gguf = make(architecture="qwen2", pre="deepseek-r1-qwen")
    folder = imported(gguf)
    texts = [*TEXTS, "e\u0301"]
    expected = llama_ids(llama_cpp.tool("llama-tokenize"), gguf, texts)
    from_file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [from_file.encode(text).ids for text in texts] == expected
    # transformers insists on Qwen2Tokenizer here, which composes the last text's accent; llama.cpp does not.
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS] == expected[:-1]


def test_refuses_a_qwen_model_with_another_pre_tokenizer(make):
    with pytest.raises(GgufImportError, match="as a Qwen2Tokenizer, which gives other ids"):
        imported(make(architecture="qwen2", pre="smollm"))


def test_missing_name_means_default(make, llama_cpp):
    gguf = make(pre=None)
    tokenizer = load_tokenizer(imported(gguf))
    expected = llama_ids(llama_cpp.tool("llama-tokenize"), gguf, TEXTS)
    assert [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS] == expected


def test_smollm_takes_digits_one_by_one(make):
    tokenizer = load_tokenizer(imported(make(pre="smollm")))
    assert tokenizer.tokenize("12345") == list("12345")


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
def test_bos_and_eos(make, llama_cpp, pre, flags):
    gguf = make(pre=pre, flags=flags)
    folder = imported(gguf)
    expected = run_tokenizer(llama_cpp.tool("llama-tokenize"), gguf, "Hello 42")
    assert load_tokenizer(folder).encode("Hello 42") == expected
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("Hello 42").ids == expected
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config.get("add_bos_token") == flags.get("add_bos_token", True if pre == "llama-bpe" else None)
    assert config.get("add_eos_token") == flags.get("add_eos_token")


def test_control_tokens_are_special_and_users_tokens_are_not(make, vocabulary):
    tokenizer = load_tokenizer(imported(make()))
    flags = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert flags == dict.fromkeys(CONTROL, True) | dict.fromkeys(USER_DEFINED, False)
    ids = tokenizer.encode("<think>ab<|im_end|>")
    assert [ids[0], ids[-1]] == [vocabulary["tokens"].index(text) for text in ("<think>", "<|im_end|>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>ab"


def test_mistyped_end_of_turn_is_control_as_in_llama_cpp(make, llama_cpp, vocabulary):
    tokens, types = vocabulary["tokens"] + ["<|eot_id|>"], vocabulary["types"] + [TokenType.NORMAL]
    gguf = make(tokens=tokens, types=types)
    text = "a<|eot_id|>b"
    expected = llama_ids(llama_cpp.tool("llama-tokenize"), gguf, [text])[0]
    assert len(expected) == 3
    assert load_tokenizer(imported(gguf)).encode(text) == expected


def test_bytes_without_a_token_are_dropped_but_keep_their_neighbours_apart(make, llama_cpp, vocabulary):
    used = {part for merge in vocabulary["merges"] for part in merge.split(" ")}
    lost = sorted(set("#$%&@GJKNOQRVXYZ") - used)
    tokens = [f"<unused{text}>" if text in lost else text for text in vocabulary["tokens"]]
    gguf = make(tokens=tokens)
    texts = [f"the{byte}quick{byte}{byte} t{byte}he 1{byte}2" for byte in lost]
    assert texts
    expected = llama_ids(llama_cpp.tool("llama-tokenize"), gguf, texts)
    tokenizer = load_tokenizer(imported(gguf))
    assert [tokenizer.encode(text) for text in texts] == expected


def test_same_bytes_in_any_folder_and_again(make):
    gguf = make()
    first, second = imported(gguf, name="one"), imported(gguf, name="another/longer name")
    (first / ".incomplete").mkdir()
    (first / "model-00001-of-00002.safetensors").write_bytes(b"left by an earlier import")
    imported(gguf, name="one")
    contents = {path.name: path.read_bytes() for path in first.iterdir()}
    assert contents == {path.name: path.read_bytes() for path in second.iterdir()}
    assert set(contents) == FILES
    assert not [name for name, data in contents.items() if str(gguf.parent).encode() in data]


def test_chat_template_is_the_same_in_both_places(make):
    folder = imported(make())
    assert (folder / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    messages = [{"role": "user", "content": "Hi"}]
    assert load_tokenizer(folder).apply_chat_template(messages, tokenize=False) == "<|im_start|>Hi\n"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_the_files_rounded_once(make, dtype):
    import torch
    from safetensors.torch import load_file

    gguf = make()
    folder = imported(gguf, dtype=dtype)
    weights = load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    names |= {"model.layers.1.mlp.down_proj": "blk.1.ffn_down", "model.layers.0.self_attn.v_proj": "blk.0.attn_v"}
    held = tensors(rows=weights["model.embed_tokens.weight"].shape[0], architecture="llama")
    for ours, theirs in names.items():
        expected = torch.from_numpy(held[f"{theirs}.weight"]).to(getattr(torch, dtype))
        assert torch.equal(weights[f"{ours}.weight"], expected)


@pytest.mark.slow
def test_converts_back_to_the_same_tokenizer(make, llama_cpp, vocabulary, tmp_path):
    count, again = len(vocabulary["tokens"]), tmp_path / "again.gguf"
    padding = [f"[PAD{i}]" for i in range(count, count + 5)]
    types = vocabulary["types"] + [TokenType.UNUSED] * len(padding)
    gguf = make(tokens=vocabulary["tokens"] + padding, types=types)
    # The converter knows a pre-tokenizer by the ids that a published vocabulary gives for a text, and cannot know
    # this test's vocabulary: it is told the name. All else it finds out by itself.
    told = (
        "import runpy, sys; from pathlib import Path; script = Path(sys.argv.pop(1));"
        "sys.path[:0] = [str(script.parent), str(script.parent / 'gguf-py')]; sys.argv[0] = str(script);"
        "from conversion.base import TextModel; TextModel.get_vocab_base_pre = lambda self, tokenizer: 'smollm';"
        "runpy.run_path(str(script), run_name='__main__')"
    )
    options = [imported(gguf), "--outtype", "f32", "--outfile", again]
    command = [sys.executable, "-c", told, llama_cpp.convert_script, *options]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    before, after = (GGUFReader(path) for path in (gguf, again))
    kept = [key for key in before.fields if key.startswith("tokenizer.")]
    assert sorted(kept) == sorted(key for key in after.fields if key.startswith("tokenizer."))
    for key in kept:
        assert before.fields[key].contents() == after.fields[key].contents(), key
    values = {tensor.name: tensor.data for tensor in before.tensors}
    assert values.keys() == {tensor.name for tensor in after.tensors}
    assert all(np.array_equal(values[tensor.name], tensor.data) for tensor in after.tensors)


def poison(weights: dict[str, np.ndarray]) -> None:
    weights["blk.0.ffn_up.weight"][0, 0] = 1e6  # beyond float16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "klingon"}, "'klingon' is not known here; known are .*smollm"),
        ({"model": None}, "no tokenizer in the file"),
        ({"model": "llama"}, r"'llama' \(SentencePiece\)"),
        ({"architecture": "rwkv6"}, "cannot load this GGUF of architecture 'rwkv6'"),
        ({"bos": None, "flags": {"add_bos_token": True}}, "wrapped in a bos_token"),
        ({"parts": 3}, "one of 3 parts"),
        ({"scaling": "yarn"}, r"rope scaling \(yarn\)"),
        ({"spoil": lambda w: w.pop("blk.1.ffn_up.weight")}, r"missing: model.layers.1.mlp.up_proj.weight"),
        ({"spoil": lambda w: w.update({"rope_freqs.weight": np.ones(4, np.float32)})}, "rope_freqs.weight"),
        ({"spoil": lambda w: w.update({"blk.0.attn_q.bias": np.ones(WIDTH, np.float32)})}, "would be lost"),
        ({"spoil": poison}, "layers.0.mlp.up_proj.weight has values that are not finite"),
    ],
)
def test_refuses_what_it_cannot_import_whole(make, tmp_path, changes, message):
    with pytest.raises(GgufImportError, match=message):
        imported(make(**changes), dtype="float16", name="out")
    assert list(tmp_path.glob("out/*")) == list(tmp_path.glob("out/.*")) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"PK\x03\x04" + data[4:], "not a GGUF file"),
        (lambda data: b"", "not a GGUF file"),
        (lambda data: data[:2000], "cut short or damaged"),
        (lambda data: data[:-100], "cut short or damaged"),
    ],
)
def test_refuses_damaged_files(make, tmp_path, damage, message):
    gguf = make()
    gguf.write_bytes(damage(gguf.read_bytes()))
    with pytest.raises(GgufImportError, match=message):
        imported(gguf, name="out")
    assert not (tmp_path / "out").exists()


def test_refuses_a_missing_file_and_an_unknown_dtype(make, tmp_path):
    with pytest.raises(GgufImportError, match="no such file"):
        import_gguf(gguf=tmp_path / "none.gguf", output=tmp_path / "out", dtype="float16")
    with pytest.raises(GgufImportError, match="float16, bfloat16, float32"):
        import_gguf(gguf=make(), output=tmp_path / "out", dtype="int8")
