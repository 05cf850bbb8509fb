"""Training that cannot be: one clear line, a status that is not 0, no traceback, and nothing is written."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
import train_adapter
from forked_script import run_script
from safetensors.torch import load_file, save_file
from test_train_adapter import arguments, threads_of_this_test

from lib.console import LOGGER

__all__ = ["threads_of_this_test"]  # a fixture for this module too


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a script sets for its process is put back; and no GPU is to be seen."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    handler, handlers, raising = signal.getsignal(signal.SIGTERM), list(LOGGER.handlers), logging.raiseExceptions
    yield
    signal.signal(signal.SIGTERM, handler)
    LOGGER.handlers[:], LOGGER.propagate, logging.raiseExceptions = handlers, True, raising


@pytest.fixture
def refused(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str]]]:
    """Run the script's `main` in this process; gives its status and what it said, and checks that nothing is left."""

    def run(*options: str, base: Path = tiny_base, data: Path | None = None) -> tuple[int, list[str]]:
        data = data or tiny.write_data(tmp_path / "data.jsonl")
        output = tmp_path / "adapter"
        monkeypatch.setattr(sys, "argv", ["train_adapter.py", *arguments(base, data, output, *options)])
        with pytest.raises(SystemExit) as stopped:
            train_adapter.main()
        said = capsys.readouterr().err
        assert "Traceback" not in said and "internal error" not in said
        assert not list(tmp_path.glob("*adapter*/*.safetensors")) and not output.exists()
        assert not [path for path in tmp_path.rglob(".*") if path.name.endswith((".lock", ".partial"))]
        return stopped.value.code, said.splitlines()

    return run


