"""Adapter folders: peft reads them, and the same adapter is the same bytes."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.adapter_folder import CONFIG, WEIGHTS, write_adapter
from lib.lora import read_lora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    folder = tmp_path_factory.mktemp("somewhere") / "base"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def adapted(base: Path, *, targets: list[str] = TARGETS, seed: int = 7, **settings: Any) -> Any:
    """A base with a random adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False, **settings)
    return get_peft_model(model, config)


def written(model: Any, folder: Path) -> Path:
    folder.mkdir()
    write_adapter(model, folder, base_name="maker/model")
    return folder


def test_peft_reads_it(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = adapted(base, lora_alpha=3, use_rslora=True)
    folder = written(model, tmp_path / "ours")
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


def test_it_says_what_pefts_own_folder_says(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = adapted(base)
    ours = written(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    found, theirs = (json.loads((folder / CONFIG).read_text()) for folder in (ours, tmp_path / "theirs"))
    assert theirs["base_model_name_or_path"] == str(base)
    assert {**theirs, "target_modules": sorted(TARGETS), "base_model_name_or_path": "maker/model"} == found
    tensors, expected = load_file(ours / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_the_same_adapter_is_the_same_bytes(base: Path, tmp_path: Path) -> None:
    one = written(adapted(base, exclude_modules=["x", "y", "z"]), tmp_path / "one")
    two = written(adapted(base, exclude_modules=["z", "y", "x"], targets=TARGETS[::-1]), tmp_path / "two")
    other = written(adapted(base, seed=8), tmp_path / "other")
    for name in (CONFIG, WEIGHTS):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert (one / WEIGHTS).read_bytes() != (other / WEIGHTS).read_bytes()


def test_names_are_sorted_and_no_path_is_told(base: Path, tmp_path: Path) -> None:
    text = (written(adapted(base), tmp_path / "x") / CONFIG).read_text()
    config = json.loads(text)
    assert config["target_modules"] == sorted(TARGETS)
    assert config["base_model_name_or_path"] == "maker/model"
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert list(config) == sorted(config)
    assert str(tmp_path) not in text
    assert str(base) not in text


def test_writing_leaves_the_model_trainable(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    before = model.peft_config["default"].to_dict()
    written(model, tmp_path / "x")
    assert model.peft_config["default"].to_dict() == before
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_others_may_read_the_weights(base: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE((written(adapted(base), tmp_path / "x") / WEIGHTS).stat().st_mode) == 0o644


def test_a_trained_adapter_can_be_merged(base: Path, tmp_path: Path) -> None:
    assert len(read_lora(written(adapted(base), tmp_path / "x"))) == len(TARGETS)


def test_no_network_is_asked(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft looks on the Hub whether the vocabulary was extended, where the base is no folder here."""
    from peft.utils import save_and_load

    asked: list[str] = []
    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", lambda name, *_, **__: asked.append(name))
    model = adapted(base)
    model.peft_config["default"].base_model_name_or_path = "maker/model"
    written(model, tmp_path / "x")
    assert asked == []
