"""config.yaml resolved into typed objects: completeness, defaults, files, and what cannot be built."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import SHAPE
from tiny_adapter import CONFIG, WEIGHTS, write_constants

from lib import estimate, heatmap_settings, heatmap_spec, spec, train_settings
from lib.config import ConfigError, definition, schema
from lib.spec import Project, Shape, resolve_project
from lib.tensor_types import TensorTypes
from lib.typed import setting_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that configs name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talks.jsonl").write_text("{}\n")
    (tmp_path / "read.txt").write_text("A sentence.\n" * 200)
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
            for name in (
                "model",
                "base",
                "shape",
                "adapter",
                "merge",
                "quantize",
                "imatrix",
                "quality",
                "ollama",
                "smoke",
                "rag",
            )
        ),
        *(
            (getattr(train_settings, "".join(part.capitalize() for part in name.split("_"))), definition(name))
            for name in ("train", "lora", "bitsandbytes", "micro_batching", "offload")
        ),
        *(
            (getattr(heatmap_spec, "".join(part.capitalize() for part in name.split("_"))), definition(name))
            for name in ("heatmap_model", "heatmap_base", "clips", "synthetic", "adapter_heatmap", "merge_heatmap")
        ),
        (heatmap_settings.Heatmap, definition("heatmap")),
        (heatmap_settings.TrainHeatmap, definition("train_heatmap")),
        (heatmap_settings.HeatmapLora, definition("lora_heatmap")),
        (heatmap_settings.Evaluation, definition("evaluation")),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_field_has_a_key_and_every_key_a_field(kind: type, section: dict[str, Any]) -> None:
    fields = {setting_of(field) for field in dataclasses.fields(kind) if field.metadata.get("setting", True)}
    assert fields == section["properties"].keys()


def test_what_is_found_out_is_no_setting() -> None:
    kinds = [
        kind for module in (spec, train_settings) for kind in vars(module).values() if dataclasses.is_dataclass(kind)
    ]
    fields = {
        (kind.__name__, field.name)
        for kind in kinds
        for field in dataclasses.fields(kind)
        if not field.metadata.get("setting", True)
    }
    # The heatmap models stand among the others in the file.
    assert fields == {("Train", "method_reason"), ("Quantize", "candidates"), ("Project", "heatmaps")}


def test_a_merge_onto_a_4_bit_base_on_a_gpu() -> None:
    asked = {"base_weights": "nf4", "device": "cuda"}
    resolved = resolve(merge=asked, train={"method": "qlora"}, hardware={"gpus": [24]}).models["m"].merge
    assert (resolved.base_weights, resolved.device) == ("nf4", "cuda")
    assert estimate.merge_needs(
        resolve(merge=asked, train={"method": "qlora"}, hardware={"gpus": [24]}).models["m"]
    ).gpu


def test_every_definition_has_its_class() -> None:
    """So that the test above leaves none out."""
    modules = (spec, train_settings, heatmap_spec, heatmap_settings)
    classes = {frozenset(re.findall("[A-Z][a-z]+", name)) for module in modules for name in vars(module)}
    assert {frozenset(part.capitalize() for part in name.split("_")) for name in schema()["$defs"]} <= classes


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
    assert table.keys() == {"lora", "qlora", "int8"}
    for method, chosen in table.items():
        train = resolve(train={"method": method}).models["m"].adapter.train
        assert {key: getattr(train, key) for key in chosen} == chosen
    train = resolve(train={"learning_rate": 3e-5, "precision": "fp16"}).models["m"].adapter.train
    assert (train.learning_rate, train.precision) == (3e-5, "fp16")


def test_the_method_is_settled_by_the_planned_hardware_and_the_shape() -> None:
    def settled(gpus: list[float], layers: int, **train: Any) -> tuple[str, str]:
        base = {"hub": "maker/model", "revision": "main", "shape": {**large, "num_hidden_layers": layers}}
        found = resolve(hardware={"gpus": gpus}, base=base, train=train).models["m"].adapter.train
        return found.method, found.method_reason

    # 0.1 B weights a layer.
    large = {**SHAPE, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24}
    assert settled([24, 16], 80)[0] == "int8"
    assert settled([24, 15], 80)[0] == "qlora"
    method, reason = settled([], 80)
    assert method == "lora" and reason.startswith("auto: no GPU planned, ") and "more than 2 B" in reason
    assert settled([24], 80, method="lora") == ("lora", "as configured")


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


def test_types_of_single_tensors() -> None:
    quantize = resolve(quantize={"pure": True, "tensor_type": {"attn_v": "q8_0", "attn": "q5_k"}}).models["m"].quantize
    assert (quantize.types, quantize.pure, quantize.output_tensor_type) == (("q4_k_m",), True, None)
    handed = quantize.tensor_types
    assert type(handed) is TensorTypes and list(handed.tensor_type) == ["attn_v", "attn"]


def test_which_types_use_a_matrix() -> None:
    matrix = {"text": "read.txt", "chunks": 8.0}
    quantize = resolve(quantize={"types": ["iq2_xs", "q8_0"], "imatrix": matrix}).models["m"].quantize
    assert quantize.imatrix == spec.Imatrix(text="read.txt", chunks=8, source=None)
    used = {name: quantize.uses_imatrix(name) for name in ("iq2_xs", "q4_k_m", "q4_0", "iq4_nl", "q8_0", "tq1_0")}
    assert used == {"iq2_xs": True, "q4_k_m": True, "q4_0": True, "iq4_nl": True, "q8_0": False, "tq1_0": False}
    single = {"imatrix": matrix, "tensor_type": {"attn_v": "iq2_xs"}}
    assert resolve(quantize=single).models["m"].quantize.uses_imatrix("q8_0")
    single["tensor_type"] = {"attn_v": "f16"}
    assert not resolve(quantize=single).models["m"].quantize.uses_imatrix("q8_0")
    assert not resolve().models["m"].quantize.uses_imatrix("q4_k_m")


def test_which_file_computes_the_matrix() -> None:
    for chosen, types, expected in (
        ({}, {}, ("f16", "q8_0")),
        ({"from": "f16"}, {}, ("f16", "f16")),
        ({"from": "q8_0"}, {}, ("q8_0", "q8_0")),
        ({}, {"attn_v": "q4_k"}, ("f16", "f16")),  # then q8_0 needs the matrix itself
    ):
        settings = {"imatrix": {"text": "read.txt", **chosen}, "tensor_type": types}
        quantize = resolve(quantize=settings).models["m"].quantize
        assert tuple(quantize.imatrix_source(directly=direct) for direct in (False, True)) == expected


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


def test_an_adapter_that_is_there(workplace: Path) -> None:
    write_constants(workplace / "runs" / "a", written=1_700_000_000)
    write_constants(workplace / "runs" / "b", written=1_700_000_001)
    for given, path in (({"path": "./runs//a/"}, "runs/a"), ({"latest_in": "runs"}, "runs/b")):
        adapter = resolve(adapter=given).models["m"].adapter
        assert (adapter.train, adapter.path, adapter.latest_in) == (None, path, given.get("latest_in"))
    absolute = str(workplace / "runs" / "a")
    assert resolve(adapter={"path": absolute}).models["m"].adapter.path == absolute


def test_the_newest_adapter_is_no_copy_made_here(workplace: Path) -> None:
    """Else the copy, which is newer than its original, would be the next input, and the job its own."""
    write_constants(workplace / "adapters" / "trained", written=1_700_000_000)
    write_constants(workplace / "adapters" / "m")
    assert resolve(adapter={"latest_in": "."}).models["m"].adapter.path == "adapters/trained"


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ([WEIGHTS], f"{WEIGHTS} missing"),
        ([CONFIG], f"{CONFIG} missing"),
        ([WEIGHTS, CONFIG], f"{CONFIG} and {WEIGHTS} missing"),
    ],
)
def test_an_adapter_that_lacks_files(lost: list[str], said: str, workplace: Path) -> None:
    folder = write_constants(workplace / "runs" / "a")
    for name in lost:
        (folder / name).unlink()
    assert problems(adapter={"path": "runs/a"}) == [f"models.m.adapter.path: runs/a is no complete adapter: {said}"]
    (folder / "adapter_model.bin").touch()
    shown = problems(adapter={"latest_in": "runs"})
    assert shown[0] == "models.m.adapter.latest_in: no complete adapter under runs"
    assert len(shown) == 2 and shown[1].startswith("runs/a: ")
    if WEIGHTS in lost:
        assert "adapter_model.bin is pickled and can run code when read" in shown[1]
        assert "pickled" in problems(adapter={"path": "runs/a"})[0]


@pytest.mark.parametrize(
    "name", ["mine", "Mine_2.0", "me/mine", "me/mine:short", "example.com/me/mine:v1.0", "host:5000/me/m", "me/m-x:1"]
)
def test_names_in_ollama(name: str, workplace: Path) -> None:
    assert resolve(ollama={"name": name}).models["m"].ollama.name == name


def test_mixtures_of_experts_are_counted_and_known(tmp_path: Path, workplace: Path) -> None:
    sizes = {**SHAPE, "num_attention_heads": 4, "num_local_experts": 8, "moe_intermediate_size": 16}
    Path("mixture").mkdir()
    Path("mixture/config.json").write_text(json.dumps(sizes))
    shape = resolve(base={"path": "mixture"}).models["m"].base.shape
    assert (shape.num_experts, shape.moe_intermediate_size) == (8, 16)
    dense = resolve(base={"path": "mixture", "shape": SHAPE}).models["m"].base.shape
    experts = SHAPE["num_hidden_layers"] * 3 * SHAPE["hidden_size"] * (8 * 16 - SHAPE["intermediate_size"])
    assert shape.parameters - dense.parameters == experts


def test_one_name_with_two_tags_in_ollama(workplace: Path) -> None:
    base = {"hub": "maker/model", "revision": "main", "shape": SHAPE}
    models = {name: {"base": base, "ollama": {"name": called}} for name, called in (("a", None), ("b", "a:brief"))}
    assert resolve_project({"models": models}).models["b"].ollama.name == "a:brief"
