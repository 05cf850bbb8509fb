"""Training, from data to adapter: it learns in every mode, and what is written is what was asked for and trained."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import train_adapter
import training_runs as runs
from conftest import ROOT
from forked_script import run_script
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback, get_scheduler

from lib.adapter_trainer import AdapterTrainer
from lib.base_model import load_base
from lib.cli import usable_cores
from lib.samples import IGNORED
from lib.training import prepare_samples

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "OMP_WAIT_POLICY")
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FILES = {"adapter_model.safetensors", "adapter_config.json", "MANIFEST.json"}


@pytest.fixture(autouse=True)
def threads_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run sets the numbers of threads for its whole process; here they are put back."""
    for name in THREADS:
        monkeypatch.setenv(name, os.environ.get(name, "2"))


@dataclass(frozen=True)
class Trained:
    """A run that is over."""

    output: Path
    settings: Any
    manifest: dict[str, Any]

    @property
    def history(self) -> dict[str, Any]:
        return json.loads(self.output.with_name("history.json").read_text())

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.history["steps"]]

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.output / "adapter_config.json").read_text())

    @property
    def weights(self) -> bytes:
        return (self.output / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def train(tiny_base: Path, tmp_path: Path) -> Callable[..., Trained]:
    """Run the script's own function, in this process, into a folder of its own."""

    def run(name: str = "run", *, base: Path = tiny_base, data: Path | None = None, **settings: Any) -> Trained:
        folder = tmp_path / name
        folder.mkdir()
        data = data or tiny.write_data(folder / "data.jsonl")
        asked = {"num_train_epochs": 5, "per_device_train_batch_size": 3, "save_steps": 0, **settings}
        resolved = runs.settings(data=str(data), **asked)
        manifest = train_adapter.train_adapter(
            base=base,
            base_manifest=None,
            settings=resolved,
            gpus=[],
            checkpoints=folder / "checkpoints",
            tensorboard=None,
            history=folder / "history.json",
            output=folder / "adapter",
        )
        return Trained(folder / "adapter", resolved, manifest)

    return run


@pytest.fixture(scope="module")
def base_with_biases(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A tiny Qwen2, whose attention has biases, with the tiny Llama's tokenizer."""
    folder = tmp_path_factory.mktemp("biased") / "tiny-qwen"
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**tiny.SHAPE, eos_token_id=3, pad_token_id=0)).save_pretrained(folder)
    for path in tiny_base.iterdir():
        if "token" in path.name or "chat" in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def loss_as_peft_reads_it(trained: Trained, base: Path) -> float:
    """transformers' loss over the run's data with the adapter that was written, as peft loads it."""
    from peft import PeftModel

    loaded = load_base(base, trained.settings, device_map={"": "cpu"})
    model = PeftModel.from_pretrained(loaded, trained.output).get_base_model().eval()
    total, count = 0.0, 0
    for sample in prepare_samples(base, runs.settings(data=trained.settings.data))[0]:
        tokens = sum(label != IGNORED for label in sample.labels[1:])
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([sample.input_ids]), labels=torch.tensor([sample.labels])).loss
        total, count = total + tokens * mean.item(), count + tokens
    return total / count


