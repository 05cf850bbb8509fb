"""Reading adapters in peft's format, and refusing what could not be merged exactly."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lib import lora
from lib.adapter_folder import CONFIG, WEIGHTS
from lib.checkpoint import CheckpointError
from lib.errors import ModelmillError
from lib.lora import LoraError, check_mergeable, check_pairs, lora_scale, read_lora
from lib.safetensors_file import StoredTensor

LAYER = "model.layers.0.self_attn.q_proj"
OTHER = "model.layers.0.mlp.up_proj"


def peft_config(**changes: Any) -> dict[str, Any]:
    """What the installed peft writes into adapter_config.json."""
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, target_modules=["q_proj"]).to_dict()
    return json.loads(json.dumps({**config, **changes}, default=list))


def factors(layer: str = LAYER, *, rank: int = 2, rows: int = 6, columns: int = 4) -> dict[str, np.ndarray]:
    name = f"base_model.model.{layer}"
    return {
        f"{name}.lora_A.weight": np.ones((rank, columns), np.float32),
        f"{name}.lora_B.weight": np.ones((rows, rank), np.float32),
    }


def write(folder: Path, tensors: dict[str, np.ndarray], config: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    text = config if isinstance(config, str) else json.dumps(peft_config() if config is None else config)
    (folder / CONFIG).write_text(text)
    return folder


def test_every_field_of_the_installed_peft_is_settled_once() -> None:
    from peft import LoraConfig

    groups = [set(lora.MERGED), set(lora.WITHOUT_EFFECT), set(lora.NEUTRAL)]
    assert set().union(*groups) == {field.name for field in dataclasses.fields(LoraConfig)}
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_pefts_own_defaults_can_be_merged() -> None:
    check_mergeable(peft_config(), where=Path(CONFIG))


def test_an_adapter_is_read(tmp_path: Path) -> None:
    pairs = read_lora(write(tmp_path, factors(OTHER) | factors(LAYER)))
    assert list(pairs) == [f"{OTHER}.weight", f"{LAYER}.weight"]
    pair = pairs[f"{LAYER}.weight"]
    assert (pair.a.shape, pair.b.shape) == ((2, 4), (6, 2))
    assert pair.scale == 4.0


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 32}, 2.0),
        ({"lora_alpha": 32, "use_rslora": False}, 2.0),
        ({"lora_alpha": 32, "use_rslora": True}, 8.0),
        ({"lora_alpha": 8}, 0.5),
    ],
)
def test_scale(settings: dict[str, Any], scale: float) -> None:
    assert lora_scale(settings, rank=16) == scale
    assert lora_scale({"lora_alpha": 3, "use_rslora": True}, rank=7) == 3 / math.sqrt(7)


@pytest.mark.parametrize("missing", [[CONFIG], [WEIGHTS], [CONFIG, WEIGHTS]])
def test_missing_files_are_named(missing: list[str], tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter", factors())
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(LoraError, match=" and ".join(missing) + " missing"):
        read_lora(folder)


@pytest.mark.parametrize("config", ["{", "", "[]", "null"])
def test_a_damaged_config(config: str, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=CONFIG):
        read_lora(write(tmp_path, factors(), config))


def test_damaged_weights(tmp_path: Path) -> None:
    folder = write(tmp_path, factors())
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    with pytest.raises((LoraError, CheckpointError), match=WEIGHTS):
        read_lora(folder)


@pytest.mark.parametrize("kind", ["LOHA", "IA3", None])
def test_another_kind_of_adapter(kind: str | None, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=rf"peft_type is {kind!r}; only LORA can be merged"):
        read_lora(write(tmp_path, factors(), peft_config(peft_type=kind)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 2]]),
        ("lora_bias", True),
        ("a_field_of_tomorrow", None),
    ],
)
def test_what_cannot_be_merged_is_named(field: str, value: Any) -> None:
    with pytest.raises(LoraError, match=rf"^x\.json:\n  {field}: ") as refused:
        check_mergeable(peft_config(**{field: value}), where=Path("x.json"))
    assert len(str(refused.value).splitlines()) == 2


def test_all_that_cannot_be_merged_is_listed() -> None:
    config = peft_config(use_dora=True, bias="all", rank_pattern={"q_proj": 4}, a_field_of_tomorrow=1)
    with pytest.raises(LoraError) as refused:
        check_mergeable(config, where=Path("x.json"))
    fields = [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]]
    assert fields == ["a_field_of_tomorrow", "bias", "rank_pattern", "use_dora"]


@pytest.mark.parametrize("field", ["lora_alpha", "r"])
def test_a_config_without_what_the_merge_needs(field: str, tmp_path: Path) -> None:
    config = peft_config()
    del config[field]
    with pytest.raises(LoraError, match=field):
        read_lora(write(tmp_path, factors(), config))


def test_factors_of_another_rank_than_the_config_says(tmp_path: Path) -> None:
    """peft refuses to load such an adapter; a scale by either rank would be a guess."""
    with pytest.raises(LoraError, match="rank"):
        read_lora(write(tmp_path, factors(rank=3)))


def test_all_that_is_no_pair_is_listed(tmp_path: Path) -> None:
    tensors = factors() | factors(OTHER)
    del tensors[f"base_model.model.{OTHER}.lora_B.weight"]
    for name in (f"{LAYER}.lora_magnitude_vector", "lm_head.weight", "model.embed_tokens.lora_embedding_A"):
        tensors[f"base_model.model.{name}"] = np.ones(3, np.float32)
    tensors["model.layers.1.self_attn.q_proj.lora_A.weight"] = np.ones((2, 4), np.float32)
    with pytest.raises(LoraError) as refused:
        read_lora(write(tmp_path, tensors))
    text = str(refused.value)
    assert text.count("no LoRA factor") == 4
    assert f"{OTHER}.weight: only one of its two factors is there" in text
    assert f"{LAYER}.weight" not in text


def test_an_empty_adapter(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="it is empty"):
        read_lora(write(tmp_path, {}))


def stored(name: str, shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(name=name, dtype="F16", shape=shape, file=Path("x"), offset=0)


def test_pairs_that_fit(tmp_path: Path) -> None:
    pairs = read_lora(write(tmp_path, factors() | factors(OTHER, rows=8, columns=6)))
    tensors = {f"{LAYER}.weight": stored("q", (6, 4)), f"{OTHER}.weight": stored("u", (8, 6))}
    check_pairs(pairs, tensors | {"lm_head.weight": stored("h", (9, 4))}, where=tmp_path)


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    layers = {"turned": (4, 6), "wide": (6, 5), "tall": (7, 4), "flat": (24,), "deep": (6, 2, 2), "right": (6, 4)}
    tensors: dict[str, np.ndarray] = {}
    for layer in [*layers, "absent"]:
        tensors |= factors(layer)
    tensors |= {"base_model.model.torn.lora_B.weight": np.ones((6, 3), np.float32)}
    tensors |= {"base_model.model.torn.lora_A.weight": np.ones((2, 4), np.float32)}
    weights = {f"{layer}.weight": stored(layer, shape) for layer, shape in {**layers, "torn": (6, 4)}.items()}
    pairs = read_lora(write(tmp_path, tensors))
    with pytest.raises(LoraError, match="does not fit this base") as refused:
        check_pairs(pairs, weights, where=tmp_path)
    lines = {line.split(".weight: ")[0].strip(): line for line in str(refused.value).splitlines()[1:]}
    assert lines.keys() == {"turned", "wide", "tall", "flat", "deep", "absent", "torn"}
    assert "the base has no such weight" in lines["absent"]
    assert all(shape in lines["turned"] for shape in ("(4, 6)", "(2, 4)", "(6, 2)"))


def test_errors_are_the_users() -> None:
    """So that scripts print them without a traceback."""
    assert issubclass(LoraError, ModelmillError)
