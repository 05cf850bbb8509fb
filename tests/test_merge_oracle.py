"""
Merged checkpoints against peft: the unmerged model's logits, and the tensors of its own merge.

The unmerged model is the oracle for tied embeddings, since peft's merge changes both of a pair of which training
changed one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_adapter import merge_adapter
from safetensors.torch import load_file, save_file
from test_merge import unit_in_last_place

from lib.adapter_folder import CONFIG, WEIGHTS
from lib.lora import LoraError, read_targets

VOCABULARY, GROWN = 80, 88
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

Tensors = dict[str, torch.Tensor]


def llama(*, tied: bool = False) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    return LlamaForCausalLM(config)


def tied_llama() -> torch.nn.Module:
    return llama(tied=True)


def gpt2() -> torch.nn.Module:
    """Its linear layers are stored (in, out), and its output head is tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))


@dataclass(frozen=True)
class Case:
    """A model, how it is adapted, and what its merge has to be."""

    make: Callable[[], torch.nn.Module]
    settings: dict[str, Any]
    untied: bool = False  # a tied pair is taken apart
    grown: bool = False  # the vocabulary was resized before training


def of_llama(**settings: Any) -> Case:
    return Case(llama, settings)


PATTERNS = {
    "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\..*": 6},
    "alpha_pattern": {"o_proj": 11, "model.layers.0.mlp.up_proj": 3},
}
CONV = {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}
Q = {"target_modules": ["q_proj"]}
CASES = {
    "plain": of_llama(target_modules=LINEAR),
    "all-linear": of_llama(target_modules="all-linear"),
    "regular expression": of_llama(target_modules=r".*\.1\.(mlp|self_attn)\.[a-z]+_proj"),
    "rsLoRA": of_llama(target_modules=LINEAR, use_rslora=True, lora_alpha=7),
    "DoRA": of_llama(target_modules=LINEAR, use_dora=True),
    "DoRA, embedding and head": of_llama(target_modules=["embed_tokens", "lm_head", "q_proj"], use_dora=True),
    "patterns": of_llama(target_modules=LINEAR, **PATTERNS),
    "layers": of_llama(target_modules=LINEAR, layers_to_transform=[1]),
    "layers by pattern": of_llama(target_modules=LINEAR, layers_to_transform=0, layers_pattern="layers"),
    "excluded": of_llama(target_modules=LINEAR, exclude_modules=["k_proj", "model.layers.0.mlp.up_proj"]),
    "orthogonal": of_llama(target_modules=LINEAR, init_lora_weights="orthogonal"),
    "bias all": of_llama(target_modules=LINEAR, bias="all"),
    "bias lora_only": of_llama(**Q, bias="lora_only"),
    "lora_bias": of_llama(**Q, lora_bias=True),
    "embedding and head": of_llama(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "saved embedding and head": of_llama(**Q, modules_to_save=["lm_head", "embed_tokens"]),
    "saved norm": of_llama(**Q, modules_to_save=["input_layernorm"]),
    "saved by the end of a name": of_llama(**Q, modules_to_save=["layernorm"]),
    "saved block": of_llama(**Q, modules_to_save=["mlp"]),
    "tokens": of_llama(**Q, trainable_token_indices=[5, 3]),
    "tokens of both": of_llama(**Q, trainable_token_indices={"lm_head": [1], "embed_tokens": [3, 5]}),
    "tied, embedding": Case(tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}, untied=True),
    "tied, head": Case(tied_llama, {"target_modules": ["lm_head", "q_proj"]}, untied=True),
    "tied, LoRA kept tied": Case(
        tied_llama, {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, untied=True
    ),
    "tied, saved embedding": Case(tied_llama, {**Q, "modules_to_save": ["embed_tokens"]}, untied=True),
    "tied, saved head": Case(tied_llama, {**Q, "modules_to_save": ["lm_head"]}, untied=True),
    "tied, saved both": Case(tied_llama, {**Q, "modules_to_save": ["lm_head", "embed_tokens"]}, untied=True),
    "tied, saved and kept tied": Case(
        tied_llama, {**Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "tied, tokens": Case(tied_llama, {**Q, "trainable_token_indices": [5, 3]}),
    "tied, tokens of the head": Case(tied_llama, {**Q, "trainable_token_indices": {"lm_head": [1]}}, untied=True),
    "tied, other tokens of each": Case(
        tied_llama, {**Q, "trainable_token_indices": {"lm_head": [1], "embed_tokens": [3, 5]}}, untied=True
    ),
    "fan_in_fan_out": Case(gpt2, CONV),
    "fan_in_fan_out, DoRA": Case(gpt2, {**CONV, "use_dora": True}),
    "fan_in_fan_out, bias all": Case(gpt2, {**CONV, "bias": "all"}),
    "fan_in_fan_out, embedding": Case(gpt2, {**CONV, "target_modules": ["wte", "c_attn"]}, untied=True),
    "grown": Case(llama, Q, grown=True),
    "grown, embedding and head": Case(llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, grown=True),
    "grown, saved": Case(llama, {**Q, "modules_to_save": ["embed_tokens", "lm_head"]}, grown=True),
    "grown, tied": Case(tied_llama, Q, grown=True),
    "grown, tied, embedding": Case(tied_llama, {"target_modules": ["embed_tokens", "q_proj"]}, grown=True, untied=True),
    "grown, tied, tokens": Case(tied_llama, {**Q, "trainable_token_indices": [85, 3]}, grown=True),
}


@dataclass(frozen=True)
class Tuned:
    """A base and an adapter on disk, and what peft makes of them."""

    base: Path
    adapter: Path
    model: Any  # the unmerged peft model
    tokens: torch.Tensor
    logits: torch.Tensor
    before: Tensors  # the base's weights, grown
    deltas: Tensors  # peft's own updates by the name of the weight


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tuned]:
    """Adapts the model of a case, with factors that are not zero, and saves both; once for each case."""
    made: dict[str, Tuned] = {}

    def tune_once(name: str) -> Tuned:
        if name not in made:
            made[name] = tune(CASES[name], tmp_path_factory.mktemp("case"))
        return made[name]

    return tune_once


def tune(case: Case, folder: Path) -> Tuned:
    from peft import LoraConfig, get_peft_model

    model, generator = case.make(), torch.Generator().manual_seed(1)
    model.save_pretrained(folder / "base")
    if case.grown:
        model.resize_token_embeddings(GROWN)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"r": 4, "lora_alpha": 8, **case.settings}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        tokens = torch.randint(0, GROWN if case.grown else VOCABULARY, (2, 40), generator=generator)
        logits = adapted(input_ids=tokens).logits
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=case.grown)
    deltas = {
        name.removeprefix("base_model.model.") + ".weight": module.get_delta_weight("default").detach()
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight") and getattr(module, "lora_A", None) is not None
    }
    return Tuned(folder / "base", folder / "adapter", adapted, tokens, logits, before, deltas)