LORA = {"r": 4, "lora_alpha": 8}
ALL = {**LORA, "bias": "none", "task_type": "CAUSAL_LM"}
# what: (settings, what adapter_config.json has to say)
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora fp32": ({}, {**ALL, "use_rslora": False, "use_dora": False, "lora_dropout": 0.0}),
    "lora bf16": ({"precision": "bf16"}, ALL),
    "lora fp16": ({"precision": "fp16", "num_train_epochs": 3}, ALL),  # slow on most CPUs
    "qlora nf4": ({"method": "qlora", "quantization": {"load_in_4bit": True}}, ALL),
    "qlora fp4": ({"method": "qlora", "precision": "bf16", "quantization": {"bnb_4bit_quant_type": "fp4"}}, ALL),
    "int8": ({"method": "int8"}, ALL),
    "int8 bf16, checkpointed": ({"method": "int8", "precision": "bf16", "gradient_checkpointing": True}, ALL),
    "rsLoRA": ({"lora": {"r": 4, "lora_alpha": 4, "use_rslora": True}}, {"use_rslora": True, "lora_alpha": 4}),
    "DoRA": ({"lora": {**LORA, "use_dora": True}}, {"use_dora": True}),
    "DoRA nf4": ({"method": "qlora", "lora": {**LORA, "use_dora": True}}, {"use_dora": True}),
    "dropout": ({"lora": {**LORA, "lora_dropout": 0.1}}, {"lora_dropout": 0.1}),
    "rank and layers": (
        {"lora": {"r": 7, "lora_alpha": 14, "target_modules": ["v_proj", "down_proj"]}},
        {"r": 7, "lora_alpha": 14, "target_modules": ["down_proj", "v_proj"]},
    ),
    "output head": (
        {"lora": {**LORA, "target_modules": ["lm_head", "up_proj"]}},
        {"target_modules": ["lm_head", "up_proj"]},
    ),
    "feature extraction": ({"lora": {**LORA, "task_type": "FEATURE_EXTRACTION"}}, {"task_type": "FEATURE_EXTRACTION"}),
    "packing": ({"packing": True, "max_length": 64, "per_device_train_batch_size": 2}, ALL),
    "accumulation, low memory": (
        {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 3,
            "offload": {"low_cpu_mem_usage": True},
        },
        ALL,
    ),
    "skipped layers": ({"method": "qlora", "quantization": {"llm_int8_skip_modules": ["q_proj"]}}, ALL),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_and_writes_what_it_has_learned(
    mode: str, train: Callable[..., Trained], tiny_base: Path, tmp_path: Path
) -> None:
    settings, expected = MODES[mode]
    settings = {"lora": LORA, **settings}
    held_out = str(tiny.write_data(tmp_path / "held.jsonl"))
    trained = train(**settings, eval_data=held_out)
    assert len(trained.losses) >= 6
    assert all(map(math.isfinite, trained.losses))
    assert sum(trained.losses[-2:]) < 0.9 * sum(trained.losses[:2])
    assert {key: trained.config[key] for key in expected} == expected
    if "target_modules" not in expected:
        adapted = trained.config["target_modules"]
        assert len(adapted) == 2 * len(LINEARS) and {name.rpartition(".")[2] for name in adapted} == LINEARS
    assert {path.name for path in trained.output.iterdir()} == FILES
    # The trainer's own measure of the trained model, and an outside one of the files.
    (measured,) = trained.history["evaluations"]
    exact = settings.get("precision", "fp32") == "fp32"
    assert loss_as_peft_reads_it(trained, tiny_base) == pytest.approx(measured["loss"], rel=1e-4 if exact else 2e-2)
    origin = trained.manifest["origin"]["settings"]
    assert (origin["method"], origin["precision"]) == (trained.settings.method, trained.settings.precision)
    assert all(origin["lora"][key] == value for key, value in settings["lora"].items())


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_are_trained_as_asked(
    bias: str, train: Callable[..., Trained], base_with_biases: Path, tmp_path: Path
) -> None:
    lora = {"r": 4, "bias": bias, "target_modules": ["q_proj", "up_proj"]}
    held_out = str(tiny.write_data(tmp_path / "held.jsonl"))
    trained = train(base=base_with_biases, lora=lora, eval_data=held_out)
    assert trained.config["bias"] == bias
    written = load_file(trained.output / "adapter_model.safetensors")
    biases = {name.replace(".base_layer", "").split(".")[-2] for name in written if name.endswith(".bias")}
    # Of the adapted layers alone: q_proj has a bias and up_proj has none.
    assert biases == {"none": set(), "lora_only": {"q_proj"}, "all": {"q_proj", "k_proj", "v_proj"}}[bias]
    (measured,) = trained.history["evaluations"]
    assert loss_as_peft_reads_it(trained, base_with_biases) == pytest.approx(measured["loss"], rel=1e-4)


