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
from lib.lora import LoraError, Update, check_mergeable, read_lora, read_targets

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
    updates = read_lora(write(tmp_path, factors(OTHER) | factors(LAYER)))
    assert list(updates) == [f"{OTHER}.weight", f"{LAYER}.weight"]
    update = updates[f"{LAYER}.weight"]
    assert update == Update(low_rank=update.low_rank)
    found = update.low_rank
    assert found is not None
    assert (found.a.shape, found.b.shape) == ((2, 4), (6, 2))
    assert (found.scale, found.transposed, found.magnitude) == (4.0, False, None)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"lora_alpha": 32}, 2.0),
        ({"lora_alpha": 32, "use_rslora": False}, 2.0),
        ({"lora_alpha": 32, "use_rslora": True}, 8.0),
        ({"lora_alpha": 8}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 32}}, 2.0),
        ({"lora_alpha": 8, "alpha_pattern": {"k_proj": 32}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {LAYER: 24, "q_proj": 32}}, 1.5),
        ({"lora_alpha": 8, "alpha_pattern": {r"layers\.0\..*": 24, "q_proj": 32}, "use_rslora": True}, 6.0),
        ({"lora_alpha": 8, "alpha_pattern": {"proj": 32, "0.self_attn": 64}}, 0.5),
        ({"r": 8, "rank_pattern": {"q_proj": 16}, "lora_alpha": 8}, 0.5),
        ({"lora_alpha": 3, "use_rslora": True}, 3 / math.sqrt(16)),
    ],
)
def test_scale(settings: dict[str, Any], scale: float, tmp_path: Path) -> None:
    """By the weight's own rank; of patterns the first one counts that ends a name at a dot."""
    folder = write(tmp_path, factors(rank=16), peft_config(**{"r": 16, **settings}))
    found = read_lora(folder)[f"{LAYER}.weight"].low_rank
    assert found is not None and found.scale == scale