def merge(tuned: Tuned, output: Path, *, dtype: str = "float32") -> Path:
    merge_adapter(
        base=tuned.base,
        base_manifest=None,
        adapter=tuned.adapter,
        adapter_manifest=None,
        dtype=dtype,
        max_shard_size=1,
        output=output,
        threads=2,
    )
    return output


def weights(folder: Path) -> Tensors:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", CASES)
def test_a_merged_model_computes_what_the_adapted_one_did(
    name: str, tuned: Callable[[str], Tuned], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    case, right = CASES[name], tuned(name)
    output = merge(right, tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert {key: found for key, found in report.items() if found} == {}
    with torch.no_grad():
        found = model.eval()(input_ids=right.tokens).logits
        plain = case.make()(input_ids=right.tokens % VOCABULARY).logits
    assert (found - right.logits).abs().max() < 2e-6
    assert (plain - right.logits[..., :VOCABULARY]).abs().max() > 1e-3, "the adapter is too weak to be seen"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (right.base, output))
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == ({"tie_word_embeddings"} if case.untied else set()) | ({"vocab_size"} if case.grown else set())


UNTIED = [name for name, case in CASES.items() if case.make is llama]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", UNTIED)
def test_merged_tensors_are_pefts_within_one_unit(
    name: str, dtype: str, tuned: Callable[[str], Tuned], tmp_path: Path
) -> None:
    """
    At the largest of weight, update and result, element by element for the types of 16 bits.

    In float32 the sum over the rank cancels: its error is one of its terms, not of what is left of them, and it is
    peft's as well, whose matrix product chooses another order. So the unit is that of the largest value of the row,
    and as nothing is wider than the sums, there may be some: 2 were seen, and 3 with DoRA, which divides as well.
    """
    right = tuned(name)
    found = weights(merge(right, tmp_path / "out", dtype=dtype))
    oracle = pefts_merge(right)
    assert found.keys() == oracle.keys()
    for key, tensor in found.items():
        expected, base = oracle[key], right.before[key]
        assert (tensor.dtype, tensor.shape) == (DTYPES[dtype], expected.shape)
        if torch.equal(expected, base):
            assert torch.equal(tensor, base.to(DTYPES[dtype])), f"{key} is untouched"
            continue
        update = right.deltas.get(key, expected - base)
        largest = torch.stack([base.abs(), update.abs(), expected.abs()]).amax(0)
        if dtype == "float32":
            largest = 4 * largest.amax(-1, keepdim=True).expand_as(largest)
        error = (tensor.double() - expected.double()).abs()
        assert (error <= unit_in_last_place(largest, DTYPES[dtype])).all(), key


def pefts_merge(tuned: Tuned) -> Tensors:
    from copy import deepcopy

    return {name: each.detach() for name, each in deepcopy(tuned.model).merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("name", CASES)
def test_what_no_adapter_touches_is_the_base_cast(name: str, tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    """By the adapter's own file: a tensor is touched if the adapter has one of its module."""
    right = tuned(name)
    base, found = weights(right.base), weights(merge(right, tmp_path / "out", dtype="bfloat16"))
    touched = {
        name.replace(".base_layer", "").removeprefix("base_model.model.") for name in load_file(right.adapter / WEIGHTS)
    }
    untouched = [name for name in base if not any(each.startswith(name.rpartition(".")[0] + ".") for each in touched)]
    assert len(untouched) >= 2
    for name in untouched:
        assert torch.equal(found[name], base[name].bfloat16()), name


@pytest.mark.parametrize("name", CASES)
def test_targets_are_those_of_peft(name: str, tuned: Callable[[str], Tuned]) -> None:
    """Every linear layer and embedding of the model is a target for us exactly if peft adapted it."""
    right = tuned(name)
    is_target = read_targets(right.adapter)
    modules = [key.removesuffix(".weight") for key, each in right.before.items() if each.ndim == 2]
    adapted = {key.removesuffix(".weight") for key in right.deltas}
    if CASES[name].settings.get("ensure_weight_tying"):
        adapted.discard("lm_head")  # adapted though it is no target
    assert {module for module in modules if is_target(module)} == adapted


def test_a_base_that_leaves_its_tie_unsaid(tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    """As GPT-2's config.json on the Hub: tied by the default of its class."""
    right = tuned("fan_in_fan_out, embedding")
    base = shutil.copytree(right.base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config))
    output = merge(Tuned(base, *list(vars(right).values())[1:]), tmp_path / "out")
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in weights(output)


def test_a_tied_base_that_stores_its_head_as_well(tuned: Callable[[str], Tuned], tmp_path: Path) -> None:
    """Both are the same afterwards, for a reader that ties and for one that does not."""
    right = tuned("tied, tokens")
    base = shutil.copytree(right.base, tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    found = weights(merge(Tuned(base, *list(vars(right).values())[1:]), tmp_path / "out"))
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], stored["lm_head.weight"])


def edit_config(tuned: Tuned, **changes: Any) -> None:
    path = tuned.adapter / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(tuned: Tuned, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(tuned.adapter / WEIGHTS)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tuned.adapter / WEIGHTS)


def refused(tuned: Tuned, output: Path) -> list[str]:
    """What stands in the way, line by line; nothing may be at the output or beside it."""
    with pytest.raises(LoraError) as error:
        merge(tuned, output)
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}*"))
    return [line.strip() for line in str(error.value).splitlines()[1:]]


LAYER = "base_model.model.model.layers.0.self_attn"


def test_all_settings_that_cannot_be_merged(tmp_path: Path) -> None:
    right = tune(CASES["plain"], tmp_path)
    edit_config(
        right, init_lora_weights="pissa", layer_replication=[[0, 2]], a_field_of_tomorrow=1, loftq_config={"a": 1}
    )
    assert refused(right, tmp_path / "out") == [
        "a_field_of_tomorrow: a field that this version does not know",
        "init_lora_weights: 'pissa' cannot be merged",
        "layer_replication: [[0, 2]] cannot be merged",
        "loftq_config: {'a': 1} cannot be merged",
    ]


def test_all_tensors_that_are_not_as_the_config_says(tmp_path: Path) -> None:
    right = tune(CASES["tokens"], tmp_path)

    def spoil(tensors: Tensors) -> None:
        del tensors[f"{LAYER}.q_proj.lora_B.weight"]
        tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"] = torch.ones(3, 64)
        tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"] = torch.ones(64, 3)
        tensors["base_model.model.model.norm.weight"] = torch.ones(64)
        tensors[f"{LAYER}.k_proj.lora_magnitude_vector"] = torch.ones(32)
        tensors["model.norm.bias"] = torch.ones(64)

    edit_tensors(right, spoil)
    edit_config(right, trainable_token_indices=[3])
    assert sorted(refused(right, tmp_path / "out")) == [
        f"base_model.model.model.norm.weight: neither a LoRA factor nor a module that {CONFIG} says is saved",
        f"model.embed_tokens.weight: 2 trained tokens, but {CONFIG} names 1",
        "model.layers.0.self_attn.k_proj.weight: parts of a LoRA without its factors",
        "model.layers.0.self_attn.q_proj.weight: only one of its two factors is there",
        f"model.layers.1.self_attn.q_proj.weight: rank 3, but {CONFIG} says 4",
        f"model.norm.bias: neither a LoRA factor nor a module that {CONFIG} says is saved",
    ]


def test_a_rank_that_is_not_that_of_its_pattern(tmp_path: Path) -> None:
    right = tune(CASES["patterns"], tmp_path)
    edit_config(right, rank_pattern={"q_proj": 3})
    names = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("down", "gate", "up")]
    assert refused(right, tmp_path / "out") == [f"{name}: rank 6, but {CONFIG} says 4" for name in names]


