"""
What training takes of each card and of RAM, over methods, lengths and batches, as rows of docs/measurements.md.

    python benchmarks/bench_memory.py --base 7B=DIR --gpus 100 --output FILE

Each run is four updates of train_adapter.py in a process of its own: rank 16 on every linear layer but the output head,
every token learned, and compiled as always.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

TRAINER = Path(__file__).resolve().parents[1] / "scripts/train_adapter.py"
UPDATES = 4
LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Run:
    """What is trained: tokens of a sample, samples of a batch, and whether activations are computed twice."""

    method: str
    length: int
    batch: int
    checkpointing: bool

    def options(self) -> list[str]:
        checkpointing = "" if self.checkpointing else "no-"
        return [
            f"--method={self.method}",
            f"--max-length={self.length}",
            f"--per-device-train-batch-size={self.batch}",
            f"--{checkpointing}gradient-checkpointing",
        ]


RUNS = [
    Run(method, *rest)
    for method in ("lora", "int8", "qlora")
    for rest in ((1024, 1, True), (4096, 1, True), (1024, 4, True), (1024, 1, False))
]


def measure(base: Path, run: Run, *, gpus: str, card: str) -> dict[str, object]:
    """Peaks in GB of one run; what it printed instead if it failed."""
    with TemporaryDirectory() as scratch:
        words = random.Random(0)
        lines = (" ".join(str(words.randrange(10**6)) for _ in range(run.length)) for _ in range(UPDATES * run.batch))
        data = Path(scratch, "data.jsonl")
        data.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        history = Path(scratch, "history.json")
        command = [sys.executable, str(TRAINER), f"--base={base}", f"--data={data}", f"--output={scratch}/adapter"]
        command += [f"--history={history}", f"--gpus={gpus}", f"--max-steps={UPDATES}", "--save-steps=0"]
        variables = {**os.environ, "CUDA_VISIBLE_DEVICES": card}
        errors = Path(scratch, "errors.txt")
        with errors.open("w") as told:
            process = subprocess.Popen([*command, *run.options()], env=variables, stdout=told, stderr=told)
            anonymous = follow(process)
        if process.returncode:
            return {"failed": errors.read_text().strip().rpartition("\n")[2]}
        record = json.loads(history.read_text())
    return {"gpu_gb": record["peak_gpu_gb"], "ram_gb": record["peak_ram_gb"], "anonymous_gb": anonymous / 1e9}


def follow(process: subprocess.Popen[bytes]) -> int:
    """
    The most memory of a process that is no file's, in bytes, looked at until it ends.

    Its resident memory holds the mapped checkpoint as well, which the kernel takes back when it needs the room.
    """
    most, status = 0, Path("/proc", str(process.pid), "status")
    while process.poll() is None:
        try:
            found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        except OSError:  # ended meanwhile
            continue
        most = max(most, 1024 * int(found[1]) if found else 0)
        time.sleep(LOOK_SECONDS)
    return most


def main() -> None:
    """Measure, and print one row per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", required=True, metavar="SIZE=DIR", help="may be repeated")
    parser.add_argument("--gpus", required=True, metavar="GIB,GIB", help="memory of each card that a run may take")
    parser.add_argument("--cards", nargs="+", default=["0"], metavar="0,1", help="runs go on at once, one on each")
    parser.add_argument(
        "--runs", type=json.loads, metavar="JSON", help="as [[method, length, batch, checkpointing], …]"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON of all figures")
    arguments = parser.parse_args()
    free: SimpleQueue[str] = SimpleQueue()
    for card in arguments.cards:
        free.put(card)

    def work(job: tuple[str, Path, Run]) -> dict[str, object]:
        size, base, run = job
        card = free.get()
        try:
            found = measure(base, run, gpus=arguments.gpus, card=card)
        finally:
            free.put(card)
        print("|", *(f"{word} |" for word in (size, *astuple(run), *found.values())), flush=True)
        return {"size": size, **vars(run), "cards": arguments.gpus, **found}

    bases = [each.partition("=") for each in arguments.base]
    runs = RUNS if arguments.runs is None else [Run(*each) for each in arguments.runs]
    jobs = [(size, Path(folder), run) for size, _, folder in bases for run in runs]
    with ThreadPoolExecutor(len(arguments.cards)) as pool:
        arguments.output.write_text(json.dumps(list(pool.map(work, jobs)), indent=2) + "\n")


if __name__ == "__main__":
    main()
