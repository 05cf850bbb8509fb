"""Training data as llama.cpp takes them: what training sees, divided as training divides it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import training_runs as runs
import yaml
from compute_imatrix import compute_imatrix
from conftest import ROOT, copy_built, run_snakemake
from render_data import render_data
from test_rebuild import plan, set_in_config

from lib.calibration import CalibrationError, identify_text
from lib.llama_cpp import LlamaCpp
from lib.training import prepare_samples

CHUNKS = 2
NAMES = ("training.txt", "held_out.json", "rendered.json")


def render(base: Path, data: Path, **changes: Any) -> tuple[str, list[list[int]], dict[str, Any]]:
    """The text, the tokens that are held out, and what was written down of them."""
    folder = data.parent
    settings = {"eval_data": None, "eval_fraction": 0.0, "max_length": 1024, "seed": 0, **changes}
    paths = dict(zip(("output", "held_out", "identity"), (folder / name for name in NAMES), strict=True))
    render_data(base=base, data=data, **settings, **paths)
    text, held_out, facts = (path.read_bytes().decode() for path in paths.values())
    return text, json.loads(held_out), json.loads(facts)


def rendered_by_transformers(base: Path, pairs: list[tuple[str, str]]) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    talks = ([{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in pairs)
    return "".join(tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks)


def tokens_by_transformers(base: Path, pair: tuple[str, str]) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    text = rendered_by_transformers(base, [pair])
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_every_sample_is_as_the_chat_template_renders_it(tiny_base: Path, tmp_path: Path) -> None:
    text, held_out, facts = render(tiny_base, tiny.write_data(tmp_path / "train.jsonl"))
    assert text == rendered_by_transformers(tiny_base, tiny.CONVERSATIONS)
    assert held_out == []
    read = text.encode()
    assert facts["training"]["size"] == len(read)
    assert facts["training"]["sha256"] == hashlib.sha256(read).hexdigest()
    assert facts["training"]["samples"] == len(tiny.CONVERSATIONS)
    assert (facts["held_out"]["samples"], facts["held_out"]["tokens"]) == (0, 0)


@pytest.mark.parametrize("packing", [False, True])
def test_it_is_divided_as_in_training(packing: bool, tiny_base: Path, tmp_path: Path) -> None:
    """The tokens that a run would take, decoded; samples that are packed stand in another order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base, local_files_only=True)
    data = tiny.write_data(tmp_path / "train.jsonl", repeats=2)
    for seed in (0, 1, 2):
        settings = runs.settings(data=str(data), eval_fraction=0.3, seed=seed, max_length=60, packing=packing)
        parts = prepare_samples(tiny_base, settings)
        assert [sum(len(row.lengths) for row in part) for part in parts] == [8, 4]
        text, held_out, facts = render(tiny_base, data, eval_fraction=0.3, seed=seed, max_length=60)
        for part, name in zip(parts, ("training", "held_out"), strict=True):
            assert facts[name]["tokens"] == sum(len(row.input_ids) for row in part)
        assert held_out == [row.input_ids for row in parts[1]]
        decoded = [tokenizer.decode(row.input_ids) for row in parts[0]]
        if packing:
            marks = [[each for each in whole.split("<s>") if each] for whole in (text, "".join(decoded))]
            assert sorted(marks[0]) == sorted(marks[1])
        else:
            assert text == "".join(decoded).replace("\ufffd", "")


def test_data_that_are_held_out_by_a_file_of_their_own(tiny_base: Path, tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "train.jsonl")
    (tmp_path / "held.jsonl").write_text('{"question": "Who?", "answer": "Nobody."}\n')
    text, held_out, facts = render(tiny_base, data, eval_data=tmp_path / "held.jsonl")
    assert text == rendered_by_transformers(tiny_base, tiny.CONVERSATIONS)
    assert held_out == [tokens_by_transformers(tiny_base, ("Who?", "Nobody."))]
    assert facts["held_out"]["samples"] == 1


def test_line_ends_and_texts_are_not_touched(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "One\\r\\ntwo\\\\n  "}\n{"text": "東京"}\n', encoding="utf-8")
    assert render(tiny_base, tmp_path / "train.jsonl")[0] == "One\r\ntwo\\n  <|im_end|>東京<|im_end|>"


