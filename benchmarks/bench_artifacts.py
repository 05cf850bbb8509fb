"""
Merging, converting and quantizing beside peft and llama.cpp, on the same base and adapter, one after the other.

    python benchmarks/bench_artifacts.py --base DIR --adapter DIR --scratch DIR --output FILE

Each step is a process of its own. Memory is the largest resident set of it or of a child, files that it maps
included; bytes are those of its read and write calls, mapped files not included. Every step's result is removed as
soon as nothing needs it, so that the disk holds base + 2 × 16 bits + the quantized file at most.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
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


def floor(base: Path, scratch: Path, log: Path) -> Cost:
    """Copying the base's weights and hashing them: what a merge cannot do without."""
    target = scratch / "copy"
    target.mkdir()
    line = 'cp --reflink=never "$1"/*.safetensors "$2" && sync && cat "$2"/*.safetensors | sha256sum'
    try:
        return measure(["bash", "-c", line, "floor", base, target], log=log)
    finally:
        shutil.rmtree(target)


def ours(base: Path, adapter: Path, scratch: Path, log: Path, *, llama_cpp: LlamaCpp, threads: int) -> dict[str, Cost]:
    """merge_adapter.py, convert_gguf.py and quantize_gguf.py."""
    merged, f16, quantized = scratch / "merged", scratch / "model.f16.gguf", scratch / "model.q4_k_m.gguf"

    def script(name: str, *options: str | Path) -> Cost:
        return measure([sys.executable, ROOT / "scripts" / name, *options, f"--threads={threads}"], log=log)

    return _one_after_the_other(
        merge=lambda: script("merge_adapter.py", f"--base={base}", f"--adapter={adapter}", f"--output={merged}"),
        convert=lambda: script("convert_gguf.py", f"--checkpoint={merged}", "--name=model", f"--output={f16}"),
        remove=lambda: shutil.rmtree(merged),
        quantize=lambda: script("quantize_gguf.py", f"--source={f16}", f"--output={quantized}"),
        clean=lambda: _remove_files(scratch),
    )


def peers(base: Path, adapter: Path, scratch: Path, log: Path, *, llama_cpp: LlamaCpp, threads: int) -> dict[str, Cost]:
    """The usual way: peft's merge_and_unload, then llama.cpp's programs as they are."""
    merged, f16, quantized = scratch / "merged", scratch / "model.f16.gguf", scratch / "model.q4_k_m.gguf"
    convert = [sys.executable, llama_cpp.convert_script, merged, "--outfile", f16, "--outtype", "f16"]
    quantize = [llama_cpp.tool("llama-quantize"), f16, quantized, "Q4_K_M", threads]
    return _one_after_the_other(
        merge=lambda: measure([sys.executable, "-c", PEFT_MERGE, base, adapter, merged], log=log),
        convert=lambda: measure(convert, log=log),
        remove=lambda: shutil.rmtree(merged),
        quantize=lambda: measure(quantize, log=log),
        clean=lambda: _remove_files(scratch),
    )


def _one_after_the_other(**steps: Callable[[], Cost | None]) -> dict[str, Cost]:
    costs = {name: step() for name, step in steps.items()}
    return {name: cost for name, cost in costs.items() if cost is not None}


def _remove_files(folder: Path) -> None:
    for path in folder.glob("model.*"):
        path.unlink()


def main() -> None:
    """Measure and print one line per step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the results, made and removed here")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    parser.add_argument("--without-peers", action="store_true", help="where their memory is too much for the machine")
    add_llama_cpp_options(parser)
    arguments = parser.parse_args()
    llama_cpp = llama_cpp_from(arguments)
    scratch: Path = arguments.scratch
    scratch.mkdir(parents=True)
    log = scratch / "log.txt"
    shared = {"llama_cpp": llama_cpp, "threads": arguments.threads}
    runs = {"floor": {"cp, sync, sha256sum": floor(arguments.base, scratch, log)}}
    runs["modelmill"] = ours(arguments.base, arguments.adapter, scratch, log, **shared)
    if not arguments.without_peers:
        runs["peft and llama.cpp"] = peers(arguments.base, arguments.adapter, scratch, log, **shared)
    for run, steps in runs.items():
        for step, cost in steps.items():
            print(
                f"{run:<18} {step:<20} {cost.seconds:8.1f} s  {cost.memory_gb:6.2f} GB of memory"
                f"  {cost.read_gb:6.2f} GB read  {cost.written_gb:6.2f} GB written"
            )
    if arguments.output:
        figures = {run: {step: asdict(cost) for step, cost in steps.items()} for run, steps in runs.items()}
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