def test_dropout_and_its_seed_count(train: Callable[..., Trained]) -> None:
    """Each two of these runs differ, but the first two."""
    dropout = {"lora": {"r": 4, "lora_dropout": 0.2}}
    weights = [
        train(str(number), max_steps=2, **asked).weights
        for number, asked in enumerate(({}, {}, dropout, {**dropout, "seed": 1}, {"seed": 1}))
    ]
    assert weights[0] == weights[1]
    assert len(set(weights)) == 4


def test_samples_come_in_an_order_of_the_seeds_own(tiny_base: Path, tmp_path: Path) -> None:
    """Another one in each epoch, and all of them in each."""

    def order(seed: int) -> list[int]:
        seen: list[int] = []
        run = runs.settings(seed=seed, num_train_epochs=2, per_device_train_batch_size=3, save_steps=0)
        trained = runs.trainer(tiny_base, tmp_path, run, train_dataset=runs.samples(12))
        trained.training_step = lambda _, batch, *rest: (seen.extend(each.input_ids[0] for each in batch), 1)[1] * one
        trained.train()
        return seen

    one = torch.tensor(1.0)
    first, again, other = order(1), order(1), order(2)
    assert first == again != other
    assert sorted(first[:12]) == sorted(first[12:]) == sorted(other[:12])
    assert first[:12] != first[12:]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_ways_to_save_memory_change_no_byte(method: str, train: Callable[..., Trained]) -> None:
    common = {"method": method, "max_steps": 4, "lora": {"r": 4, "lora_dropout": 0.1}}
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "checkpointing": {"gradient_checkpointing": True},
        "disk": {"offload": {"use_disk_offload": True, "max_memory": {"cpu": "0MB"}}},
        "deterministic": {"deterministic": True},
    }
    weights = {way: train(way, **common, **asked).weights for way, asked in ways.items()}
    assert all(each == weights["plain"] for each in weights.values())


def test_deterministic_kernels_are_asked_for(train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    step = AdapterTrainer.training_step
    monkeypatch.setattr(
        AdapterTrainer,
        "training_step",
        lambda *given: (seen.append(torch.are_deterministic_algorithms_enabled()), step(*given))[1],
    )
    for number, deterministic in enumerate((True, False)):
        train(str(number), max_steps=1, deterministic=deterministic)
    assert seen == [True, False]


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(train: Callable[..., Trained]) -> None:
    plain, compiled = (train(each, max_steps=3, torch_compile=each) for each in ("off", "on"))
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)


FORMS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "何で作る？"},
                {"role": "assistant", "content": "Snakemake です。"},
            ]
        }
    ],
    "prompt and completion": [{"prompt": "What builds it?", "completion": "Snakemake."}],
    "question and answer": [{"question": "What builds it?", "answer": "Snakemake."}],
    "instruction": [
        {"instruction": "Answer.", "input": "What builds it?", "output": "Snakemake."},
        {"instruction": "What builds it?", "output": "Snakemake."},
    ],
    "text": [{"text": "Snakemake builds the model."}, {"text": "モデル"}],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data(form: str, train: Callable[..., Trained], tmp_path: Path) -> None:
    lines = FORMS[form] * 3
    data = tmp_path / "forms.jsonl"
    data.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    trained = train(data=data, eval_data=str(data))
    assert trained.history["samples"]["samples"] == len(lines)
    assert trained.losses[-1] < 0.8 * trained.losses[0]
    assert trained.manifest["origin"]["data"]["size"] == data.stat().st_size
    assert trained.manifest["origin"]["eval_data"]["name"] == "forms.jsonl"


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ({"num_train_epochs": 3}, 6),
        ({"num_train_epochs": 0.5}, 1),
        ({"num_train_epochs": 3, "per_device_train_batch_size": 4}, 6),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 4),
        ({"max_steps": 5}, 5),
        ({"max_steps": -1, "num_train_epochs": 1}, 2),
        ({"packing": True, "max_length": 80, "num_train_epochs": 2, "per_device_train_batch_size": 1}, 6),
    ],
)
def test_number_of_updates(asked: dict[str, Any], steps: int, train: Callable[..., Trained]) -> None:
    history = train(**asked).history
    assert [step["step"] for step in history["steps"]] == list(range(1, steps + 1))
    assert history["samples"]["samples"] == 6
    assert history["tokens"] == sum(step["tokens"] for step in history["steps"]) > 0
    assert (history["kept"], history["kept_step"]) == ("last", steps)


