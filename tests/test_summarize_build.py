"""The summary of a build, on a made-up folder: every line of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from summarize_build import SummaryError, summarize_build

SIZES = {
    "adapters/tiny/adapter_model.safetensors": 120_000,
    "adapters/tiny/adapter_config.json": 345,
    "models/tiny/merged/model-00001-of-00002.safetensors": 1_500_000,
    "models/tiny/merged/model-00002-of-00002.safetensors": 1_460_000,
    "models/tiny.q4_k_m.gguf": 99_999,
    "models/tiny.q4_k_m.gguf.json": 400,
    "models/tiny.base.q4_k_m.gguf": 100_000,
    "models/tiny.Modelfile": 75,
    "models/tiny.q8_0.Modelfile": 76,
    # Of models whose names begin alike.
    "adapters/tiny2/adapter_model.safetensors": 1,
    "models/tiny2.q4_k_m.gguf": 1,
    "models/tiny2.Modelfile": 1,
    "models/tiny-chat.Modelfile": 1,
}
STEPS = {
    "build_llama_cpp": 61.4,
    "tiny/train_adapter": 118.6,
    "tiny/quantize_gguf.q4_k_m": 0.3,
    "tiny2/train_adapter": 9000.0,
}
BUILT = """
tiny: built in 3 min 00 s"""
SIZED = """
     0.1 MB  adapters/tiny
     3.0 MB  models/tiny/merged
     0.1 MB  models/tiny.base.q4_k_m.gguf
    99999 B  models/tiny.q4_k_m.gguf
       75 B  models/tiny.Modelfile
       76 B  models/tiny.q8_0.Modelfile"""
STEPPED = """
steps:
  1 min 01 s  build_llama_cpp
  1 min 59 s  train_adapter
        0 s  quantize_gguf.q4_k_m"""
ANSWERED = """
held-out questions answered rightly: 2 of 3, before tuning 1
  question  Who builds it?
  before    No idea, no idea, no idea, no idea, no idea, no idea, no idea, no…
  after     Snakemake builds it."""
FROM_DOCUMENTS = """
questions answered from documents: 2 of 3, without them 1
  question  Where?
  answer    In the folder logs.
  source    logs.md"""
OLLAMA = """
to talk to it with Ollama:
  ollama create tiny -f models/tiny.Modelfile
  ollama run tiny"""

REGISTERED = """
to talk to it, where it is registered with Ollama:
  ollama run me/tiny:x"""


def write_artifacts(folder: Path) -> Path:
    """Files of the sizes above, and nothing about how they were made."""
    for name, size in SIZES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))
    return folder


def write_steps(folder: Path) -> None:
    """Benchmark files as Snakemake writes them; a step that was repeated has a line for each time."""
    for ended, (name, seconds) in enumerate(STEPS.items()):
        path = folder / "logs" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"s": 9999.0, "h:m:s": "x"}}\n{{"s": {seconds}, "h:m:s": "x"}}\n')
        os.utime(path, (ended, ended))


def write_answers(folder: Path, *, better: bool) -> None:
    """A smoke report; the second question is the first that only the tuned model answers."""
    answers = [
        ("Which type?", "q4_k_m", True, "q4_k_m", True),
        ("Who builds it?", "No idea,\n" + "no idea,\n" * 11, False, "Snakemake\n builds it.", better),
        ("How many?", "Two.", False, "Three.", False),
    ]
    rows = [
        {"question": question, "base": {"answer": a, "right": x}, "tuned": {"answer": b, "right": y}}
        for question, a, x, b, y in answers
    ]
    report = {"asked": 3, "right": {"base": 1, "tuned": 1 + better}, "questions": rows}
    (folder / "reports").mkdir(exist_ok=True)
    (folder / "reports/tiny.smoke.json").write_text(json.dumps(report))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which `tiny` and two models of similar names are built, one with its steps and answers."""
    write_steps(write_artifacts(tmp_path))
    write_answers(tmp_path, better=True)
    return tmp_path


