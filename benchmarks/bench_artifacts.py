"""
Merging, converting and quantizing beside peft and llama.cpp, on the same base and adapter, one after the other.

    python benchmarks/bench_artifacts.py --base DIR --adapter DIR --scratch DIR --output FILE

Each step is a process of its own. Memory is the largest resident set of it or of a child, files that it maps
included; bytes are those of its read and write calls, mapped files not included. The disk holds base + 2 × 16 bits at
most.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from lib.cli import usable_cores  # noqa: E402
from lib.llama_cpp import LlamaCpp, add_llama_cpp_options, llama_cpp_from  # noqa: E402

PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output, max_shard_size="5GB")
AutoTokenizer.from_pretrained(base).save_pretrained(output)
"""


@dataclass(frozen=True)
class Cost:
    """What one process took: seconds, GB (10^9) of memory, and of data read and written."""

    seconds: float
    memory_gb: float
    read_gb: float
    written_gb: float


def measure(command: list[str | Path], *, log: Path) -> Cost:
    """
    Run a command to its end.

    Raises:
        SystemExit: it failed; its output is in `log`.
    """
    started = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen([str(word) for word in command], stdout=output, stderr=subprocess.STDOUT)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    seconds = time.perf_counter() - started
    # Before it is reaped its counters, with those of its children, can still be read.
    counters = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed; see {log}")
    return Cost(seconds, usage.ru_maxrss * 1024 / 1e9, int(counters["rchar"]) / 1e9, int(counters["wchar"]) / 1e9)


def floor(base: Path, adapter: Path, folder: Path, log: Path, *, llama_cpp: LlamaCpp, threads: int) -> dict[str, Cost]:
    """Copying the base's weights and hashing the copy: what a merge cannot do without."""
    line = 'cp --reflink=never "$1"/*.safetensors "$2" && sync && cat "$2"/*.safetensors | sha256sum'
    return {"cp, sync, sha256sum": measure(["bash", "-c", line, "floor", base, folder], log=log)}


def ours(base: Path, adapter: Path, folder: Path, log: Path, *, llama_cpp: LlamaCpp, threads: int) -> dict[str, Cost]:
    """merge_adapter.py, convert_gguf.py and quantize_gguf.py."""
    import torch

    merged, f16, quantized = folder / "merged", folder / "model.f16.gguf", folder / "model.q4_k_m.gguf"

    def script(name: str, *options: str | Path) -> Cost:
        return measure([sys.executable, ROOT / "scripts" / name, *options, f"--threads={threads}"], log=log)

    costs = {}
    merge = ("merge_adapter.py", f"--base={base}", f"--adapter={adapter}", f"--output={merged}")
    if torch.cuda.is_available():
        costs["merge on the GPU"] = script(*merge, "--device=cuda")
        shutil.rmtree(merged)
    costs["merge"] = script(*merge)
    costs["convert"] = script("convert_gguf.py", f"--checkpoint={merged}", "--name=model", f"--output={f16}")
    shutil.rmtree(merged)
    costs["quantize"] = script("quantize_gguf.py", f"--source={f16}", f"--output={quantized}")
    return costs


def peers(base: Path, adapter: Path, folder: Path, log: Path, *, llama_cpp: LlamaCpp, threads: int) -> dict[str, Cost]:
    """The usual way: peft's merge_and_unload, then llama.cpp's programs as they are."""
    merged, f16, quantized = folder / "merged", folder / "model.f16.gguf", folder / "model.q4_k_m.gguf"
    costs = {"merge": measure([sys.executable, "-c", PEFT_MERGE, base, adapter, merged], log=log)}
    convert = [sys.executable, llama_cpp.convert_script, merged, "--outfile", f16, "--outtype", "f16"]
    costs["convert"] = measure(convert, log=log)
    shutil.rmtree(merged)
    quantize = [llama_cpp.tool("llama-quantize"), f16, quantized, "Q4_K_M", threads]
    costs["quantize"] = measure(quantize, log=log)
    return costs


WAYS = {"floor": floor, "modelmill": ours, "peers": peers}


def main() -> None:
    """Measure and print one line per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the results, made and removed here")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what is measured, in this order")
    add_llama_cpp_options(parser)
    arguments = parser.parse_args()
    llama_cpp = llama_cpp_from(arguments)
    scratch: Path = arguments.scratch
    scratch.mkdir(parents=True)
    log = scratch / "log.txt"
    shared = {"llama_cpp": llama_cpp, "threads": arguments.threads}
    runs: dict[str, dict[str, Cost]] = {}
    for name in arguments.ways:
        folder = scratch / "run"
        folder.mkdir()
        runs[name] = WAYS[name](arguments.base, arguments.adapter, folder, log, **shared)
        shutil.rmtree(folder)
        for step, cost in runs[name].items():
            print(
                f"{name:<18} {step:<20} {cost.seconds:8.1f} s  {cost.memory_gb:6.2f} GB of memory"
                f"  {cost.read_gb:6.2f} GB read  {cost.written_gb:6.2f} GB written",
                flush=True,
            )
    if arguments.output:
        figures = {run: {step: asdict(cost) for step, cost in steps.items()} for run, steps in runs.items()}
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