def named(**tensors: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Tensors of the layer by the part of it."""
    return {
        f"base_model.model.{LAYER}.{name.replace('__', '.')}": np.ones(s, np.float32) for name, s in tensors.items()
    }


def test_dora(tmp_path: Path) -> None:
    """The magnitude has no suffix when peft saves it; older versions gave it one."""
    for name in ("lora_magnitude_vector", "lora_magnitude_vector__weight"):
        folder = write(tmp_path, factors() | named(**{name: (6,)}), peft_config(use_dora=True))
        found = read_lora(folder)[f"{LAYER}.weight"].low_rank
        assert found is not None and found.magnitude is not None
        assert found.magnitude.shape == (6,)


def test_a_bias_of_b_and_a_trained_one(tmp_path: Path) -> None:
    tensors = factors() | named(lora_B__bias=(6,), base_layer__bias=(6,))
    updates = read_lora(write(tmp_path, tensors, peft_config(lora_bias=True, bias="lora_only")))
    bias = updates[f"{LAYER}.bias"]
    assert bias.added is not None and bias.added[1] == 4.0
    assert bias.replaced is not None and bias.replaced.name.endswith("base_layer.bias")


def test_biases_belong_to_an_adapter_only_if_it_trained_them(tmp_path: Path) -> None:
    tensors = factors() | {"base_model.model.model.norm.bias": np.ones(4, np.float32)}
    assert "model.norm.bias" in read_lora(write(tmp_path, tensors, peft_config(bias="all")))
    with pytest.raises(LoraError, match=r"model\.norm\.bias: neither a LoRA factor nor a module"):
        read_lora(write(tmp_path, tensors))


def test_lora_on_an_embedding(tmp_path: Path) -> None:
    stem = "base_model.model.model.embed_tokens"
    tensors = {f"{stem}.lora_embedding_A": np.ones((2, 9), np.float32)}
    tensors |= {f"{stem}.lora_embedding_B": np.ones((4, 2), np.float32)}
    found = read_lora(write(tmp_path, tensors))["model.embed_tokens.weight"].low_rank
    assert found is not None and found.transposed


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("saved", "name", "whole"),
    [
        (["embed_tokens"], "model.embed_tokens", True),
        (["model.embed_tokens"], "model.embed_tokens", True),
        (["tokens"], "model.embed_tokens", True),
        (["norm"], "model.layers.0.input_layernorm", True),
        (["mlp"], "model.layers.0.mlp.up_proj", True),
        (None, "model.embed_tokens", False),
        (["norm"], "lm_head", False),
    ],
)
def test_saved_modules(saved: list[str] | None, name: str, whole: bool, kept: bool, tmp_path: Path) -> None:
    """Embeddings that peft saved of itself are the base's, so a tied head follows them; trained ones only if asked."""
    tensors = factors("model.x") | {f"base_model.model.{name}.weight": np.ones((9, 4), np.float32)}
    config = peft_config(modules_to_save=saved, ensure_weight_tying=kept)
    update = read_lora(write(tmp_path, tensors, config))[f"{name}.weight"]
    assert update.replaced is not None
    assert update.tied is (kept or not whole)


def test_what_peft_writes_of_a_saved_embedding_that_grew(tmp_path: Path) -> None:
    """Its trained values twice, and the untrained ones."""
    stem, ones = "base_model.model.lm_head", np.ones((9, 4), np.float32)
    tensors = {
        f"{stem}.weight": ones,
        f"{stem}.modules_to_save.weight": ones,
        f"{stem}.original_module.weight": ones * 2,
    }
    updates = read_lora(write(tmp_path, tensors, peft_config(modules_to_save=["lm_head"])))
    assert list(updates) == ["lm_head.weight"]
    replaced = updates["lm_head.weight"].replaced
    assert replaced is not None and "original" not in replaced.name


@pytest.mark.parametrize(
    ("indices", "expected"),
    [([7, 2], (7, 2)), ({"embed_tokens": [7, 2], "lm_head": [1]}, (7, 2)), ({"model.embed_tokens": [7, 2]}, (7, 2))],
)
def test_trained_tokens(indices: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    folder = write(tmp_path, {name: np.ones((2, 4), np.float32)}, peft_config(trainable_token_indices=indices))
    rows = read_lora(folder)["model.embed_tokens.weight"].rows
    assert rows is not None and rows[1] == expected


@pytest.mark.parametrize("target", ["q_proj", "self_attn.q_proj", LAYER, ".*q_proj", r".*\.0\..*_proj"])
@pytest.mark.parametrize("module", [LAYER, OTHER, LAYER.replace(".0.", ".1."), "q_proj", "model.xq_proj", "lm_head"])
def test_targets_are_pefts(target: str, module: str, tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    targets: Any = target if "*" in target else [target, "lm_head"]
    layers: list[dict[str, Any]] = [{}]
    if not isinstance(targets, str):
        layers += [{"layers_to_transform": 1}, {"layers_to_transform": [0, 2]}, {"layers_to_transform": []}]
        layers += [
            {"layers_to_transform": [0], "layers_pattern": pattern} for pattern in ("layers", ["h", "layers"], "h")
        ]
    others: list[dict[str, Any]] = [{}, {"exclude_modules": ["lm_head", "0.self_attn.q_proj"]}]
    others += [{"exclude_modules": ".*q_proj"}, {"modules_to_save": ["lm_head", "self_attn"]}]
    for settings in ({**layer, **other} for layer in layers for other in others):
        right = check_target_module_exists(LoraConfig(target_modules=targets, **settings), module)
        (tmp_path / CONFIG).write_text(json.dumps(peft_config(target_modules=targets, **settings)))
        assert read_targets(tmp_path)(module) is bool(right), settings


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
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["experts.weight"]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
        ("arrow_config", {"top_k": 2}),
        ("a_field_of_tomorrow", None),
    ],
)
def test_what_cannot_be_merged_is_named(field: str, value: Any) -> None:
    with pytest.raises(LoraError, match=rf"^x\.json:\n  {field}: ") as refused:
        check_mergeable(peft_config(**{field: value}), where=Path("x.json"))
    assert len(str(refused.value).splitlines()) == 2


def test_all_that_cannot_be_merged_is_listed() -> None:
    config = peft_config(use_qalora=True, init_lora_weights="pissa", a_field_of_tomorrow=1, r=None)
    with pytest.raises(LoraError) as refused:
        check_mergeable(config, where=Path("x.json"))
    fields = [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]]
    assert fields == ["r", "a_field_of_tomorrow", "init_lora_weights", "use_qalora"]


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
    for name in (f"{LAYER}.lora_magnitude_vector", "model.norm.weight", "model.embed_tokens.lora_embedding_A"):
        tensors[f"base_model.model.{name}"] = np.ones(3, np.float32)
    tensors["base_model.model.lone.lora_B.bias"] = np.ones(3, np.float32)
    tensors["model.layers.1.self_attn.q_proj.lora_A.weight"] = np.ones((2, 4), np.float32)
    with pytest.raises(LoraError) as refused:
        read_lora(write(tmp_path, tensors))
    assert sorted(line.strip() for line in str(refused.value).splitlines()[1:]) == [
        f"base_model.model.model.norm.weight: neither a LoRA factor nor a module that {CONFIG} says is saved",
        "lone.weight: parts of a LoRA without its factors",
        "model.embed_tokens.weight: only one of its two factors is there",
        f"{OTHER}.weight: only one of its two factors is there",
        f"{LAYER}.weight: {CONFIG} and its tensors disagree about DoRA",
        "model.layers.1.self_attn.q_proj.lora_A.weight: neither a LoRA factor nor a module that "
        f"{CONFIG} says is saved",
    ]


def test_an_empty_adapter(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="it is empty"):
        read_lora(write(tmp_path, {}))


def test_errors_are_the_users() -> None:
    """So that scripts print them without a traceback."""
    assert issubclass(LoraError, ModelmillError)
