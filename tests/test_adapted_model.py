"""The model that is trained: which of its parts are frozen, adapted, compiled and streamed, and what it cannot do."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training_runs as runs
from other_run import other_run
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lib.adapted_model import AdapterError, attach_adapter, build_model, check_packable
from lib.offload import decoder_blocks

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def built(base: Path, **train: Any) -> Any:
    with ExitStack() as cleanup:
        return build_model(base, runs.settings(**train), gpus=[], cleanup=cleanup)


@pytest.mark.parametrize("method", ["lora", "qlora", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_adapter_alone_is_trained_and_in_float32(method: str, precision: str, tiny_base: Path) -> None:
    model = built(tiny_base, method=method, precision=precision)
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * len(LINEARS)
    assert all("lora_" in name for name in trained)
    assert set(trained.values()) == {torch.float32}


@pytest.mark.parametrize(("targets", "adapted"), [([], LINEARS), (["q_proj", "lm_head"], {"q_proj", "lm_head"})])
def test_which_layers_are_adapted(targets: list[str], adapted: set[str], tiny_base: Path) -> None:
    """By default the linear layers that all methods quantize: not the output head."""
    model = built(tiny_base, lora={"r": 4, "target_modules": targets})
    assert {
        name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name
    } == adapted


def test_one_layer_of_a_block_can_be_named(tiny_base: Path) -> None:
    model = built(tiny_base, lora={"r": 4, "target_modules": ["layers.1.mlp.up_proj"]})
    adapted = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(adapted) == 1 and "layers.1.mlp.up_proj" in adapted[0]


def test_layers_that_are_not_there_are_all_named(tiny_base: Path) -> None:
    with pytest.raises(AdapterError, match=r"'q_prj'; did you mean 'q_proj'\?; 'gateproj'; did you mean 'gate_proj'\?"):
        built(tiny_base, lora={"target_modules": ["q_prj", "v_proj", "gateproj"]})


@pytest.fixture
def compiled_functions(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """What is given to torch.compile, which runs it by itself here."""
    given: list[Callable[..., Any]] = []

    def run_as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
        given.append(function)
        return function

    monkeypatch.setattr(torch, "compile", run_as_it_is)
    return given


@pytest.mark.parametrize(("setting", "compiled"), [("on", 2), ("auto", 0), ("off", 0)])
def test_which_runs_are_compiled(
    setting: str, compiled: int, compiled_functions: list[Callable[..., Any]], tiny_base: Path
) -> None:
    """`auto` compiles on a GPU alone."""
    blocks = decoder_blocks(built(tiny_base, torch_compile=setting))
    assert len(blocks) == 2
    assert len(compiled_functions) == compiled


@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpoints_stay_outside_of_what_is_compiled(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    inside, entered = [], []

    def watch(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*inputs: Any, **named: Any) -> Any:
            inside.append(True)
            result = function(*inputs, **named)
            inside.pop()
            return result

        return watched

    monkeypatch.setattr(torch, "compile", watch)
    model = built(tiny_base, torch_compile="on", gradient_checkpointing=checkpointing).train()
    for block in decoder_blocks(model):

        def checkpoint(function: Callable[..., Any], *inputs: Any) -> Any:
            entered.append(bool(inside))
            return function(*inputs)

        block._gradient_checkpointing_func = checkpoint
    model(torch.arange(8)[None])
    assert entered == ([False, False] if checkpointing else [])
    model.eval()(torch.arange(8)[None])
    assert len(entered) == (2 if checkpointing else 0)


def test_streamed_blocks_are_not_compiled_but_checkpointed(
    compiled_functions: list[Callable[..., Any]], tiny_base: Path
) -> None:
    model = built(tiny_base, torch_compile="on", offload={"use_disk_offload": True, "max_memory": {"cpu": "0MB"}})
    assert not compiled_functions
    assert all(block.gradient_checkpointing for block in decoder_blocks(model))


def test_with_room_for_all_nothing_is_streamed(tiny_base: Path) -> None:
    asked = {"use_disk_offload": True, "max_memory": {"cpu": "1GB"}}
    model = built(tiny_base, offload=asked)
    weights = [block.mlp.up_proj.base_layer.weight for block in decoder_blocks(model)]
    assert all(weight.untyped_storage().nbytes() == weight.nbytes > 0 for weight in weights)


def small(kind: str) -> Any:
    sizes = {**tiny.SHAPE, "hidden_size": 64, "intermediate_size": 96}
    if kind == "Gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=16))
    windowed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1} if kind != "Qwen2" else {}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **windowed))


@pytest.mark.parametrize("kind", ["Gemma2", "Qwen2 in windows"])
def test_samples_cannot_be_packed_where_a_window_is_attended_to(kind: str) -> None:
    model = attach_adapter(small(kind), runs.settings(), gradient_checkpointing=False)
    with pytest.raises(AdapterError, match="packing: the model has layers of sliding_attention.*set packing: false"):
        check_packable(model)


def test_samples_cannot_be_packed_for_an_attention_that_takes_no_mask() -> None:
    model = attach_adapter(small("Qwen2"), runs.settings(), gradient_checkpointing=False)
    check_packable(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(AdapterError, match="packing: the model has the attention flash_attention_2"):
        check_packable(model)


def test_files_of_streamed_weights_do_not_outlive_their_run_for_long(tiny_base: Path, tmp_path: Path) -> None:
    """A run that is killed leaves up to the base's size behind; the next one there removes it."""
    offload = {"use_disk_offload": True, "offload_folder": str(tmp_path), "max_memory": {"cpu": "0MB"}}
    ours = f"modelmill-offload-{os.uname().nodename}-"
    names = {"killed": f"{ours}1", "alive": f"{ours}2", "elsewhere": "modelmill-offload-elsewhere-1"}
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "block-0000.bin").touch()
    for name in ("killed", "elsewhere"):
        (tmp_path / f".{names[name]}.lock").touch()
    with other_run(tmp_path / names["alive"]), ExitStack() as cleanup:
        build_model(tiny_base, runs.settings(offload=offload), gpus=[], cleanup=cleanup)
        folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
        assert folders == {names["alive"], names["elsewhere"], f"{ours}{os.getpid()}"}
        assert not (tmp_path / f".{names['killed']}.lock").exists()
    assert not (tmp_path / f"{ours}{os.getpid()}").exists()