def test_a_share_is_held_out_by_the_seed(train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[set[tuple[int, ...]], set[tuple[int, ...]]]] = []
    built = AdapterTrainer.__init__

    def noting(self: AdapterTrainer, **given: Any) -> None:
        seen.append(tuple({tuple(each.input_ids) for each in given[key]} for key in ("train_dataset", "eval_dataset")))
        built(self, **given)

    monkeypatch.setattr(AdapterTrainer, "__init__", noting)
    for name, asked in {"a": {}, "b": {}, "c": {"seed": 3}, "d": {"eval_fraction": 0.01}}.items():
        trained = train(name, max_steps=2, **{"eval_fraction": 0.34, **asked})
        assert [each["step"] for each in trained.history["evaluations"]] == [2]
    assert all(not held & learned and len(held | learned) == 6 for learned, held in seen)
    assert [len(held) for _, held in seen] == [2, 2, 2, 1]
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (3, 3), (0.25, 3)])
def test_learning_rates_are_transformers_own(
    name: str, warmup: float, steps: int, tiny_base: Path, tmp_path: Path
) -> None:
    """As used in each update and as written into the history."""
    used: list[float] = []

    class Noting(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
            used.append(optimizer.param_groups[0]["lr"])

    run = runs.settings(lr_scheduler_type=name, warmup_steps=warmup, max_steps=10, save_steps=0, learning_rate=3e-3)
    trained = runs.trainer(tiny_base, tmp_path, run, train_dataset=runs.samples(2))
    trained.add_callback(Noting())
    trained.training_step = lambda *_: torch.tensor(1.0)  # the rate depends on nothing that is learned
    trained.train()
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-3)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=steps, num_training_steps=10)
    expected = []
    for _ in range(10):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert used == pytest.approx(expected, rel=1e-9)
    logged = [entry["learning_rate"] for entry in trained.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected, rel=1e-9)
    assert len(set(expected)) > 1 or (name == "constant") or (name == "constant_with_warmup" and not steps)


