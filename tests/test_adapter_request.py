"""What an adapter that is there already is built as: which adapter, its name, its base, and the entry of the config."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import SHAPE
from tiny_adapter import CONFIG, write_constants

from lib.adapter_request import (
    REQUESTS,
    choose_adapter,
    choose_base,
    choose_name,
    config_shape,
    gguf_shape,
    request_model,
    trained_on,
)
from lib.adapter_search import AdapterError
from lib.cli import UsageError
from lib.config import put_over
from lib.gguf_file import read_gguf
from lib.manifest import describe_files, write_folder_manifest
from lib.spec import resolve_project

COMMIT = "c" * 40
HUB = {"hub": "maker/model", "revision": "main", "shape": SHAPE}
WHEEL = {"pypi": "carrier==1.0", "member": "model.gguf", "sha256": "0" * 64, "shape": SHAPE}
KNOWN = {"a": HUB, "b": WHEEL, "c": {"path": "elsewhere/tiny-llama", "shape": SHAPE}}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_base(folder: str, *, origin: dict[str, Any] | None = None) -> Path:
    """A folder that looks like a base; with an origin, like one that was fetched."""
    path = Path(folder)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(SHAPE))
    if origin:
        files = describe_files(path, ["config.json"], threads=1)
        write_folder_manifest(path, artifact="base", files=files, origin=origin)
    return path


def base(asked: str, *, name: str = "new", known: dict[str, Any] = KNOWN, **shape: Any) -> dict[str, Any]:
    return choose_base(asked, name=name, known=known, shape=shape.get("shape"))


def test_the_adapter_is_the_folder_or_the_newest_one() -> None:
    write_constants(Path("outputs/old"), written=1_700_000_000)
    write_constants(Path("outputs/run/new"), written=1_700_000_001)
    assert choose_adapter("outputs/old", latest_in=Path("nowhere")) == Path("outputs/old")
    assert choose_adapter("latest", latest_in=Path("outputs")) == Path("outputs/run/new")
    write_constants(Path("latest"))
    assert choose_adapter("./latest", latest_in=Path("outputs")) == Path("latest")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("gone", "--adapter: gone is no complete adapter: there is no such folder"),
        ("half", "--adapter: half is no complete adapter: adapter_model.safetensors missing"),
        ("latest", "--adapter latest: there is no folder outputs\n--latest-in names another folder to look in"),
    ],
)
def test_no_adapter(asked: str, said: str) -> None:
    Path("half").mkdir()
    Path("half", CONFIG).write_text("{}")
    with pytest.raises(AdapterError) as refused:
        choose_adapter(asked, latest_in=Path("outputs"))
    assert str(refused.value) == said


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("outputs/lora_20241122", "lora_20241122"),
        ("Lora 2024.11", "lora-2024-11"),
        ("_.モデル.v2_", "v2"),
        ("x" * 80, "x" * 63),
        ("run/..", "folder"),
    ],
)
def test_the_name_is_that_of_the_folder(folder: str, name: str, here: Path) -> None:
    os.makedirs(here / "folder" / folder, exist_ok=True)
    assert choose_name(None, adapter=here / "folder" / folder) == name
    assert choose_name("Mine", adapter=Path(folder)) == "Mine"  # the schema says what is wrong with that


def test_a_folder_of_which_no_name_can_be_made() -> None:
    with pytest.raises(UsageError, match=r"no model can be called as the folder '最終'; say --name"):
        choose_name(None, adapter=Path("最終"))


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ({"base_model_name_or_path": "maker/model"}, "maker/model"),
        ({"base_model_name_or_path": "maker/model", "revision": None}, "maker/model"),
        ({"base_model_name_or_path": "maker/model", "revision": COMMIT}, f"maker/model@{COMMIT}"),
    ],
)
def test_the_adapter_says_what_it_was_trained_on(config: dict[str, Any], base: str) -> None:
    assert trained_on(write_constants(Path("run"), **config)) == base


@pytest.mark.parametrize("config", [{}, {"base_model_name_or_path": None}, {"base_model_name_or_path": ""}])
def test_an_adapter_that_does_not_say(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"run/adapter_config.json does not say what .* was trained on; say --base"):
        trained_on(write_constants(Path("run"), **config))


def test_a_folder_is_taken_in_place() -> None:
    write_base("maker/model")
    assert base("maker/model") == {"path": "maker/model"}


@pytest.mark.parametrize(
    ("asked", "section"),
    [
        ("maker/model", HUB),
        ("maker/model@main", HUB),
        ("maker/model@v2", {**HUB, "revision": "v2"}),  # the sizes are checked once it is there
        ("carrier==1.0", WHEEL),
        ("tiny-llama", KNOWN["c"]),
    ],
)
def test_a_base_that_is_configured(asked: str, section: dict[str, Any]) -> None:
    assert base(asked) == section


@pytest.mark.parametrize(
    ("asked", "in_place"),
    [("maker/model", True), ("maker/model@main", True), (f"maker/model@{COMMIT}", True), ("maker/model@v2", False)],
)
def test_what_was_fetched_for_another_model_is_used_in_place(asked: str, in_place: bool) -> None:
    write_base("bases/a", origin={"kind": "hub", "name": "maker/model", "revision": COMMIT})
    assert (base(asked) == {"path": "bases/a"}) == in_place


def test_a_base_is_in_place_only_if_every_file_is() -> None:
    folder = write_base("bases/b", origin={"kind": "pypi", "name": "carrier==1.0"})
    assert base("carrier==1.0") == {"path": "bases/b"}
    (folder / "config.json").unlink()
    assert base("carrier==1.0") == WHEEL


def test_a_model_that_is_built_again_keeps_its_base() -> None:
    """Its own fetched base in place would be a base that is made from itself."""
    write_base("bases/a", origin={"kind": "hub", "name": "maker/model", "revision": COMMIT})
    assert base("maker/model", name="a") == HUB


def test_a_base_on_the_hub_that_nobody_knows() -> None:
    assert base("maker/new@main", shape=SHAPE) == {"hub": "maker/new", "revision": "main", "shape": SHAPE}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("/home/x/model", "the base '/home/x/model' is neither a folder here, nor a .gguf file, nor owner/name on the"),
        ("gone.gguf", "the base 'gone.gguf' is neither a folder here, nor a .gguf file"),
        ("gone/model.gguf", "the base 'gone/model.gguf' is neither a folder here, nor a .gguf file"),
        ("tiny", "the base 'tiny' is neither a folder here"),
        ("maker/new", "--base maker/new: which revision? say it as in maker/new@main; a branch is resolved"),
        ("maker/new@v1", "--base maker/new@v1: the plan needs its sizes before it is there; say --shape FILE, with its "
         "config.json from https://huggingface.co/maker/new/resolve/v1/config.json"),
        ("maker/twice", "--base maker/twice: which revision? known are maker/twice@main, maker/twice@v2"),
    ],
)  # fmt: skip
def test_bases_that_are_not_there_or_not_known_well_enough(asked: str, said: str) -> None:
    twice = {name: {**HUB, "hub": "maker/twice", "revision": name} for name in ("main", "v2")}
    with pytest.raises(UsageError) as refused:
        base(asked, known={**KNOWN, **twice})
    assert str(refused.value).startswith(said)


def test_the_sizes_of_a_published_config() -> None:
    Path("config.json").write_text(json.dumps({**SHAPE, "head_dim": 64, "model_type": "llama"}))
    assert config_shape(Path("config.json")) == {**SHAPE, "head_dim": 64}
    for name, said in (("gone.json", "is not there to give"), ("empty.json", "does not give")):
        Path("empty.json").write_text("{}")
        with pytest.raises(UsageError, match=f"--shape: {name} {said} a model's sizes"):
            config_shape(Path(name))


def test_the_sizes_of_a_gguf(make_gguf: Callable[..., Path]) -> None:
    path = make_gguf()
    tensors = {tensor.name: tensor.shape for tensor in read_gguf(path).tensors}
    (rows, width), inner = tensors["token_embd.weight"], tensors["blk.0.ffn_up.weight"][0]
    section = base(str(path))
    assert section["gguf"] == str(path)
    shape = section["shape"]
    assert (shape["vocab_size"], shape["hidden_size"], shape["intermediate_size"]) == (rows, width, inner)
    assert shape["num_hidden_layers"] == len({name.split(".")[1] for name in tensors if name.startswith("blk.")})
    head = width // shape["num_attention_heads"]
    assert shape["num_key_value_heads"] * head == tensors["blk.0.attn_k.weight"][0]
    assert shape["tie_word_embeddings"] is True
    resolve_project({"models": {"m": {"base": section}}})
    assert base(str(path), shape=SHAPE)["shape"] == SHAPE


def test_a_gguf_whose_sizes_are_not_those_of_a_whole_model(make_gguf: Callable[..., Path]) -> None:
    path = make_gguf(spoil=lambda weights: weights.pop("token_embd.weight"))
    with pytest.raises(UsageError, match=r"does not give vocab_size of the whole model; say --set base.shape="):
        gguf_shape(read_gguf(path))


def ask(adapter: Path, config: dict[str, Any], **given: Any) -> dict[str, Any]:
    asked = {"base": None, "name": "new", "like": None, "shape": None, "settings": {}, **given}
    return request_model(adapter=adapter, config=config, **asked)


def test_the_entry_of_a_model() -> None:
    adapter = write_constants(Path("outputs/run"), base_model_name_or_path="maker/model")
    config = {
        "models": {"a": {"base": HUB, "ollama": {"name": "me/a", "system": "Short."}, "quantize": {"pure": True}}}
    }
    plain = ask(adapter, config)
    assert plain == {"base": {**HUB, "import_dtype": "float16"}, "adapter": {"path": "outputs/run"}}
    # Settings of another model, but for what it is and what it is called; and the user's over these.
    like = ask(adapter, config, like="a", settings={"quantize": {"types": ["q8_0"]}})
    assert like == {**plain, "ollama": {"system": "Short."}, "quantize": {"pure": True, "types": ["q8_0"]}}
    resolve_project(put_over(config, {"models": {"new": like}}))


def test_the_base_is_the_one_that_is_said_then_that_of_the_model_it_is_like() -> None:
    adapter = write_constants(Path("outputs/run"), base_model_name_or_path="someone/else")
    config = {"models": {"a": {"base": HUB}, "b": {"base": WHEEL}}}
    write_base("mine")
    assert ask(adapter, config, like="b")["base"]["pypi"] == "carrier==1.0"
    assert ask(adapter, config, like="b", base="maker/model")["base"]["hub"] == "maker/model"
    assert ask(adapter, config, base="mine")["base"] == {"path": "mine"}


def test_bases_of_earlier_requests_are_known() -> None:
    adapter = write_constants(Path("outputs/run"), base_model_name_or_path="maker/model")
    with pytest.raises(UsageError, match="which revision"):
        ask(adapter, {})
    REQUESTS.mkdir(parents=True)
    (REQUESTS / "first.yaml").write_text(yaml.safe_dump({"models": {"first": {"base": HUB}}}))
    assert ask(adapter, {})["base"] == HUB
    write_base("bases/first", origin={"kind": "hub", "name": "maker/model", "revision": COMMIT})
    assert ask(adapter, {})["base"] == {"path": "bases/first"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "a"}, "config.yaml has a model 'a', whose adapter would be lost; say another --name"),
        ({"like": "deepsek32b"}, "--like: unknown model 'deepsek32b'; did you mean 'deepseek32b'?"),
    ],
)
def test_names_that_are_taken_or_unknown(given: dict[str, str], said: str) -> None:
    adapter = write_constants(Path("outputs/run"), base_model_name_or_path="maker/model")
    with pytest.raises(UsageError) as refused:
        ask(adapter, {"models": {"a": {"base": HUB}, "deepseek32b": {"base": HUB}}}, **given)
    assert str(refused.value) == said
