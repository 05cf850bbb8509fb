"""What steps need: plausible for the reference machine, and growing with the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import SHAPE

from lib import estimate
from lib.estimate import Needs
from lib.spec import Hardware, Model, Project, Shape, resolve_project

ROOT = Path(__file__).resolve().parents[1]
GIB_IN_MB = (1 << 30) / 1e6
EVERY_STEP: dict[str, Callable[[Model, Hardware], Needs]] = {
    "fetch": lambda model, _: estimate.fetch_needs(model),
    "train": estimate.train_needs,
    "merge": lambda model, _: estimate.merge_needs(model),
    "convert": lambda model, _: estimate.convert_needs(model),
    "quantize": lambda model, _: estimate.quantize_needs(model, "q4_k_m"),
    "imatrix": estimate.imatrix_needs,
    "answer": lambda model, _: estimate.answer_needs(model, "q4_k_m"),
    "build": lambda *_: estimate.build_needs(),
    "small": lambda *_: estimate.small_needs(),
}
STEPS = pytest.mark.parametrize("step", EVERY_STEP)


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> Project:
    """The shipped config, with an importance matrix for each model."""
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    for model in (each for each in config["models"].values() if "kind" not in each):
        model["quantize"] = {"imatrix": {"text": "data/demo.jsonl"}}
    return resolve_project(config)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Project]:
    """A project of one model of a shape, with these training settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talks.jsonl").write_text("{}\n")
    (tmp_path / "read.txt").write_text("A sentence.\n" * 200)

    def project(shape: dict[str, Any], *, gpus: list[float], **train: Any) -> Project:
        model = {
            "base": {"hub": "maker/model", "revision": "main", "shape": shape},
            "adapter": {"train": {"data": "talks.jsonl", **train}},
            "quantize": {"imatrix": {"text": "read.txt"}},
        }
        return resolve_project({"hardware": {"gpus": gpus}, "models": {"m": model}})

    return project


@STEPS
@pytest.mark.parametrize("name", ["demo", "deepseek32b"])
def test_all_numbers_are_whole_and_positive(step: str, name: str, shipped: Project) -> None:
    needs = EVERY_STEP[step](shipped.models[name], shipped.hardware)
    numbers = dataclasses.asdict(needs)
    assert {key: value for key, value in numbers.items() if type(value) is not int} == {}
    assert min(needs.mem_mb, needs.disk_mb, needs.runtime) > 0
    assert (needs.gpu > 0) == (needs.gpu_mem_mb > 0)
    assert (needs.gpu > 0) == (step == "train" and name == "deepseek32b")


def test_the_reference_model_trains_on_two_cards(shipped: Project) -> None:
    needs = estimate.train_needs(shipped.models["deepseek32b"], shipped.hardware)
    assert needs.gpu == 2
    # Not merely cut to the card: the 4-bit weights alone are half of 32.76e9 * 4.127 bits on each.
    assert 32.76e9 * 4.127 / 8 / 1e6 / 2 < needs.gpu_mem_mb < 0.95 * 24 * GIB_IN_MB
    assert needs.mem_mb < 48 * GIB_IN_MB


def test_the_reference_machine_holds_every_step_of_the_reference_model(shipped: Project) -> None:
    model, hardware = shipped.models["deepseek32b"], shipped.hardware
    for step, needs in EVERY_STEP.items():
        assert needs(model, hardware).mem_mb < hardware.ram * GIB_IN_MB, step
        assert needs(model, hardware).disk_mb < hardware.disk * GIB_IN_MB, step


@STEPS
@pytest.mark.parametrize("gpus", [[], [10000.0]], ids=["cpu", "gpu"])
@pytest.mark.parametrize("key", [key for key in SHAPE if key not in ("num_attention_heads", "tie_word_embeddings")])
def test_a_larger_model_never_needs_less(step: str, gpus: list[float], key: str, make: Callable[..., Project]) -> None:
    """On one card that holds anything, since a share of several cards may shrink as cards are added."""
    found = []
    for factor in (1, 10, 1000):
        shape = {**SHAPE, key: SHAPE[key] * factor, "head_dim": 16}
        if key == "num_key_value_heads":  # which cannot be more than there are query heads
            shape["num_attention_heads"] *= factor
        project = make(shape, gpus=gpus)
        found.append(dataclasses.astuple(EVERY_STEP[step](project.models["m"], project.hardware)))
    for smaller, larger in zip(found, found[1:], strict=False):
        assert all(less <= more for less, more in zip(smaller, larger, strict=True))


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"lora": {"r": 8}}, {"lora": {"r": 256}}),
        ({"per_device_train_batch_size": 1}, {"per_device_train_batch_size": 8}),
        ({"max_length": 256}, {"max_length": 4096}),
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({"method": "qlora"}, {"method": "lora"}),
        # Without checkpoints int8 keeps more activations than it saves of the weights of a small model.
        ({"method": "int8", "gradient_checkpointing": True}, {"method": "lora", "gradient_checkpointing": True}),
        ({"method": "qlora"}, {"method": "int8"}),
        ({"method": "lora", "precision": "bf16"}, {"method": "lora", "precision": "fp32"}),
    ],
)
@pytest.mark.parametrize("gpus", [[], [10000.0]], ids=["cpu", "gpu"])
def test_settings_that_take_memory(
    less: dict[str, Any], more: dict[str, Any], gpus: list[float], make: Callable[..., Project]
) -> None:
    shape = {**SHAPE, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "vocab_size": 32000}
    small, large = (make(shape, gpus=gpus, **settings) for settings in (less, more))
    small, large = (estimate.train_needs(each.models["m"], each.hardware) for each in (small, large))
    assert small.gpu_mem_mb + small.mem_mb < large.gpu_mem_mb + large.mem_mb


