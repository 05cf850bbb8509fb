"""Training on a real GPU: every method, memory that runs out, offloading, reproducibility, several cards."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training_runs as runs

from lib.adapted_model import build_model
from lib.adapter_trainer import AdapterTrainer
from lib.config import definition, with_defaults
from lib.micro_batch import release_memory
from lib.train_method import resolve_method
from lib.train_settings import Train
from lib.training import train_lora
from lib.training_run import Places, trainer_arguments
from lib.typed import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine"),
]
# Wide enough for its weights and activations to be seen beside the allocator's rounding: 470 M weights, 12 blocks.
WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 384,
}


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A random Llama of these sizes with the tiny model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(**WIDE, bos_token_id=1, eos_token_id=3, pad_token_id=0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for path in tiny_base.iterdir():
        if path.name.startswith(("tokenizer", "special", "chat")):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def settings(data: Path, *, gpus: list[float], **train: Any) -> Train:
    asked = {"data": str(data), "num_train_epochs": 4, "learning_rate": 0.005, "lora": {"r": 4}, "save_steps": 0}
    filled = with_defaults({**asked, "torch_compile": "off", **train}, definition("train"))
    resolve_method(filled, parameters=10**6, gpus=gpus)
    return build(Train, filled)


@dataclass(frozen=True)
class Run:
    """What a test looks at after the model is gone, so that the next one has the card to itself."""

    losses: list[float]
    steps: list[dict[str, Any]]
    peaks: list[float]
    weights: dict[str, torch.Tensor]


def train(base: Path, folder: Path, *, gpus: list[float] | None = None, **options: Any) -> Run:
    folder.mkdir(exist_ok=True, parents=True)
    torch._dynamo.reset()
    release_memory()
    for card in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(card)
    cards = gpus or [100.0]
    data = tiny.write_data(folder / "data.jsonl", repeats=4)
    places = Places(base=base, run=folder / "run", tensorboard=None)
    trained = train_lora(places=places, settings=settings(data, gpus=cards, **options), gpus=cards)
    steps, peaks = trained.history["steps"], trained.history["peak_gpu_gb"]
    weights = {name: weight.detach().cpu() for name, weight in trained.model.named_parameters() if weight.requires_grad}
    return Run([step["loss"] for step in steps], steps, peaks, weights)


@pytest.mark.parametrize("method", ["lora", "qlora", "int8"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_every_method_learns(method: str, precision: str, tiny_base: Path, tmp_path: Path) -> None:
    trained = train(tiny_base, tmp_path, method=method, precision=precision)
    assert sum(trained.losses[-3:]) < 0.8 * sum(trained.losses[:3])
    assert trained.peaks[0] > 0


@pytest.mark.parametrize("method", ["lora", "qlora", "int8"])
def test_compiled_blocks_give_the_same_losses(method: str, tiny_base: Path, tmp_path: Path) -> None:
    plain = train(tiny_base, tmp_path / "plain", method=method, max_steps=6)
    compiled = train(tiny_base, tmp_path / "compiled", method=method, max_steps=6, torch_compile="on")
    assert compiled.losses == pytest.approx(plain.losses, rel=0.03)


@pytest.mark.parametrize("method", ["lora", "qlora", "int8"])
def test_compiled_blocks_keep_their_checkpoints(method: str, wide_base: Path, tmp_path: Path) -> None:
    shared = {"method": method, "max_steps": 3, "gradient_checkpointing": True, "per_device_train_batch_size": 24}
    plain = train(wide_base, tmp_path / "plain", **shared)
    compiled = train(wide_base, tmp_path / "compiled", **shared, torch_compile="on")
    print("compiled", method, plain.peaks, compiled.peaks)
    assert compiled.peaks[0] < 1.1 * plain.peaks[0]


def test_memory_that_really_runs_out_splits_the_update(wide_base: Path, tmp_path: Path) -> None:
    """The card is limited to what a quarter of the batch needs, and the training goes on to its end."""
    batch = {"method": "lora", "precision": "bf16", "per_device_train_batch_size": 24, "max_steps": 3}
    whole = train(wide_base, tmp_path / "whole", **batch)
    quarter = train(wide_base, tmp_path / "quarter", **batch, micro_batching={"micro_batch_size": 6})
    room = quarter.peaks[0] * 1.15 * 1e9 / (1 << 30)
    assert room < 0.9 * whole.peaks[0] * 1e9 / (1 << 30)
    squeezed = train(wide_base, tmp_path / "squeezed", **batch, gpus=[room])
    assert squeezed.steps[-1]["micro_batch_size"] in (3, 6)
    assert len(squeezed.losses) == 3
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("method", ["lora", "qlora", "int8"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_streamed_weights_take_less_memory_and_give_the_same_result(
    method: str, place: str, wide_base: Path, tmp_path: Path
) -> None:
    shared = {"method": method, "precision": "bf16", "max_steps": 3, "gradient_checkpointing": True}
    plain = train(wide_base, tmp_path / "plain", **shared)
    offload = {f"use_{place}_offload": True, "offload_folder": str(tmp_path), "max_memory": {"0": "1MB"}}
    streamed = train(wide_base, tmp_path / "streamed", **shared, offload=offload)
    print(method, place, plain.peaks, streamed.peaks)
    assert streamed.peaks[0] < 0.75 * plain.peaks[0]
    assert streamed.losses == pytest.approx(plain.losses, rel=0.02)
    assert not list(tmp_path.glob("modelmill-offload-*"))


def test_activations_on_the_cpu_take_less_memory(wide_base: Path, tmp_path: Path) -> None:
    shared = {"method": "lora", "precision": "bf16", "max_steps": 3, "per_device_train_batch_size": 24}
    plain = train(wide_base, tmp_path / "plain", **shared)
    moved = train(wide_base, tmp_path / "moved", **shared, offload={"use_cpu_offload": True})
    print("activations", plain.peaks, moved.peaks)
    assert moved.peaks[0] < 0.8 * plain.peaks[0]
    assert moved.losses == plain.losses


@pytest.mark.parametrize("method", ["lora", "qlora", "int8"])
def test_deterministic_runs_are_the_same_bytes_also_after_a_restart(
    method: str, tiny_base: Path, tmp_path: Path
) -> None:
    options = {"method": method, "deterministic": True, "lora": {"r": 4, "lora_dropout": 0.2}, "save_steps": 5}
    straight = train(tiny_base, tmp_path / "straight", **options).weights
    again = train(tiny_base, tmp_path / "again", **options).weights
    # The checkpoint at step 20 of 24 stays; a new trainer goes on from it.
    rest = train(tiny_base, tmp_path / "again", **options)
    assert [step["step"] for step in rest.steps] == list(range(1, 25))
    for name, weight in straight.items():
        assert torch.equal(weight, again[name]), name
        assert torch.equal(weight, rest.weights[name]), name
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs on this machine")
@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("method", ["lora", "qlora", "int8"])
def test_two_cards_hold_one_model(method: str, compiled: str, wide_base: Path, tmp_path: Path) -> None:
    shared = {"method": method, "max_steps": 3, "gradient_checkpointing": True, "torch_compile": compiled}
    one = train(wide_base, tmp_path / "one", **shared)
    two = train(wide_base, tmp_path / "two", **shared, gpus=[100.0, 100.0])
    print(method, one.peaks, two.peaks)
    assert two.losses == pytest.approx(one.losses, rel=0.02)
    assert max(two.peaks) < 0.8 * one.peaks[0]


def test_gradients_agree_with_the_cpu(tiny_base: Path, tmp_path: Path) -> None:
    samples = runs.samples(5)
    found = []
    for device, gpus in (("cpu", []), ("cuda", [100.0])):
        run = settings(tmp_path / "unused", gpus=gpus, method="lora", precision="fp32", device=device)
        with ExitStack() as cleanup:
            torch.manual_seed(0)
            model = build_model(tiny_base, run, gpus=gpus, cleanup=cleanup)
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                weight.data = torch.randn(weight.shape, generator=generator).mul_(0.02).to(weight.device)
        arguments = trainer_arguments(run, tmp_path / device, evaluates=False)
        trained = AdapterTrainer(settings=run, pad=0, model=model, args=arguments, train_dataset=samples)
        trained.training_step(model, samples)
        found.append({name: weight.grad.cpu() for name, weight in trained.trained.items()})
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() / gradient.norm() < 1e-4, name
