"""
QLoRA steps of train_adapter.py beside the plain transformers + peft loop, on the same checkpoint and tokens.

    python benchmarks/bench_training.py --base DIR --gpus 24,24 --sequence-lengths 1024 2048 --output FILE

Each runs in a process of its own that may take no more of a card than --gpus says. Batch size 1, gradient
checkpointing, rank 16 on every linear layer but the output head, every token learned.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
GIB = 1 << 30


def plain_loop(*, base: Path, gpus: list[float], length: int, steps: int) -> dict[str, object]:
    """The recipe of peft's documentation: prepare_model_for_kbit_training, device_map="auto", the model's loss."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    gc.collect()
    torch.cuda.empty_cache()
    for card, planned in enumerate(gpus):
        torch.cuda.reset_peak_memory_stats(card)
        whole = torch.cuda.get_device_properties(card).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, planned * GIB / whole), card)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=quantization, device_map="auto" if len(gpus) > 1 else {"": 0}
    )
    model.config.use_cache = False
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(steps):
        tokens = torch.randint(1000, 150_000, (1, length), generator=generator).to("cuda:0")
        started = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - started)
    peaks = [torch.cuda.max_memory_allocated(card) / 1e9 for card in range(len(gpus))]
    return {"tokens_per_second": length / statistics.median(seconds[steps // 3 :]), "peak_gpu_gb": peaks}


def ours(*, base: Path, gpus: list[float], length: int, steps: int, options: list[str]) -> dict[str, object]:
    """train_adapter.py on texts of at least `length` tokens."""
    with TemporaryDirectory() as scratch:
        words = random.Random(0)
        data = Path(scratch, "data.jsonl")
        lines = (" ".join(str(words.randrange(10**6)) for _ in range(length)) for _ in range(steps))
        data.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        history = Path(scratch, "history.json")
        command = [sys.executable, str(SCRIPTS / "train_adapter.py"), f"--base={base}", f"--data={data}"]
        command += [f"--output={scratch}/adapter", f"--history={history}", f"--max-length={length}"]
        command += ["--method=qlora", f"--gpus={','.join(map(str, gpus))}", "--gradient-checkpointing"]
        command += ["--per-device-train-batch-size=1", f"--max-steps={steps}", "--save-steps=0", "--learning-rate=1e-4"]
        subprocess.run([*command, *options], check=True)
        record = json.loads(history.read_text())
    print("tokens/s by step:", *(round(step["tokens_per_second"]) for step in record["steps"]))
    settled = [step["tokens_per_second"] for step in record["steps"][steps // 3 :]]
    return {"tokens_per_second": statistics.median(settled), "peak_gpu_gb": record["peak_gpu_gb"]}


def main() -> None:
    """Measure and print one line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--gpus", default="24,24", help="GiB of each card")
    parser.add_argument("--sequence-lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path, help="JSON of all figures")
    parser.add_argument("--plain", action="store_true", help="run only the plain loop, and print its figures as JSON")
    parser.add_argument("--ours", action="store_true", help="run only train_adapter.py; further options are its own")
    arguments, options = parser.parse_known_args()
    gpus = [float(size) for size in arguments.gpus.split(",")]
    if arguments.plain:
        shared = {"base": arguments.base, "gpus": gpus, "steps": arguments.steps}
        print(json.dumps({length: plain_loop(length=length, **shared) for length in arguments.sequence_lengths}))
        return
    command = [sys.executable, __file__, "--plain", f"--base={arguments.base}", f"--gpus={arguments.gpus}"]
    command += [f"--steps={arguments.steps}", "--sequence-lengths", *map(str, arguments.sequence_lengths)]
    plain = {}
    if not arguments.ours:
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        plain = json.loads(printed.splitlines()[-1])
    table = {}
    for length in arguments.sequence_lengths:
        measured = ours(base=arguments.base, gpus=gpus, length=length, steps=arguments.steps, options=options)
        table[length] = {"modelmill": measured, **({"plain": plain[str(length)]} if plain else {})}
        for name, figures in table[length].items():
            peaks = " + ".join(f"{peak:.1f}" for peak in figures["peak_gpu_gb"])
            print(
                f"{length:>6} tokens  {name:<10} {figures['tokens_per_second']:>7.0f} tokens/s  {peaks} GB", flush=True
            )
    if arguments.output:
        arguments.output.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
