"""GGUF files made here, imported: the weights, the exact files, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from gguf import GGUFReader, TokenType
from tiny_gguf import WIDTH, imported, tensors

from lib.gguf_file import GgufError
from lib.gguf_import import import_gguf
from lib.gguf_tokenizer import GgufImportError

FILES = {
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


def test_same_bytes_in_any_folder_and_again(make_gguf):
    gguf = make_gguf()
    first, second = imported(gguf, name="one"), imported(gguf, name="another/longer name")
    left = first.with_name(".one.partial")
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"left by an interrupted import")
    shutil.rmtree(first)
    imported(gguf, name="one")
    contents = {path.name: path.read_bytes() for path in first.iterdir()}
    assert contents == {path.name: path.read_bytes() for path in second.iterdir()}
    assert set(contents) == FILES
    assert not left.exists()
    assert not [name for name, data in contents.items() if str(gguf.parent).encode() in data]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_the_files_rounded_once(make_gguf, dtype):
    import torch
    from safetensors.torch import load_file

    gguf = make_gguf()
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
def test_converts_back_to_the_same_tokenizer(make_gguf, llama_cpp, vocabulary, tmp_path):
    count, again = len(vocabulary["tokens"]), tmp_path / "again.gguf"
    padding = [f"[PAD{i}]" for i in range(count, count + 5)]
    types = vocabulary["types"] + [TokenType.UNUSED] * len(padding)
    gguf = make_gguf(tokens=vocabulary["tokens"] + padding, types=types)
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
def test_refuses_what_it_cannot_import_whole(make_gguf, tmp_path, changes, message):
    with pytest.raises(GgufImportError, match=message):
        imported(make_gguf(**changes), dtype="float16", name="out")
    assert list(tmp_path.glob("out/*")) == list(tmp_path.glob("out/.*")) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"PK\x03\x04" + data[4:], "no GGUF file"),
        (lambda data: b"", "it is empty"),
        (lambda data: data[:2000], "cut off or damaged"),
        (lambda data: data[:-100], "cut off or damaged"),
    ],
)
def test_refuses_damaged_files(make_gguf, tmp_path, damage, message):
    gguf = make_gguf()
    gguf.write_bytes(damage(gguf.read_bytes()))
    with pytest.raises(GgufError, match=message):
        imported(gguf, name="out")
    assert not (tmp_path / "out").exists()


def test_refuses_a_missing_file_and_an_unknown_dtype(make_gguf, tmp_path):
    with pytest.raises(GgufError, match="no such file"):
        import_gguf(gguf=tmp_path / "none.gguf", output=tmp_path / "out", dtype="float16")
    with pytest.raises(GgufImportError, match="float16, bfloat16, float32"):
        import_gguf(gguf=make_gguf(), output=tmp_path / "out", dtype="int8")
