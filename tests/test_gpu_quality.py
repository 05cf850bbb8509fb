"""On a GPU: a llama.cpp built for CUDA judges files as on the CPU, and merges are held to what was trained there."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import ROOT

from lib.llama_cpp import LlamaCpp
from lib.spec import WITH_CUDA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine"),
]
CHUNKS = 3
FOR_CUDA = f"--llama-cpp-cmake-flag={WITH_CUDA}"
# llama.cpp keeps keys and values in 16 bits and multiplies in another order there.
ALLOWED = {"perplexity": 2e-3, "perplexity_ratio": 2e-3, "mean_kld": 5e-2, "top1": 2e-2}


def run(script: str, *words: object) -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / script, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Chain:
    base: Path
    adapter: Path  # trained by QLoRA on the GPU
    f16: Path
    text: Path


@pytest.fixture(scope="module")
def chain(tiny_base: Path, llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    found = Chain(tiny_base, folder / "adapter", folder / "tiny.f16.gguf", tiny.write_text(folder / "judged.txt"))
    train = ["--method=qlora", "--device=cuda", "--gpus=100", "--precision=fp32", "--learning-rate=0.01", "--r=4"]
    data = tiny.write_data(folder / "train.jsonl", repeats=4)
    run("train_adapter.py", f"--base={tiny_base}", f"--data={data}", f"--output={found.adapter}", *train)
    merge = [f"--base={tiny_base}", f"--adapter={found.adapter}", f"--output={folder}/merged"]
    run("merge_adapter.py", *merge)
    run("convert_gguf.py", f"--checkpoint={folder}/merged", "--name=tiny", f"--output={found.f16}")
    return found


@contextmanager
def gpu_memory() -> Iterator[Callable[[], float]]:
    """Yields what says how many bytes of the card other processes took at most meanwhile."""
    free = [torch.cuda.mem_get_info()[0]]
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            free.append(torch.cuda.mem_get_info()[0])

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield lambda: free[0] - min(free)
    finally:
        done.set()
        watcher.join()


def measure(chain: Chain, folder: Path, *words: str) -> dict[str, Any]:
    inputs = [f"--reference={chain.f16}", f"--text={chain.text}", f"--chunks={CHUNKS}", "--types", "q8_0", "q4_k_m"]
    run("measure_types.py", *inputs, f"--known={folder}/known", f"--output={folder}/types.json", *words)
    return json.loads((folder / "types.json").read_text())


def test_types_are_judged_on_a_gpu_as_on_the_cpu(chain: Chain, tmp_path: Path) -> None:
    on_cpu = measure(chain, tmp_path / "cpu", "--device=cpu")
    with gpu_memory() as taken:
        on_gpu = measure(chain, tmp_path / "gpu", "--device=cuda", FOR_CUDA)
        # Weights of 3.4 MB, and what CUDA itself takes in a process.
        assert taken() > 100e6
    assert on_gpu["reference"]["perplexity"] == pytest.approx(on_cpu["reference"]["perplexity"], rel=2e-3)
    for ours, theirs in zip(on_gpu["types"], on_cpu["types"], strict=True):
        assert ours["sha256"] == theirs["sha256"]
        for name, allowed in ALLOWED.items():
            assert ours[name] == pytest.approx(theirs[name], rel=allowed, abs=1e-5), name


@pytest.mark.parametrize("judged", ["cpu", "cuda"])
def test_merges_are_compared_with_what_was_trained_on_a_gpu(chain: Chain, tmp_path: Path, judged: str) -> None:
    """Q8_0 alone lies between the merge into the weights of training and the adapter on its 4-bit base."""
    inputs = [f"--base={chain.base}", f"--adapter={chain.adapter}", f"--text={chain.text}", f"--chunks={CHUNKS}"]
    places = ["--trained-device=cuda", "--merge-device=cuda", "--gpus=100", f"--device={judged}"]
    places += [FOR_CUDA] if judged == "cuda" else []
    run("compare_merges.py", *inputs, *places, f"--output={tmp_path}/merges.json")
    compared = json.loads((tmp_path / "merges.json").read_text())
    assert compared["nf4"]["mean_kld"] < compared["original"]["mean_kld"]
    assert compared["nf4"]["mean_kld"] < 1e-3 and compared["nf4"]["top1"] > 0.95
