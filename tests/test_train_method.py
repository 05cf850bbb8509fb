"""`method: auto` and the flags beside it: every branch of the table, at its edges."""

from __future__ import annotations

from typing import Any

import pytest

from lib.config import definition, with_defaults
from lib.train_method import MethodError, resolve_method


def resolve(parameters: float, gpus: list[float], **train: Any) -> dict[str, Any]:
    settings = with_defaults({"data": "x.jsonl", **train}, definition("train"))
    resolve_method(settings, parameters=int(parameters), gpus=gpus)
    return settings


@pytest.mark.parametrize(
    ("parameters", "gpus", "method", "precision"),
    [
        (32.8e9, [24, 24], "qlora", "bf16"),
        (20e9, [80], "qlora", "bf16"),
        (14e9, [80], "qlora", "bf16"),
        (10.1e9, [80], "qlora", "bf16"),
        (10e9, [16], "int8", "bf16"),
        (7.6e9, [24, 16], "int8", "bf16"),
        (7.6e9, [24, 15.9], "qlora", "bf16"),
        (6e9, [16], "int8", "bf16"),
        (5.9e9, [8], "int8", "bf16"),
        (2.5e9, [8], "int8", "bf16"),
        (2.5e9, [7.9], "qlora", "bf16"),
        (2.4e9, [80], "qlora", "bf16"),
        (1.5e9, [], "lora", "fp32"),
        (2e9, [], "lora", "fp32"),
        (2.1e9, [], "lora", "bf16"),
    ],
)
def test_auto(parameters: float, gpus: list[float], method: str, precision: str) -> None:
    settings = resolve(parameters, gpus)
    assert (settings["method"], settings["precision"]) == (method, precision)
    assert settings["device"] == ("cuda" if gpus else "cpu")
    assert settings["method_reason"].startswith("auto: ")
    assert f"{parameters / 1e9:.1f} B" in settings["method_reason"]


def test_auto_on_the_cpu_plans_no_gpu() -> None:
    settings = resolve(1.5e9, [24, 24], device="cpu")
    assert (settings["method"], settings["device"]) == ("lora", "cpu")


def test_the_reason_names_the_smallest_card() -> None:
    assert "smallest planned GPU 12 GiB (less than 16)" in resolve(7e9, [24, 12])["method_reason"]


@pytest.mark.parametrize(
    ("parameters", "gpus", "said"),
    [
        (32.8e9, [24, 24], "65.6 GB in 16 bits do not fit the 51.5 GB of all GPUs"),
        (8e9, [8], "16.0 GB in 16 bits do not fit the 8.6 GB of all GPUs"),
        (32.8e9, [80], None),
        (7.6e9, [24], None),
        (32.8e9, [], None),
    ],
)
def test_the_reason_says_where_16_bits_do_not_fit(parameters: float, gpus: list[float], said: str | None) -> None:
    """Then the method is never one that would hold 16 bits on the GPU: nothing has to fail first."""
    settings = resolve(parameters, gpus)
    assert settings["method_reason"].endswith(f"; {said}") if said else "do not fit" not in settings["method_reason"]
    assert said is None or settings["method"] in ("qlora", "int8")


def test_what_the_user_wrote_wins() -> None:
    settings = resolve(32e9, [24], method="lora", precision="fp16", learning_rate=3e-4)
    assert (settings["method"], settings["precision"], settings["learning_rate"]) == ("lora", "fp16", 3e-4)
    assert settings["method_reason"] == "as configured"
    assert resolve(1e9, [], precision="bf16")["precision"] == "bf16"


@pytest.mark.parametrize(("flag", "method"), [("load_in_4bit", "qlora"), ("load_in_8bit", "int8")])
def test_the_librarys_flags_say_the_method_too(flag: str, method: str) -> None:
    assert resolve(1e9, [], quantization={flag: True})["method"] == method
    assert resolve(1e9, [], method=method, quantization={flag: True})["method"] == method
    assert resolve(1e9, [], quantization={flag: False})["method"] == "lora"


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"quantization": {"load_in_4bit": True, "load_in_8bit": True}}, "load_in_4bit and load_in_8bit are both true"),
        (
            {"method": "int8", "quantization": {"load_in_4bit": True}},
            "method is int8 .as configured., but quantization.load_in_4bit is true",
        ),
        ({"method": "lora", "quantization": {"load_in_8bit": True}}, "method is lora .*load_in_8bit is true"),
        ({"method": "qlora", "quantization": {"load_in_4bit": False}}, "load_in_4bit is false"),
        ({"quantization": {"load_in_4bit": False}}, "method is qlora .auto: 1.0 B.*load_in_4bit is false"),
        ({"eval_data": "x.jsonl", "eval_fraction": 0.1}, "eval_data and eval_fraction both say what is held out"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs held-out data: set eval_data or"),
    ],
)
def test_contradictions_are_refused(train: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        resolve(1e9, [24], **train)
