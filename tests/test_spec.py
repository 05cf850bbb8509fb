"""config.yaml resolved into typed objects: completeness, defaults, files, and what cannot be built."""

from __future__ import annotations

import dataclasses
import json
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import SHAPE

from lib import spec, train_settings
from lib.config import ConfigError, definition, schema
from lib.spec import Project, Shape, resolve_project

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that configs name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talks.jsonl").write_text("{}\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


def resolve(*, hardware: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **model: Any) -> Project:
    """The project with one model `m`, on a hub base unless said otherwise."""
    model.setdefault("base", {"hub": "maker/model", "revision": "main", "shape": SHAPE})
    if train is not None:
        model["adapter"] = {"train": {"data": "talks.jsonl", **train}}
    return resolve_project({"hardware": hardware or {}, "models": {"m": model}})


def problems(**model: Any) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        resolve(**model)
    return [line.strip() for line in str(refused.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("kind", "section"),
    [
        (spec.Project, schema()),
        (spec.Hardware, schema()["properties"]["hardware"]),
        (spec.LlamaCpp, schema()["properties"]["llama_cpp"]),
        *(
            (getattr(spec, name.capitalize()), definition(name))
            for name in ("model", "base", "shape", "adapter", "merge", "quantize", "ollama", "smoke")
        ),
        *((getattr(train_settings, name.capitalize()), definition(name)) for name in ("train", "lora", "bitsandbytes")),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_field_has_a_key_and_every_key_a_field(kind: type, section: dict[str, Any]) -> None:
    assert {field.name for field in dataclasses.fields(kind)} == section["properties"].keys()


def test_every_definition_has_its_class() -> None:
    """So that the test above leaves none out."""
    classes = {name.lower() for module in (spec, train_settings) for name in vars(module)}
    assert schema()["$defs"].keys() <= classes


def test_the_shipped_config_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    project = resolve_project(yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8")))
    assert {"demo", "deepseek32b"} <= project.models.keys()
    demo, large = project.models["demo"], project.models["deepseek32b"]
    assert demo.adapter is not None and demo.adapter.train.device == "cpu"
    assert large.adapter is not None and large.adapter.train.device == "cuda"
    assert large.base.shape is not None
    # What the Hub counts in the published checkpoint of DeepSeek-R1-Distill-Qwen-32B.
    assert large.base.shape.parameters == pytest.approx(32.76e9, rel=0.01)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_dim", [None, 32])
def test_parameters_are_those_of_the_model(tied: bool, head_dim: int | None) -> None:
    """transformers' own model of that shape, on no device; its matrices, without biases and norms."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = {**SHAPE, "tie_word_embeddings": tied, "head_dim": head_dim}
    head = head_dim or SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**{**sizes, "head_dim": head}))
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    assert Shape(**sizes).parameters == matrices
    assert Shape(**sizes).embedding == model.get_input_embeddings().weight.numel()


def test_defaults_depend_on_the_method_and_give_way() -> None:
    table = definition("train")["x-defaults-by-method"]
    for method in ("lora", "qlora"):
        train = resolve(train={"method": method}).models["m"].adapter.train
        assert train.learning_rate == table[method]["learning_rate"]
    assert resolve(train={"learning_rate": 3e-5}).models["m"].adapter.train.learning_rate == 3e-5


@pytest.mark.parametrize(
    ("written", "gpus", "resolved"),
    [
        ("auto", [], "cpu"),
        ("auto", [24], "cuda"),
        ("auto", [24, 24], "cuda"),
        ("cpu", [24], "cpu"),
        ("cuda", [], "cuda"),
    ],
)
def test_the_device_follows_the_planned_hardware(written: str, gpus: list[int], resolved: str) -> None:
    project = resolve(hardware={"gpus": gpus}, train={"device": written})
    assert project.models["m"].adapter.train.device == resolved


def test_types_of_a_resolved_project() -> None:
    project = resolve(
        hardware={"gpus": [24, 16.5]},
        train={"lora": {"target_modules": ["q_proj"]}},
        ollama={"parameters": {"stop": ["END"]}},
    )
    model = project.models["m"]
    assert project.hardware.gpus == (24, 16.5)
    assert model.adapter.train.lora.target_modules == ("q_proj",)
    assert model.smoke is None
    assert model.base.shape == Shape(**SHAPE, head_dim=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.merge.dtype = "bfloat16"
    with pytest.raises(TypeError):
        project.models["other"] = model


def test_whole_numbers_written_with_a_point_are_integers() -> None:
    """The schema takes 16.0 for an integer, but `--r 16.0` and `PARAMETER num_ctx 2048.0` are refused later."""
    model = resolve(train={"lora": {"r": 16.0}}, ollama={"parameters": {"num_ctx": 2048.0}}).models["m"]
    assert [model.adapter.train.lora.r, model.ollama.parameters["num_ctx"]] == [16, 2048]
    assert isinstance(model.adapter.train.lora.r, int)
    assert isinstance(model.ollama.parameters["num_ctx"], int)


def test_snakemakes_own_mappings_are_taken() -> None:
    nested = UserDict({"m": UserDict({"base": UserDict({"path": "own"}), "quantize": UserDict(types=("q8_0",))})})
    project = resolve_project(UserDict(models=nested))
    assert project.models["m"].default_quant == "q8_0"


@pytest.mark.parametrize(("dtype", "source"), [("float16", "f16"), ("bfloat16", "bf16")])
def test_source_type(dtype: str, source: str) -> None:
    assert resolve(merge={"dtype": dtype}).models["m"].source_type == source


def test_missing_files_are_listed_together() -> None:
    lines = problems(
        base={"path": "absent"}, train={"data": "nowhere.jsonl"}, smoke={"questions": "nothing.jsonl"}, quantize={}
    )
    assert lines[:1] == ["models.m.base.path: there is no file absent/config.json"]
    assert "models.m.adapter.train.data: there is no file nowhere.jsonl" in lines
    assert "models.m.smoke.questions: there is no file nothing.jsonl" in lines
    assert problems(base={"gguf": "no.gguf", "shape": SHAPE}) == ["models.m.base.gguf: there is no file no.gguf"]


@pytest.mark.parametrize(
    ("types", "said"),
    [
        (["q4km"], "models.m.quantize.types: unknown type 'q4km'; did you mean 'q4_k_m'?"),
        (["Q4_K_M"], "models.m.quantize.types: unknown type 'Q4_K_M'; did you mean 'q4_k_m'?"),
        (["IQ4_XS"], "models.m.quantize.types: unknown type 'IQ4_XS'; did you mean 'iq4_xs'?"),
        (["q4_k_m", "iq2_xxs"], "models.m.quantize.types: iq2_xxs needs an importance matrix"),
    ],
)
def test_types_that_cannot_be_built(types: list[str], said: str) -> None:
    (line,) = problems(quantize={"types": types})
    assert line.startswith(said)


def test_the_shape_of_a_local_base_is_read() -> None:
    assert resolve(base={"path": "own"}).models["m"].base.shape == Shape(**SHAPE, head_dim=None)


def test_a_published_shape_without_groups_has_as_many_key_heads(workplace: Path) -> None:
    published = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
    (workplace / "own" / "config.json").write_text(json.dumps(published))
    assert resolve(base={"path": "own"}).models["m"].base.shape.num_key_value_heads == 4


@pytest.mark.parametrize("content", ["{damaged", "[]", "{}", '{"text_config": {"hidden_size": 64}}'])
def test_a_local_base_whose_sizes_cannot_be_read(content: str, workplace: Path) -> None:
    """Said when the config is resolved: later, the plan itself would break."""
    (workplace / "own" / "config.json").write_text(content)
    (line,) = problems(base={"path": "own"})
    assert line.startswith("models.m.base.")


@pytest.mark.parametrize("key", ["hub", "path", "gguf"])
def test_a_source_that_is_null_is_no_source(key: str) -> None:
    together = {"revision": "main"} if key == "hub" else {}
    assert problems(base={key: None, "shape": SHAPE, **together})


def test_a_source_needs_its_shape() -> None:
    (line,) = problems(base={"gguf": "talks.jsonl"})
    assert line.startswith("models.m.base: missing key 'shape'")


def test_a_training_section_that_is_empty() -> None:
    """`train:` with nothing below it is null in YAML."""
    lines = problems(adapter={"train": None})
    assert [line.partition(":")[0] for line in lines] == ["models.m.adapter.train"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_have_to_be_finite(value: float) -> None:
    """YAML has .nan and .inf; a comparison with a minimum lets both pass, and planning with them breaks."""
    with pytest.raises(ConfigError, match=r"hardware\.gpus"):
        resolve(hardware={"gpus": [value]})