def test_the_script_works_without_torch(tiny_base: Path, tmp_path: Path) -> None:
    tiny.write_data(tmp_path / "train.jsonl")
    words = ["render_data.py", "--base", str(tiny_base), "--data", "train.jsonl"]
    words += ["--output", NAMES[0], "--held-out", NAMES[1], "--identity", NAMES[2]]
    code = f"import sys; sys.modules['torch'] = None; sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
    code += f"sys.argv = {words!r}; import render_data; render_data.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / NAMES[0]).read_text() == rendered_by_transformers(tiny_base, tiny.CONVERSATIONS)


def test_the_identity_of_a_text_says_what_it_is_made_of(tiny_base: Path, tmp_path: Path) -> None:
    render(tiny_base, tiny.write_data(tmp_path / "train.jsonl", repeats=10), eval_fraction=0.5)
    training, _, rendered = (tmp_path / name for name in NAMES)
    plain = identify_text(training)
    assert identify_text(training, rendered=rendered) == {**plain, "made_of": "training data"}
    training.write_bytes(training.read_bytes() + b"a")
    with pytest.raises(
        CalibrationError, match="training.txt is not the text that .*rendered.json is of; run render_data"
    ):
        identify_text(training, rendered=rendered)


def test_too_few_tokens_are_told_before_there_is_a_model(tiny_base: Path, tmp_path: Path) -> None:
    """Its bytes would do."""
    facts = render(tiny_base, tiny.write_data(tmp_path / "train.jsonl", repeats=2))[2]["training"]
    assert facts["tokens"] < 1022 <= facts["size"]
    with pytest.raises(CalibrationError) as refused:
        identify_text(tmp_path / NAMES[0], rendered=tmp_path / NAMES[2])
    assert str(refused.value) == (
        f"{tmp_path}/training.txt is too short: {facts['tokens']} tokens, and 1024 (two chunks of 512) are the least; "
        "give more training data, or set imatrix.text to a text file"
    )


# The chain.
MATRIX, QUANTIZED = "models/tiny.imatrix.gguf", "models/tiny.q4_k_m.gguf"
RENDERED = {("render_data", "work/tiny/training.txt")}
CHECKED = {("check_calibration", "work/tiny/calibration.json")}
COMPUTED = {("compute_imatrix", MATRIX), ("quantize_gguf", QUANTIZED)}