@pytest.mark.parametrize(
    ("quant", "published"),
    # Sizes in bytes that are published for DeepSeek-R1-Distill-Qwen-32B in each type.
    [("f16", 65.5e9), ("q8_0", 34.8e9), ("q6_k", 26.9e9), ("q5_k_m", 23.3e9), ("q4_k_m", 19.9e9), ("q2_k", 12.3e9)],
)
def test_sizes_of_quantized_files(quant: str, published: float, shipped: Project) -> None:
    assert estimate.weight_bytes(shipped.models["deepseek32b"], quant) == pytest.approx(published, rel=0.06)


def test_rows_that_a_type_cannot_hold_take_more(shipped: Project) -> None:
    """Rows of the demo are no multiple of 256: Q4_K falls back to Q5_0 (5.5 bits), Q6_K to Q8_0 (8.5 bits)."""
    model = shipped.models["demo"]
    shape = estimate.shape_of(model)
    assert shape.hidden_size % 256
    # The down projections' rows, 1536 wide, are the ones that fit: left out here.
    rows_of_576 = shape.parameters - shape.num_hidden_layers * shape.hidden_size * shape.intermediate_size
    least = ((rows_of_576 - shape.embedding) * 5.5 + shape.embedding * 8.5) / 8
    least += shape.num_hidden_layers * shape.hidden_size * shape.intermediate_size * 4.5 / 8
    assert estimate.quantize_needs(model, "q4_k_m").disk_mb * 1e6 >= least


@pytest.mark.parametrize("head_dim", [None, 32])
@pytest.mark.parametrize("rank", [1, 8])
def test_adapter_size_is_pefts(rank: int, head_dim: int | None) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen3Config

    head = head_dim or SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**{**SHAPE, "head_dim": head}))
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear")
        trainable, _ = get_peft_model(model, config).get_nb_trainable_parameters()
    assert estimate.lora_parameters(Shape(**SHAPE, head_dim=head_dim), rank) == trainable


def test_without_an_adapter_nothing_is_trained(shipped: Project) -> None:
    model = dataclasses.replace(shipped.models["demo"], adapter=None)
    assert estimate.train_needs(model, shipped.hardware) == estimate.small_needs()


def test_a_matrix_asks_for_no_more_than_the_planned_machine_has(shipped: Project) -> None:
    """Its 65 GB of weights are mapped: 48 GiB do, if more slowly."""
    model = shipped.models["deepseek32b"]
    few, more, plenty = (
        estimate.imatrix_needs(model, dataclasses.replace(shipped.hardware, ram=ram)).mem_mb for ram in (2, 48, 256)
    )
    assert 1_500 < few < 2_200 < more < 48 * GIB_IN_MB < 65_500 < plenty < 80_000


def test_without_a_matrix_nothing_is_computed(shipped: Project) -> None:
    model = shipped.models["demo"]
    model = dataclasses.replace(model, quantize=dataclasses.replace(model.quantize, imatrix=None))
    assert estimate.imatrix_needs(model, shipped.hardware) == estimate.small_needs()


def test_a_base_that_is_used_in_place_takes_no_room(shipped: Project) -> None:
    model = shipped.models["deepseek32b"]
    local = dataclasses.replace(model, base=dataclasses.replace(model.base, hub=None, path="own"))
    assert estimate.fetch_needs(local).disk_mb < 100 < estimate.fetch_needs(model).disk_mb


def test_planning_imports_nothing_heavy() -> None:
    """A dry run has to work without torch, and fast."""
    import subprocess
    import sys

    program = "import sys, lib.estimate, lib.spec, lib.targets, lib.options, lib.code; print(*sys.modules)"
    environment = {"PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert {"torch", "transformers", "peft", "numpy", "huggingface_hub"} & set(done.stdout.split()) == set()