@pytest.mark.parametrize(
    "asked",
    [
        {"weight_decay": 0.0, "max_grad_norm": 0.0},
        {"weight_decay": 0.3, "max_grad_norm": 0.0},
        {"weight_decay": 0.3, "max_grad_norm": 0.05},
    ],
)
def test_updates_are_those_of_adamw_on_transformers_gradients(
    asked: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    run = runs.settings(
        **asked, max_steps=4, save_steps=0, learning_rate=0.01, lr_scheduler_type="linear", warmup_steps=0
    )
    trained = runs.trainer(tiny_base, tmp_path, run, train_dataset=runs.samples(8))
    batches, step = [], trained.training_step
    trained.training_step = lambda model, inputs, *rest: (batches.append(inputs), step(model, inputs, *rest))[1]
    trained.train()
    model = runs.adapted(tiny_base, run)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=0.01, weight_decay=asked["weight_decay"])
    assert len(batches) == 4 and all(len(batch) == 2 for batch in batches)
    for number, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - number / 4)
        labels = [torch.tensor([sample.labels]) for sample in batch]
        learned = [int((each[:, 1:] != IGNORED).sum()) for each in labels]
        for sample, label, count in zip(batch, labels, learned, strict=True):
            mean = model(input_ids=torch.tensor([sample.input_ids]), labels=label).loss
            (mean * count / sum(learned)).backward()
        if asked["max_grad_norm"]:
            torch.nn.utils.clip_grad_norm_(weights.values(), asked["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in weights.items():
        assert (trained.trained[name] - weight).norm() < 2e-4 * weight.norm(), name


def test_the_same_run_gives_the_same_bytes_wherever_it_is(
    train: Callable[..., Trained], tiny_base: Path, tmp_path: Path
) -> None:
    import shutil

    moved = Path(shutil.copytree(tiny_base, tmp_path / "elsewhere" / tiny_base.name))
    offload = [{"offload_folder": str(tmp_path / name)} for name in ("one", "two")]
    first, second = (
        train(name, base=base, offload=asked, max_steps=3)
        for name, base, asked in zip(("a", "b"), (tiny_base, moved), offload, strict=True)
    )
    for name in FILES:
        assert (first.output / name).read_bytes() == (second.output / name).read_bytes(), name
    written = "".join((first.output / name).read_text() for name in FILES if name.endswith(".json"))
    for place in (tmp_path, tiny_base.parent, Path.cwd(), Path.home()):
        assert str(place) not in written
    assert first.config["base_model_name_or_path"] == tiny_base.name
    assert first.history["adapter_digest"] == first.manifest["digest"]


def arguments(base: Path, data: Path, output: Path, *options: str) -> list[str]:
    """A command line for the tiny model."""
    words = f"--base {base} --data {data} --output {output} --device cpu --threads 2 --precision fp32 --r 4"
    words += f" --num-train-epochs 2 --learning-rate 0.01 --log {output.with_suffix('.log')}"
    return [*words.split(), *options]


def test_the_script_as_it_is_called(tiny_base: Path, tmp_path: Path) -> None:
    data = tiny.write_data(tmp_path / "data.jsonl", repeats=4)
    output, history = tmp_path / "adapter", tmp_path / "logs" / "history.json"
    options = ["--method", "qlora", "--history", str(history), "--tensorboard", str(tmp_path / "events")]
    options += ["--bias", "none", "--lora-dropout", "0.05", "--eval-fraction", "0.1", "--max-memory", '{"cpu": "2GB"}']
    options += ["--target-modules", "q_proj", "up_proj", "--no-bnb-4bit-use-double-quant", "--method-reason", "chosen"]
    status, text = run_script("train_adapter.py", *arguments(tiny_base, data, output, *options), output=tmp_path / "o")
    assert status == 0, text
    assert text.splitlines()[0] == "method qlora, fp32: chosen"
    assert "data.jsonl: 24 samples" in text and "2 of 24 samples are held out" in text
    assert text.splitlines()[-1] == f"adapter written to {output}"
    log = output.with_suffix(".log").read_text()
    assert all(line in log for line in text.splitlines())
    assert "step 8 of 12: loss " in log
    assert {path.name for path in output.iterdir()} == FILES
    manifest = json.loads((output / "MANIFEST.json").read_text())
    asked = manifest["origin"]["settings"]
    assert (asked["method"], asked["method_reason"], asked["eval_fraction"]) == ("qlora", "chosen", 0.1)
    assert asked["quantization"]["bnb_4bit_use_double_quant"] is False
    assert manifest["origin"]["data"]["name"] == "data.jsonl"
    figures = json.loads(history.read_text())
    assert figures["adapter_digest"] == manifest["digest"]
    assert len(figures["steps"]) == 12 and len(figures["evaluations"]) == 1
    assert list((tmp_path / "events").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {
        *("data.jsonl", "adapter", "adapter.log", "logs", "events", "o")
    }  # no checkpoints, locks or partial folders


@pytest.mark.slow
def test_the_environments_thread_count_changes_no_adapter(tiny_base: Path, tmp_path: Path) -> None:
    """Snakemake exports OMP_NUM_THREADS by -j; the run's own number of threads is what counts."""
    if usable_cores() < 2:
        pytest.skip("one core gives one thread either way")
    data = tiny.write_data(tmp_path / "data.jsonl")
    weights = []
    for threads in ("1", "2"):
        output = tmp_path / threads / "adapter"
        output.parent.mkdir()
        command = [sys.executable, str(ROOT / "scripts/train_adapter.py"), *arguments(tiny_base, data, output)]
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        weights.append((output / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
