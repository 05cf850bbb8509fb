"""Logits of a model as it was trained, judged by llama.cpp's own evaluator, by peft and by the trainer's own loss."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import training_runs as runs
from compute_logits import compute_logits
from conftest import ROOT
from convert_gguf import convert_gguf
from merge_adapter import merge_adapter
from small_disk import small_disk
from test_merge_oracle import CASES, tune

from lib.adapter_folder import CONFIG, WEIGHTS, write_adapter
from lib.four_bit import FourBitError
from lib.llama_cpp import LlamaCpp
from lib.logits_file import LogitsError, LogitsFile, encode, predictions, read_logits_file, write_logits_file
from lib.lora import LoraError
from lib.manifest import describe_files, write_folder_manifest
from lib.samples import IGNORED, Sample
from lib.trained_model import TrainedModelError

pytestmark = pytest.mark.slow

CHUNKS = 3
CHUNK_LINE = rf"^ +{CHUNKS} +[0-9.]+ .* (\S+) ± +\S+ +\S+ ± +\S+ % +(\S+) ± +\S+ %"


def llama_perplexity(llama_cpp: LlamaCpp, gguf: Path, *words: object, until: str) -> re.Match[str]:
    """What it printed; its status is always 0."""
    command = [llama_cpp.tool("llama-perplexity"), "--model", gguf, "--threads", "1", "--no-warmup", *words]
    command += ["--ctx-size", "512", "--batch-size", "512"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    found = re.search(until, done.stdout + done.stderr, re.M)
    assert found, done.stdout + done.stderr
    return found


def say_logits(llama_cpp: LlamaCpp, gguf: Path, text: Path, output: Path, *options: str) -> Path:
    """The logits of a GGUF, written by llama-perplexity."""
    words = ["--file", text, "--chunks", CHUNKS, "--kl-divergence-base", output, *options]
    llama_perplexity(llama_cpp, gguf, *words, until="calculating perplexity over")
    return output


@dataclass(frozen=True)
class Divergence:
    mean: float
    top1: float


def compare(llama_cpp: LlamaCpp, gguf: Path, logits: Path) -> Divergence:
    """How far a GGUF is from the logits of another model, by llama-perplexity."""
    words = ["--kl-divergence", "--kl-divergence-base", logits]
    found = llama_perplexity(llama_cpp, gguf, *words, until=CHUNK_LINE)
    return Divergence(float(found[1]), float(found[2]))


def compute(tokens: Path, output: Path, *, base: Path, adapter: Path | None, **changes: Any) -> Path:
    asked = {"base_manifest": None, "adapter_manifest": None, "base_weights": "trained", "device": "cpu", "gpus": []}
    compute_logits(**{**asked, "threads": 2, **changes}, base=base, adapter=adapter, tokens=tokens, output=output)
    return output


def log_probs(path: Path) -> np.ndarray:
    """(chunks, predictions, vocabulary), of a whole file."""
    read = read_logits_file(path)
    kept, width = predictions(read.context), 4 + read.vocabulary + read.vocabulary % 2
    rows = np.fromfile(path, "<u2", offset=20 + read.tokens.nbytes).reshape(read.chunks, kept, width)
    scale, least = rows[..., :4].copy().view("<f4")[..., 0], rows[..., :4].copy().view("<f4")[..., 1]
    return least[..., None] + scale[..., None] * rows[..., 4 : 4 + read.vocabulary].astype(np.float64)


@dataclass(frozen=True)
class Chain:
    """What the workflow built of the tiny model, by NF4, and files of it in 32 bits."""

    project: Path
    base: Path
    adapter: Path
    text: Path
    original: Path  # merged into the original weights
    nf4: Path  # and into those of its training
    untuned: Path
    tokens: Path


@pytest.fixture(scope="module")
def chain(built: Path, tiny_base: Path, llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder, adapter = tmp_path_factory.mktemp("chain"), built / "adapters/tiny"

    def gguf(name: str, adapter: Path | None, weights: str) -> Path:
        output = folder / name
        manifests = {"base_manifest": built / "bases/tiny/MANIFEST.json", "adapter_manifest": None}
        merge = {"dtype": "float32", "base_weights": weights, "max_shard_size": 1000, "threads": 2}
        merge_adapter(base=tiny_base, adapter=adapter, output=output, **manifests, **merge)
        command = [sys.executable, llama_cpp.convert_script, output, "--outtype", "f32"]
        subprocess.run([*command, "--outfile", f"{output}.gguf"], check=True, capture_output=True)
        return output.with_name(f"{name}.gguf")

    original = gguf("original", adapter, "original")
    text = tiny.write_text(folder / "text.txt")
    return Chain(
        project=built,
        base=tiny_base,
        adapter=adapter,
        text=text,
        original=original,
        nf4=gguf("nf4", adapter, "nf4"),
        untuned=gguf("untuned", None, "original"),
        tokens=say_logits(llama_cpp, original, text, folder / "tokens"),
    )


def test_transformers_and_llama_perplexity_write_the_same(chain: Chain, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """Of the same weights in 32 bits: the one from base and adapter, the other from the merged file."""
    # As llama.cpp keeps keys and values by itself, in 16 bits, it is up to 4 steps of the codes.
    exact = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
    tokens = say_logits(llama_cpp, chain.original, chain.text, tmp_path / "tokens", *exact)
    found = compute(tokens, tmp_path / "ours", base=chain.base, adapter=chain.adapter, base_weights="original")
    ours, theirs = log_probs(found), log_probs(tokens)
    assert ours.shape == (CHUNKS, 255, tiny.SHAPE["vocab_size"])
    step = (theirs.max(axis=-1) - theirs.min(axis=-1)) / 65535
    steps = np.abs(ours - theirs) / step[..., None]
    assert steps.max() <= 1.1 and steps.mean() < 0.05  # 1.015 and 0.007 were seen
    assert (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).all()
    header = 20 + 4 * CHUNKS * 512
    assert found.read_bytes()[:header] == tokens.read_bytes()[:header]


def test_what_was_trained_is_nearest_to_the_merge_onto_its_weights(
    chain: Chain, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    places = {"base": chain.base, "adapter": chain.adapter}
    for weights, nearest, other in (("original", chain.original, chain.nf4), ("nf4", chain.nf4, chain.original)):
        ours = compute(chain.tokens, tmp_path / weights, **places, base_weights=weights)
        near, far, untuned = (compare(llama_cpp, each, ours) for each in (nearest, other, chain.untuned))
        print(f"against the adapter on {weights}: {near}; merged into the other weights: {far}; untuned: {untuned}")
        assert abs(near.mean) <= 1e-5 and near.top1 > 99.5
        assert 1e-4 < far.mean < untuned.mean / 10
        assert untuned.mean > 0.03
    # The chain trains by qlora.
    trained = compute(chain.tokens, tmp_path / "trained", **places)
    assert trained.read_bytes() == (tmp_path / "nf4").read_bytes() != (tmp_path / "original").read_bytes()


def test_the_file_of_the_workflow_is_what_was_trained(chain: Chain, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """In 16 bits, as models/{model}.f16.gguf is."""
    f16 = chain.project / "models/tiny.f16.gguf"
    tokens = say_logits(llama_cpp, f16, chain.text, tmp_path / "tokens")
    ours = compute(tokens, tmp_path / "ours", base=chain.base, adapter=chain.adapter, base_weights="original")
    found = compare(llama_cpp, f16, ours)
    assert abs(found.mean) <= 2e-5 and found.top1 > 99


def test_a_vocabulary_that_begins_no_text(chain: Chain, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """Of the tiny one, which does so by the kind of its tokenizer, a base whose config says that it does not."""
    assert (read_logits_file(chain.tokens).tokens[:, 0] == [1, *read_logits_file(chain.tokens).tokens[1:, 0]]).all()
    base = tmp_path / "base"
    shutil.copytree(chain.base, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    adapter = adapt(base, tmp_path / "adapter", method="lora", precision="fp32")
    merge = {"dtype": "float16", "max_shard_size": 1000, "threads": 2}
    merge_adapter(
        base=base, base_manifest=None, adapter=adapter, adapter_manifest=None, output=tmp_path / "merged", **merge
    )
    gguf = {"checkpoint": tmp_path / "merged", "manifest": None, "artifact": "merged", "name": "tiny"}
    convert_gguf(**gguf, outtype="f16", output=tmp_path / "m.gguf", llama_cpp=llama_cpp, threads=2)
    tokens = say_logits(llama_cpp, tmp_path / "m.gguf", chain.text, tmp_path / "tokens")
    assert read_logits_file(tokens).tokens[0, 0] != 1
    found = compare(llama_cpp, tmp_path / "m.gguf", compute(tokens, tmp_path / "ours", base=base, adapter=adapter))
    assert abs(found.mean) <= 2e-5 and found.top1 > 99


def adapt(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter of random factors, as train_adapter.py leaves it."""
    run = runs.settings(**settings)
    model = runs.adapted(base, run)
    folder.mkdir()
    write_adapter(model, folder, base_name="tiny-llama")
    origin = {"base": None, "settings": {"method": run.method, "precision": run.precision}}
    for key in ("offload", "quantization"):
        origin["settings"] |= {key: settings[key]} if key in settings else {}
    if four_bit := model.get_base_model().four_bit:
        origin["four_bit"] = four_bit
    return describe(folder, origin)