@pytest.fixture(scope="module")
def weighed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the built folder in which there are more data, and a matrix was computed on them."""
    project, checkout = copy_built(built, tmp_path_factory.mktemp("rendered") / "place")
    tiny.write_data(project / "train.jsonl", repeats=10)
    set_in_config("models", "tiny", "adapter", "train", "eval_fraction", value=0.2)(project, checkout)
    set_in_config("models", "tiny", "adapter", "train", "max_steps", value=1)(project, checkout)
    matrix = {"text": "training", "chunks": CHUNKS}
    set_in_config("models", "tiny", "quantize", "imatrix", value=matrix)(project, checkout)
    done = run_snakemake(project, "-j1", QUANTIZED, checkout=checkout)
    assert done.returncode == 0, done.stderr
    assert plan(project, checkout, QUANTIZED) == set()
    return project


@pytest.mark.slow
def test_the_matrix_says_that_it_was_made_of_training_data(weighed: Path) -> None:
    text = (weighed / "work/tiny/training.txt").read_bytes()
    read = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest(), "made_of": "training data"}
    assert json.loads((weighed / f"{MATRIX}.json").read_text())["origin"]["text"] == read
    assert json.loads((weighed / "work/tiny/calibration.json").read_text()) == read
    quantized = json.loads((weighed / f"{QUANTIZED}.json").read_text())
    assert quantized["origin"]["imatrix"]["origin"]["text"] == read
    facts = json.loads((weighed / "work/tiny/rendered.json").read_text())
    assert (facts["training"]["samples"], facts["held_out"]["samples"]) == (48, 12)


@pytest.mark.slow
def test_llama_cpp_reads_the_tokens_that_were_trained_on(weighed: Path, llama_cpp: LlamaCpp) -> None:
    """By its own tokenizer, special tokens read as llama-imatrix is told to read them."""
    base = Path(_config(weighed)["models"]["tiny"]["base"]["path"])
    train = _config(weighed)["models"]["tiny"]["adapter"]["train"]
    settings = runs.settings(data=str(weighed / "train.jsonl"), eval_fraction=train["eval_fraction"])
    expected = [token for sample in prepare_samples(base, settings)[0] for token in sample.input_ids]
    command = [llama_cpp.tool("llama-tokenize"), "-m", weighed / "models/tiny.f16.gguf", "--ids", "--log-disable"]
    command += ["-f", weighed / "work/tiny/training.txt", "--no-bos", "--no-escape"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(done.stdout.strip().splitlines()[-1]) == expected, done.stderr


@pytest.mark.slow
def test_special_tokens_are_read_as_such(weighed: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """Else the same text would give another matrix, of more chunks."""
    text, rendered = weighed / "work/tiny/training.txt", weighed / "work/tiny/rendered.json"
    shared = {"source": weighed / "models/tiny.f16.gguf", "text": text, "chunks": 1000, "threads": 2}
    used = [
        compute_imatrix(**shared, output=tmp_path / f"{number}.gguf", llama_cpp=llama_cpp, rendered=given)["origin"]
        for number, given in enumerate((rendered, None))
    ]
    tokens = json.loads(rendered.read_text())["training"]["tokens"]
    assert used[0]["chunks"] == (tokens + 1) // 512 < used[1]["chunks"]
    assert "made_of" not in used[1]["text"]


def _config(project: Path) -> dict[str, Any]:
    return yaml.safe_load((project / "config.yaml").read_text(encoding="utf-8"))


def change_a_word(project: Path, checkout: Path) -> None:
    path = project / "train.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("Two of", "Six of", 1), encoding="utf-8")


RETRAINED = {
    ("train_adapter", "adapters/tiny/MANIFEST.json"),
    ("merge_adapter", "models/tiny/merged/MANIFEST.json"),
    ("convert_gguf", "models/tiny.f16.gguf"),
}
TRAIN = ("models", "tiny", "adapter", "train")
TABLE: dict[str, tuple[Callable[[Path, Path], None], set[tuple[str, str]]]] = {
    "a word of the data": (
        change_a_word,
        {("check_data", "work/tiny/data.json"), *RENDERED, *CHECKED, *COMPUTED, *RETRAINED},
    ),
    "the data's time": (lambda project, checkout: os.utime(project / "train.jsonl"), set()),
    "the text's time": (lambda project, checkout: os.utime(project / "work/tiny/training.txt"), set()),
    "where it is cut": (
        set_in_config(*TRAIN, "max_length", value=500),
        {*RENDERED, *CHECKED, *COMPUTED, *RETRAINED},
    ),
    "the learning rate": (set_in_config(*TRAIN, "learning_rate", value=0.02), {*COMPUTED, *RETRAINED}),
    "the number of chunks": (set_in_config("models", "tiny", "quantize", "imatrix", "chunks", value=1), COMPUTED),
}


@pytest.mark.slow
@pytest.mark.parametrize("edited", TABLE)
def test_edit_reruns_exactly(edited: str, weighed: Path, tmp_path: Path) -> None:
    edit, expected = TABLE[edited]
    project, checkout = copy_built(weighed, tmp_path / "copy")
    edit(project, checkout)
    assert plan(project, checkout, QUANTIZED) == expected


@pytest.mark.slow
def test_data_that_are_too_few_are_refused_before_the_training(project: Path) -> None:
    set_in_config("models", "tiny", "quantize", "imatrix", value={"text": "training"})(project, project)
    done = run_snakemake(project, "-j1", QUANTIZED)
    assert done.returncode == 1
    assert "give more training data, or set imatrix.text to a text file" in done.stderr
    assert not (project / "adapters/tiny").exists()


@pytest.mark.slow
def test_a_file_of_the_keywords_name(project: Path) -> None:
    tiny.write_text(project / "training")
    set_in_config("models", "tiny", "quantize", "imatrix", value={"text": "./training"})(project, project)
    planned = {rule for rule, _ in plan(project, ROOT, QUANTIZED)}
    assert "check_calibration" in planned and "render_data" not in planned