def summarize(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/summarize_build.py"), "--model", "tiny", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_everything(folder: Path) -> None:
    done = summarize(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == BUILT + SIZED + STEPPED + ANSWERED + OLLAMA + "\n"
    assert summarize(folder.parent, "--folder", str(folder)).stdout == done.stdout


def test_answers_from_documents(folder: Path) -> None:
    passages = [{"source": "logs.md", "heading": "", "text": "Logs lie in the folder logs."}]
    rows = [
        {"question": question, "passages": passages, "with": {"answer": said, "right": x}, "without": {"right": y}}
        for question, said, x, y in [("Who?", "I.", True, True), ("Where?", "In the\nfolder logs.", True, False)]
    ]
    report = {"asked": 3, "right": {"with": 2, "without": 1}, "questions": rows}
    (folder / "reports/tiny.rag.json").write_text(json.dumps(report))
    assert summarize(folder).stdout == BUILT + SIZED + STEPPED + ANSWERED + FROM_DOCUMENTS + OLLAMA + "\n"
    del rows[1]
    (folder / "reports/tiny.rag.json").write_text(json.dumps(report))
    counts = FROM_DOCUMENTS.partition("\n  question")[0]
    assert summarize(folder).stdout == BUILT + SIZED + STEPPED + ANSWERED + counts + OLLAMA + "\n"


@pytest.mark.parametrize(("registered", "end"), [("ab", REGISTERED), ("cd", OLLAMA)])
def test_what_is_registered_need_not_be_created(registered: str, end: str, folder: Path) -> None:
    """As long as it is these weights."""
    (folder / "models/tiny.q4_k_m.gguf.json").write_text('{"sha256": "ab"}')
    (folder / "models/tiny.base.q4_k_m.gguf.json").write_text('{"sha256": "ef"}')
    (folder / "ollama").mkdir()
    (folder / "ollama/tiny.json").write_text(json.dumps({"name": "me/tiny:x", "weights": {"sha256": registered}}))
    assert summarize_build(model="tiny", folder=folder) == BUILT + SIZED + STEPPED + ANSWERED + end


def test_after_make_clean_no_time_is_told(folder: Path) -> None:
    shutil.rmtree(folder / "logs")
    assert summarize_build(model="tiny", folder=folder) == "\ntiny: built" + SIZED + ANSWERED + OLLAMA


def test_without_questions_there_are_no_answers(folder: Path) -> None:
    (folder / "reports/tiny.smoke.json").unlink()
    assert summarize_build(model="tiny", folder=folder) == BUILT + SIZED + STEPPED + OLLAMA


def test_without_a_question_that_tuning_mended_there_is_no_example(folder: Path) -> None:
    write_answers(folder, better=False)
    counts = "\nheld-out questions answered rightly: 1 of 3, before tuning 1"
    assert summarize_build(model="tiny", folder=folder) == BUILT + SIZED + STEPPED + counts + OLLAMA


def test_without_a_modelfile_of_the_default_type_ollama_is_not_mentioned(folder: Path) -> None:
    (folder / "models/tiny.Modelfile").unlink()
    left = SIZED.replace("\n       75 B  models/tiny.Modelfile", "")
    assert summarize_build(model="tiny", folder=folder) == BUILT + left + STEPPED + ANSWERED


@pytest.mark.parametrize("name", ["tin", "iny", "tiny.q4_k_m", "chat", "Tiny"])
def test_a_model_of_a_similar_name_is_not_built(name: str, folder: Path) -> None:
    with pytest.raises(SummaryError, match=f"^nothing of {name} is built in "):
        summarize_build(model=name, folder=folder)


def test_nothing_built_is_an_error_in_one_line(tmp_path: Path) -> None:
    done = summarize(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"summarize_build.py: nothing of tiny is built in {tmp_path}\n"