def describe(folder: Path, origin: dict[str, Any]) -> Path:
    files = describe_files(folder, [CONFIG, WEIGHTS], threads=1)
    write_folder_manifest(folder, artifact="adapter", files=files, origin=origin)
    return folder


def random_tokens(path: Path, *, vocabulary: int = 384, chunks: int = 2, context: int = 64) -> LogitsFile:
    """A file of which the tokens count; none of them begins a text."""
    tokens = np.random.default_rng(3).integers(4, min(vocabulary, 380), (chunks, context), dtype=np.int32)
    like = LogitsFile(path, vocabulary, tokens)
    write_logits_file(path, like=like, logits=[np.zeros((predictions(context), vocabulary), np.float32)] * chunks)
    return like


METHODS = {
    "fp32": {"method": "lora", "precision": "fp32"},
    "bf16": {"method": "lora", "precision": "bf16"},
    "nf4": {"method": "qlora", "precision": "bf16"},
    "nf4, single": {"method": "qlora", "precision": "fp32", "quantization": {"bnb_4bit_use_double_quant": False}},
    "nf4, head": {"method": "qlora", "precision": "fp32", "quantization": {"llm_int8_skip_modules": ["up_proj"]}},
    "int8": {"method": "int8", "precision": "bf16"},
    "streamed": {"method": "lora", "precision": "fp32", "offload": {"use_disk_offload": True}},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_the_logits_is_that_of_training(name: str, tiny_base: Path, tmp_path: Path) -> None:
    """By the trainer's own evaluation of the same tokens."""
    settings = METHODS[name]
    like = random_tokens(tmp_path / "tokens")
    adapter = adapt(tiny_base, tmp_path / "adapter", **settings)
    found = log_probs(compute(tmp_path / "tokens", tmp_path / "ours", base=tiny_base, adapter=adapter))
    kept = like.context - predictions(like.context)
    ours = -np.take_along_axis(found, like.tokens[:, kept:, None].astype(np.int64), axis=2).mean()
    samples = [Sample(row, [IGNORED] * kept + row[kept:], 0, (len(row),)) for row in like.tokens.tolist()]
    plain = {key: value for key, value in settings.items() if key != "offload"}
    trainer = runs.trainer(tiny_base, tmp_path / "run", runs.settings(**plain), eval_dataset=samples)
    expected = trainer.evaluate()["eval_loss"]
    other = compute(tmp_path / "tokens", tmp_path / "other", base=tiny_base, adapter=None)
    untuned = -np.take_along_axis(log_probs(other), like.tokens[:, kept:, None].astype(np.int64), axis=2).mean()
    assert abs(ours - expected) < 2e-5 < abs(untuned - expected) / 10
    assert not list(tmp_path.glob("modelmill-offload-*"))


ADAPTERS = (
    "plain",
    "rsLoRA",
    "DoRA",
    "patterns",
    "orthogonal",
    "bias all",
    "saved embedding and head",
    "saved norm",
    "tokens",
    "tied, embedding",
    "tied, tokens",
    "grown",
    "grown, embedding and head",
    "grown, saved",
    "grown, tied, tokens",
)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_every_form_are_what_peft_trained(name: str, tiny_base: Path, tmp_path: Path) -> None:
    right = tune(CASES[name], tmp_path)
    for each in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_base / each, right.base / each)
    logits = right.logits.detach().numpy()
    like = LogitsFile(tmp_path / "tokens", logits.shape[2], right.tokens.numpy().astype(np.int32))
    expected = logits[:, 20:39]
    write_logits_file(tmp_path / "tokens", like=like, logits=expected)
    found = compute(tmp_path / "tokens", tmp_path / "ours", base=right.base, adapter=right.adapter)
    ours, theirs = log_probs(found), log_probs(tmp_path / "tokens")
    step = (theirs.max() - theirs.min()) / 65535
    assert np.abs(ours - theirs).max() <= 2 * step + 2e-6
    assert encode(expected[0]).tobytes() in (tmp_path / "tokens").read_bytes()