@pytest.mark.parametrize("name", ["DoRA", "plain"])
def test_a_magnitude_and_its_setting_go_together(name: str, tmp_path: Path) -> None:
    right = tune(CASES[name], tmp_path)
    edit_config(right, use_dora=name == "plain")
    lines = refused(right, tmp_path / "out")
    assert len(lines) == 2 * 7
    assert all(line.endswith(f".weight: {CONFIG} and its tensors disagree about DoRA") for line in lines)


def test_all_that_does_not_fit_the_base(tmp_path: Path) -> None:
    right = tune(CASES["tokens of both"], tmp_path)

    def spoil(tensors: Tensors) -> None:
        tensors[f"{LAYER}.q_proj.lora_A.weight"] = torch.ones(4, 60)
        for part in "AB":
            del tensors[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{part}.weight"]
        tensors[f"{LAYER}.r_proj.lora_A.weight"] = torch.ones(4, 64)
        tensors[f"{LAYER}.r_proj.lora_B.weight"] = torch.ones(64, 4)

    edit_tensors(right, spoil)
    edit_config(right, trainable_token_indices={"lm_head": [-1], "embed_tokens": [3, 80]})
    assert sorted(refused(right, tmp_path / "out")) == [
        "lm_head.weight: (80, 64), trained tokens (1, 64) at (-1,)",
        "model.embed_tokens.weight: (80, 64), trained tokens (2, 64) at (3, 80)",
        "model.layers.0.self_attn.q_proj.weight: (64, 64) in the base, A (4, 60), B (64, 4)",
        "model.layers.0.self_attn.r_proj.weight: the base has no such tensor",
        f"model.layers.1.self_attn.q_proj.weight: {CONFIG} targets it, but it has no pair of factors",
    ]


def test_a_saved_module_of_another_shape(tmp_path: Path) -> None:
    right = tune(CASES["saved norm"], tmp_path)
    name = "model.layers.0.input_layernorm.weight"
    edit_tensors(right, lambda tensors: tensors.update({f"base_model.model.{name}": torch.ones(65)}))
    assert refused(right, tmp_path / "out") == [f"{name}: (64,) in the base, (65,) in the adapter"]


@pytest.mark.parametrize("part", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_of_which_one_half_grew(part: str, tied: bool, tmp_path: Path) -> None:
    right = tune(CASES["grown, tied" if tied else "grown"], tmp_path)
    edit_tensors(right, lambda tensors: tensors.pop(f"base_model.model.{part}.weight"))
    if not tied:
        lines = ["embedding and output head would have unlike numbers of rows: [80, 88]"]
        assert refused(right, tmp_path / "out") == lines
    elif part == "model.embed_tokens":
        lines = ["lm_head.weight: tied to model.embed_tokens.weight, but saved otherwise"]
        assert refused(right, tmp_path / "out") == lines
    else:
        assert len(weights(merge(right, tmp_path / "out"))["model.embed_tokens.weight"]) == GROWN


def test_lora_on_a_grown_embedding_whose_head_peft_does_not_save(tmp_path: Path) -> None:
    case = Case(llama, {"target_modules": ["embed_tokens", "q_proj"]}, grown=True)
    lines = ["embedding and output head would have unlike numbers of rows: [80, 88]"]
    assert refused(tune(case, tmp_path), tmp_path / "out") == lines


def test_trained_tokens_of_a_pair_whose_head_is_trained_otherwise(tmp_path: Path) -> None:
    """In training the head had both, one after the other; what that gave is not peft's merge either."""
    case = Case(tied_llama, {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3]})
    line = "model.embed_tokens.weight: its trained tokens are tied to lm_head.weight, which is trained by itself"
    assert refused(tune(case, tmp_path), tmp_path / "out") == [line]


def test_a_config_of_several_parts_keeps_its_tie(tmp_path: Path) -> None:
    right = tune(CASES["tied, embedding"], tmp_path)
    config = json.loads((right.base / "config.json").read_text())
    (right.base / "config.json").write_text(json.dumps({**config, "text_config": {}}))
    line = "it changes tie_word_embeddings, which a config.json of several parts cannot take"
    assert refused(right, tmp_path / "out") == [line]
