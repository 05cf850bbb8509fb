"""What a GGUF says of its origin, as the gguf package's own reader of metadata files understands it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from gguf import Metadata

from lib.provenance import compare_metadata, gguf_metadata

BASE = {"digest": "b" * 64, "origin": {"kind": "hub", "name": "maker/model", "revision": "c" * 40}}
DATA = {"name": "talks.jsonl", "size": 10, "sha256": "d" * 64}
ADAPTER = {"digest": "a" * 64, "origin": {"base": BASE, "data": DATA, "settings": {}, "versions": {}}}
POLICY = {"base_weights": "original", "dtype": "float16"}
MERGED = {"digest": "e" * 64, "origin": {"base": BASE, "adapter": ADAPTER, "merge": POLICY}}
CARD = """---
license: mit
license_name: own
license_link: https://example.org/licence
language: [ja, en]
tags: [finance]
datasets: [someone/data]
base_model: someone/other-7B
model_name: Their Name
author: Someone
---
# A model
"""


def metadata(source: dict[str, Any] = MERGED, artifact: str = "merged") -> dict[str, Any]:
    return gguf_metadata(source, artifact=artifact, name="m", llama_cpp_commit="0c1e57098b")


def understood(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The metadata that llama.cpp's converter would write for a checkpoint of 32B in that folder."""
    file = folder.parent / f"{folder.name}.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return dataclasses.asdict(Metadata.load(file, folder, None, 32_760_000_000))


def checkpoint(folder: Path, *, card: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"_name_or_path": "someone/Qwen2.5-32B-Instruct", "dtype": "float16"})
    )
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def test_a_tuned_model(tmp_path: Path) -> None:
    found = understood(checkpoint(tmp_path / "merged"), metadata())
    assert found["name"] == "m"
    assert found["base_models"] == [
        {"name": "maker/model", "version": "c" * 40, "description": f"sha256:{'b' * 64}"},
    ]
    assert found["datasets"] == [{"name": "talks.jsonl", "description": f"sha256:{'d' * 64}"}]
    assert found["description"] == (
        f"LoRA adapter sha256:{'a' * 64}; merged in float32 onto the original weights, rounded once to float16; "
        "llama.cpp 0c1e57098b"
    )


def test_a_base(tmp_path: Path) -> None:
    found = understood(checkpoint(tmp_path / "x"), metadata(BASE, "base"))
    assert found["base_models"] == [{"name": "maker/model", "version": "c" * 40, "description": f"sha256:{'b' * 64}"}]
    assert found["description"] == "llama.cpp 0c1e57098b"
    assert found["datasets"] is None


def test_a_merge_without_an_adapter(tmp_path: Path) -> None:
    plain = {"digest": "e" * 64, "origin": {"base": BASE, "adapter": None, "merge": POLICY}}
    found = understood(checkpoint(tmp_path / "x"), metadata(plain))
    assert found["description"] == "llama.cpp 0c1e57098b"
    assert found["base_models"][0]["name"] == "maker/model"


@pytest.mark.parametrize("artifact", ["merged", "base"])
def test_a_checkpoint_of_unknown_origin(artifact: str, tmp_path: Path) -> None:
    found = understood(checkpoint(tmp_path / "x"), metadata({"digest": "e" * 64, "origin": None}, artifact))
    assert found["name"] == "m"
    assert found["base_models"][0]["name"]
    assert "LoRA" not in found["description"]


def test_an_adapter_of_unknown_origin(tmp_path: Path) -> None:
    adapter = {"digest": "a" * 64, "origin": None}
    merged = {"digest": "e" * 64, "origin": {"base": {**BASE, "origin": None}, "adapter": adapter, "merge": POLICY}}
    found = understood(checkpoint(tmp_path / "x"), metadata(merged))
    assert found["datasets"] is None
    assert f"LoRA adapter sha256:{'a' * 64}" in found["description"]
    assert found["base_models"] == [{"name": "base", "description": f"sha256:{'b' * 64}"}]


@pytest.mark.parametrize("name", ["DeepSeek-R1-Distill-Qwen-32B-Japanese", "merged", "someone-7B-chat-v2-GGUF"])
def test_the_folders_name_says_nothing(name: str, tmp_path: Path) -> None:
    plain = understood(checkpoint(tmp_path / "x"), metadata())
    assert understood(checkpoint(tmp_path / name), metadata()) == plain


def test_a_model_card_says_nothing(tmp_path: Path) -> None:
    """Save for its licence, which no metadata file can take back."""
    plain = understood(checkpoint(tmp_path / "x"), metadata())
    found = understood(checkpoint(tmp_path / "carded", card=CARD), metadata())
    assert {**found, "license": None} == plain


def test_what_a_file_tells_is_compared_with_the_chain() -> None:
    told = {
        "general.name": "any",
        "general.description": metadata()["general.description"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "maker/model",
        "general.base_model.0.version": "c" * 40,
        "general.base_model.0.description": f"sha256:{'b' * 64}",
        "general.dataset.count": 1,
        "general.dataset.0.name": "talks.jsonl",
        "general.dataset.0.description": f"sha256:{'d' * 64}",
    }
    assert compare_metadata(told, metadata()) == []
    for key in set(told) - {"general.name"}:
        assert compare_metadata({**told, key: "x"}, metadata())[0].startswith(
            f"{key}: the file says 'x', its manifest "
        )
        lost = {name: value for name, value in told.items() if name != key}
        assert compare_metadata(lost, metadata())[0].startswith(f"{key}: the file says nothing, its manifest ")


def test_a_bases_own_card_may_name_data() -> None:
    """The converter takes it from there, and no manifest knows of it."""
    told = {"general.description": "llama.cpp 0c1e57098b", "general.dataset.0.name": "someone/data"}
    told |= {"general.base_model.count": 1, "general.base_model.0.name": "maker/model"}
    told |= {"general.base_model.0.version": "c" * 40, "general.base_model.0.description": f"sha256:{'b' * 64}"}
    assert compare_metadata(told, metadata(BASE, "base")) == []


def test_the_same_origin_is_the_same_text() -> None:
    assert json.dumps(metadata(), sort_keys=True) == json.dumps(metadata(), sort_keys=True)
    assert str(Path.cwd()) not in json.dumps(metadata())