def test_an_imported_adapter_that_says_how_its_base_was_held(tiny_base: Path, tmp_path: Path) -> None:
    """import_adapter.py keeps no settings but these."""
    random_tokens(tmp_path / "tokens")
    settings = {
        "method": "qlora",
        "precision": "fp32",
        "quantization": {"llm_int8_skip_modules": ["lm_head", "up_proj"]},
    }
    adapter = adapt(tiny_base, tmp_path / "adapter", **settings)
    own = compute(tmp_path / "tokens", tmp_path / "own", base=tiny_base, adapter=adapter).read_bytes()
    manifest = json.loads((adapter / "MANIFEST.json").read_text())
    describe(adapter, {"kind": "path", "four_bit": manifest["origin"]["four_bit"]})
    for weights in ("trained", "nf4"):
        found = compute(tmp_path / "tokens", tmp_path / weights, base=tiny_base, adapter=adapter, base_weights=weights)
        assert found.read_bytes() == own
    manifest["origin"]["four_bit"]["layers"] += 1
    describe(adapter, {"four_bit": manifest["origin"]["four_bit"]})
    with pytest.raises(TrainedModelError, match="held otherwise than in training"):
        compute(tmp_path / "tokens", tmp_path / "out", base=tiny_base, adapter=adapter)
    assert not (tmp_path / "out").exists()