# what: (options, status, the whole last line)
MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "unknown layer": (
        ["--target-modules", "q_prj", "v_proj"],
        1,
        "lora.target_modules: the model has no linear layer named 'q_prj'; did you mean 'q_proj'?",
    ),
    "layers that are no linear ones": (
        ["--target-modules", "mlp"],
        1,
        "lora.target_modules: the model has no linear layer named 'mlp'; known are down_proj, gate_proj, k_proj, "
        "lm_head, o_proj, q_proj, up_proj, v_proj",
    ),
    "rank 0": (["--r", "0"], 2, "error: argument --r: 0 is less than the minimum of 1"),
    "unknown precision": (
        ["--precision", "fp8"],
        2,
        "error: argument --precision: invalid choice: 'fp8' (choose from 'fp32', 'bf16', 'fp16')",
    ),
    "4 and 8 bits": (
        ["--load-in-4bit", "--load-in-8bit"],
        2,
        "quantization: load_in_4bit and load_in_8bit are both true; take one",
    ),
    "another method than the flag": (
        ["--method", "lora", "--load-in-4bit"],
        2,
        "method is lora (as configured), but quantization.load_in_4bit is true; they have to agree",
    ),
    "cards by name": (["--gpus", "a5000"], 2, "--gpus: expected GiB of each card, as in 24,24; found 'a5000'"),
    "cards with units": (["--gpus", "24,24GB"], 2, "--gpus: expected GiB of each card, as in 24,24; found '24,24GB'"),
    "cards of no size": (["--gpus", "24,0"], 2, "--gpus: expected GiB of each card, as in 24,24; found '24,0'"),
    "endless cards": (["--gpus", "nan"], 2, "--gpus: expected GiB of each card, as in 24,24; found 'nan'"),
    "negative cards": (["--gpus=-24"], 2, "--gpus: expected GiB of each card, as in 24,24; found '-24'"),
    "memory that is no mapping": (
        ["--max-memory", "20GB"],
        2,
        "error: argument --max-memory: '20GB' is no valid JSON: Extra data: line 1 column 3 (char 2)",
    ),
    "memory of no size": (
        ["--max-memory", '{"0": "lots"}'],
        2,
        "error: argument --max-memory: 0: 'lots' is not of the form: 20GiB or 20GB, 500MiB or 500MB",
    ),
    "memory of an unknown device": (
        ["--max-memory", '{"gpu": "20GB"}'],
        2,
        "error: argument --max-memory: 'gpu' is not of the form: a card's number, or cpu",
    ),
    "no GPU": (
        ["--device", "cuda", "--method", "lora"],
        1,
        "train.device is cuda for lora, but there is no usable GPU; set train.device: cpu",
    ),
    "no GPU for what was planned": (
        ["--device", "auto", "--gpus", "24"],
        1,
        "train.device is cuda for qlora, but there is no usable GPU; set train.device: cpu",
    ),
    "no held-out data": (["--eval-data", "absent.jsonl"], 1, "absent.jsonl: No such file or directory"),
    "held-out data named twice": (
        ["--eval-data", "absent.jsonl", "--eval-fraction", "0.1"],
        2,
        "eval_data and eval_fraction both say what is held out; take one",
    ),
    "the best of what is not measured": (
        ["--load-best-model-at-end"],
        2,
        "load_best_model_at_end needs held-out data: set eval_data or eval_fraction",
    ),
    "out of memory at the smallest": (
        ["--min-micro-batch-size", "0"],
        2,
        "error: argument --min-micro-batch-size: 0 is less than the minimum of 1",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_in_a_line(mistake: str, refused: Callable[..., tuple[int, list[str]]]) -> None:
    options, expected, line = MISTAKES[mistake]
    status, said = refused(*options)
    assert status == expected
    assert said[-1] == f"train_adapter.py: {line}"
    # Before it there is what argparse says of the usage, or of what was done so far.
    assert sum(each.startswith("train_adapter.py:") for each in said) == 1


ASKED = {"messages": [{"role": "user", "content": "What builds it?"}]}
LONG = {"question": "What builds the model, and how? " * 20, "answer": "Snakemake."}
SHORT = {"question": "What?", "answer": "Snakemake."}


@pytest.mark.parametrize(
    ("lines", "options", "said"),
    [
        ([ASKED, ASKED], [], ["line 1: nothing that the assistant says", "line 2: nothing that the assistant says"]),
        (
            [SHORT, LONG, LONG],
            ["--max-length", "64"],
            [f"line {number}: all that is to be learned of its " for number in (2, 3)],
        ),
        ([SHORT, {"text": "a"}], [], ["the lines are of more than one form: question/answer"]),
    ],
    ids=["nothing to learn", "all cut", "two forms"],
)
def test_data_that_cannot_be_learned_is_listed(
    lines: list[object], options: list[str], said: list[str], refused: Callable[..., object], tmp_path: Path
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, found = refused(*options, data=data)
    assert status == 1
    title = found.index(f"train_adapter.py: {data}:")
    assert len(found) == title + 1 + len(said)
    assert all(line.strip().startswith(start) for line, start in zip(found[title + 1 :], said, strict=True))


def test_held_out_data_is_checked_alike(refused: Callable[..., tuple[int, list[str]]], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n\n")
    status, said = refused("--eval-data", str(bad))
    assert (status, said[-1]) == (1, f"train_adapter.py: {bad} is empty: it holds no line of data")


def test_a_share_of_one_sample(refused: Callable[..., tuple[int, list[str]]], tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps(SHORT) + "\n")
    status, said = refused("--eval-fraction", "0.5", data=data)
    line = f"train_adapter.py: {data}: eval_fraction has to leave samples to train on, and there is but one"
    assert (status, said[-1]) == (1, line)


def test_data_that_is_not_there(refused: Callable[..., tuple[int, list[str]]], tmp_path: Path) -> None:
    status, said = refused(data=tmp_path / "absent.jsonl")
    assert (status, said[-1]) == (1, f"train_adapter.py: {tmp_path}/absent.jsonl: No such file or directory")


def test_a_base_that_is_not_there(refused: Callable[..., tuple[int, list[str]]], tmp_path: Path) -> None:
    status, said = refused(base=tmp_path / "absent")
    assert status == 1
    assert said[-1].startswith(f"train_adapter.py: {tmp_path}/absent")
    assert len(said) == 1


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_base_that_is_not_finite(
    method: str, refused: Callable[..., tuple[int, list[str]]], tiny_base: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    shard = next(base.glob("*-00001-*"))
    tensors = load_file(shard)
    name = next(name for name in tensors if "norm" in name)
    tensors[name][3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    status, said = refused("--method", method, base=base)
    assert status == 1
    assert said[-1] == (
        "train_adapter.py: the loss is nan at step 1; there is no checkpoint yet; "
        "lower learning_rate, or set precision: fp32 or bf16"
    )


def limit_memory(megabytes: int) -> None:
    """In the script's process: let it take that much more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + megabytes * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """64 samples of 256 tokens, of which one takes some 8 MB."""
    data = tmp_path / "large.jsonl"
    data.write_text((json.dumps({"text": "What builds the model? " * 40}) + "\n") * 64)
    return data


BIG = ["--max-length", "256", "--per-device-train-batch-size", "64", "--max-steps", "1", "--micro-batch-size", "64"]


def test_memory_that_really_runs_out(large: Path, tiny_base: Path, tmp_path: Path) -> None:
    options = arguments(tiny_base, large, tmp_path / "adapter", *BIG, "--no-adaptive-micro-batch")
    given = {"before": limit_memory, "megabytes": 800, "output": tmp_path / "said"}
    status, text = run_script("train_adapter.py", *options, **given)
    assert status == 1
    assert "Traceback" not in text
    last = text.splitlines()[-1]
    assert last.startswith("train_adapter.py: out of memory with 64 samples at a time (")
    assert last.endswith("); set micro_batching.adaptive_micro_batch: true, or lower per_device_train_batch_size")
    assert not (tmp_path / "adapter").exists()


def test_memory_that_really_runs_out_is_made_to_do(large: Path, tiny_base: Path, tmp_path: Path) -> None:
    options = arguments(tiny_base, large, tmp_path / "adapter", *BIG)
    history = tmp_path / "history.json"
    given = {"before": limit_memory, "megabytes": 1000, "output": tmp_path / "said"}
    status, text = run_script("train_adapter.py", *options, "--history", str(history), **given)
    assert status == 0, text
    assert "out of memory with 64 samples at a time, going on with 32 (" in text
    (step,) = json.loads(history.read_text())["steps"]
    assert step["micro_batch_size"] in (32, 16, 8)
    assert step["tokens"] == 64 * 256
