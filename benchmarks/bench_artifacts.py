"""
From adapter to Q4_K_M: directly, step by step, and by peft and llama.cpp, on the same base, one after the other.

    python benchmarks/bench_artifacts.py --base DIR --adapter DIR --scratch DIR --output FILE

The base has its manifest beforehand, as in the workflow. Each step is a process of its own. Memory is the largest
resident set of it or of a child, files that it maps included; bytes are those of its read and write calls, mapped
files not included. The disk holds base + 2 × 16 bits at most.
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

from lib.checkpoint import checkpoint_files  # noqa: E402
from lib.cli import usable_cores  # noqa: E402
from lib.jsonfile import write_json  # noqa: E402
from lib.llama_cpp import LlamaCpp, add_llama_cpp_options, llama_cpp_from  # noqa: E402
from lib.manifest import NAME as MANIFEST  # noqa: E402
from lib.manifest import describe_files, folder_manifest  # noqa: E402

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


def script(name: str, *options: str | Path, threads: int, log: Path) -> Cost:
    """One of our scripts."""
    return measure([sys.executable, ROOT / "scripts" / name, *options, f"--threads={threads}"], log=log)


def inputs(base: Path, adapter: Path, folder: Path) -> list[str]:
    """What our merge is given."""
    return [f"--base={base}", f"--base-manifest={folder.parent / MANIFEST}", f"--adapter={adapter}"]


def direct(base: Path, adapter: Path, folder: Path, log: Path, *, llama_cpp: LlamaCpp, threads: int) -> dict[str, Cost]:
    """build_direct.py on the GPU, if there is one, and on the CPU, with all threads and with 8; and reading alone."""
    import torch

    costs = {"cat": measure(["bash", "-c", 'cat "$1"/*.safetensors > /dev/null', "cat", base], log=log)}
    ways = [("cuda", threads)] if torch.cuda.is_available() else []
    ways += [("cpu", count) for count in sorted({threads, min(8, threads)}, reverse=True)]
    output = folder / "model.q4_k_m.gguf"
    digests = set()
    for device, count in ways:
        options = (*inputs(base, adapter, folder), f"--device={device}", "--quant=q4_k_m", f"--output={output}")
        costs[f"direct, {device}, {count} threads"] = script("build_direct.py", *options, threads=count, log=log)
        digests.add(json.loads(Path(f"{output}.json").read_text())["sha256"])
        output.unlink()
    print("sha256:", *digests)
    return costs


def ours(base: Path, adapter: Path, folder: Path, log: Path, *, llama_cpp: LlamaCpp, threads: int) -> dict[str, Cost]:
    """merge_adapter.py, convert_gguf.py and quantize_gguf.py."""
    import torch

    merged, f16, quantized = folder / "merged", folder / "model.f16.gguf", folder / "model.q4_k_m.gguf"
    costs = {}
    shared = {"threads": threads, "log": log}
    merge = ("merge_adapter.py", *inputs(base, adapter, folder), f"--output={merged}")
    if torch.cuda.is_available():
        costs["merge on the GPU"] = script(*merge, "--device=cuda", **shared)
        shutil.rmtree(merged)
    costs["merge"] = script(*merge, **shared)
    convert = (f"--checkpoint={merged}", "--name=model", f"--output={f16}")
    costs["convert"] = script("convert_gguf.py", *convert, **shared)
    shutil.rmtree(merged)
    costs["quantize"] = script("quantize_gguf.py", f"--source={f16}", f"--output={quantized}", **shared)
    print("sha256:", json.loads(Path(f"{quantized}.json").read_text())["sha256"])
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


WAYS = {"floor": floor, "direct": direct, "modelmill": ours, "peers": peers}


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
    files = describe_files(arguments.base, checkpoint_files(arguments.base), threads=arguments.threads)
    origin = {"kind": "path", "name": arguments.base.name}
    write_json(scratch / MANIFEST, folder_manifest(artifact="base", files=files, origin=origin))
    shared = {"llama_cpp": llama_cpp, "threads": arguments.threads}
    runs: dict[str, dict[str, Cost]] = {}
    for name in arguments.ways:
        folder = scratch / "run"
        folder.mkdir()
        runs[name] = WAYS[name](arguments.base, arguments.adapter, folder, log, **shared)
        shutil.rmtree(folder)
        for step, cost in runs[name].items():
            print(
                f"{name:<10} {step:<28} {cost.seconds:8.1f} s  {cost.memory_gb:6.2f} GB of memory"
                f"  {cost.read_gb:6.2f} GB read  {cost.written_gb:6.2f} GB written",
                flush=True,
            )
    if arguments.output:
        figures = {run: {step: asdict(cost) for step, cost in steps.items()} for run, steps in runs.items()}
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