def test_rows_that_no_token_has_are_left_out(tiny_base: Path, tmp_path: Path) -> None:
    """As a converter leaves out rows that fill up the last block: the first columns of the same logits."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    like = random_tokens(tmp_path / "whole")
    whole = log_probs(compute(like.path, tmp_path / "ours", base=base, adapter=None))
    tokens = json.loads((base / "tokenizer.json").read_text())
    last = max(tokens["model"]["vocab"], key=tokens["model"]["vocab"].get)
    del tokens["model"]["vocab"][last]
    tokens["model"]["merges"] = [pair for pair in tokens["model"]["merges"] if last not in (*pair, "".join(pair))]
    (base / "tokenizer.json").write_text(json.dumps(tokens))
    fewer = replace(like, path=tmp_path / "fewer", vocabulary=383, tokens=like.tokens)
    blocks = [np.zeros((predictions(like.context), 383), np.float32)] * like.chunks
    write_logits_file(fewer.path, like=fewer, logits=blocks)
    found = log_probs(compute(fewer.path, tmp_path / "less", base=base, adapter=None))
    left = whole[..., :383] - np.log(np.exp(whole[..., :383]).sum(axis=-1, keepdims=True))
    assert found.shape[-1] == 383 and np.abs(found - left).max() < 1e-3


def test_what_does_not_belong_together(tiny_base: Path, tmp_path: Path) -> None:
    adapter = adapt(tiny_base, tmp_path / "adapter", method="lora")
    random_tokens(tmp_path / "tokens")

    def attempt(error: type[Exception], said: str, *, tokens: str = "tokens", **changes: Any) -> None:
        places = {"base": tiny_base, "adapter": adapter, **changes}
        with pytest.raises(error, match=said):
            compute(tmp_path / tokens, tmp_path / "out", **places)
        assert not (tmp_path / "out").exists()

    attempt(LogitsError, "is missing", tokens="nothing")
    attempt(LogitsError, "is no file of logits", tokens="adapter/adapter_config.json")
    for vocabulary in (300, 385):
        random_tokens(tmp_path / "other", vocabulary=vocabulary)
        attempt(LogitsError, f"vocabulary of {vocabulary} tokens, and the model has 384", tokens="other")
    attempt(FourBitError, "train it with method: qlora", base_weights="nf4")
    attempt(FourBitError, "there is no adapter", base_weights="nf4", adapter=None)
    attempt(TrainedModelError, "does not say that its base was held in 8 bits", base_weights="int8")
    other = tiny.write_tiny_base(tmp_path / "other-base", seed=7)
    describe(adapter, {"base": {"digest": "d" * 64, "origin": None}})
    attempt(TrainedModelError, "was not trained on .*other-base: its manifest names a base of digest dddd", base=other)
    config = json.loads((adapter / CONFIG).read_text())
    for targets, error, said in (
        (["q_proj", "k_proj"], TrainedModelError, "has factors that its config puts nowhere, first .*layers.0"),
        ([*config["target_modules"], "lm_head"], LoraError, "does not fit this base:\n.*no pair of factors"),
    ):
        (adapter / CONFIG).write_text(json.dumps({**config, "target_modules": targets}))
        describe(adapter, {})
        attempt(error, said)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts/compute_logits.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr, done.stderr
    return done


def test_on_the_command_line(tiny_base: Path, tmp_path: Path) -> None:
    import torch

    random_tokens(tmp_path / "tokens", chunks=8)
    words = ["--base", tiny_base, "--tokens", tmp_path / "tokens", "--threads", 1]
    done = run(*words, "--output", tmp_path / "out", "--log", tmp_path / "log")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").stat().st_size == (tmp_path / "tokens").stat().st_size
    assert "UserWarning" not in done.stderr and "wrote" in (tmp_path / "log").read_text()
    with small_disk(tmp_path / "disk", kib=128) as disk:
        done = run(*words, "--output", disk / "out")
        assert done.returncode == 1 and "MB are free there: free some space" in done.stderr, done.stderr
        assert not list(disk.iterdir())
    if not torch.cuda.is_available():
        done = run(*words, "--output", tmp_path / "gpu", "--gpus", "24")
        assert done.returncode == 1 and "the device is cuda, but there is no usable GPU" in done.stderr, done.stderr


def test_a_disk_that_fills_up_meanwhile(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_tokens(tmp_path / "tokens", chunks=8)
    monkeypatch.setattr("compute_logits._check_room", lambda *_: None)
    with small_disk(tmp_path / "disk", kib=128) as disk:
        with pytest.raises(OSError, match="No space left"):
            compute(tmp_path / "tokens", disk / "out", base=tiny_base, adapter=None)
        assert not list(disk.iterdir())
