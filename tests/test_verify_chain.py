"""Artifacts whose manifests, metadata or neighbours tell another origin: every contradiction is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_chain import (
    ADAPTER,
    BASE,
    BASE_F16,
    DATA,
    F16,
    FILES,
    LLAMA_CPP,
    MERGED,
    Q4,
    edit_json,
    flip,
    list_gguf,
    problems,
    rewrite_manifest,
    write_folder,
    write_gguf,
)

from lib.artifact import find_artifact
from lib.manifest import (
    NAME,
    describe_files,
    read_file_manifest,
    write_folder_manifest,
)
from lib.provenance import gguf_metadata
from lib.verification import check_artifact


@pytest.mark.parametrize("folder", [BASE, ADAPTER, MERGED])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda listed: listed["files"].popitem(), "its digest is not that of the files"),
        (lambda listed: listed["files"].update(x={"size": 0, "sha256": "0" * 64}), "x: missing"),
        (lambda listed: next(iter(listed["files"].values())).update(size=99), "bytes, expected 99"),
        (lambda listed: next(iter(listed["files"].values())).update(sha256="0" * 64), "expected 000000000000…"),
        (lambda listed: listed.update(digest="0" * 64), "its digest is not that of the files"),
        (lambda listed: listed.pop("origin"), "it lacks origin"),
    ],
    ids=["file removed", "file added", "size", "sha256", "digest", "no origin"],
)
def test_an_edited_list_of_files(folder: str, change: Callable[[dict[str, Any]], Any], said: str, chain: Path) -> None:
    rewrite_manifest(chain / folder, change)
    found = problems(chain / folder)
    assert any(said in each for each in found), found


ORIGINS: dict[str, tuple[str, Any, str]] = {
    # what: (place in the manifest of the quantized file, value, what is said)
    "another base": ("source.origin.merged.origin.base.digest", "0" * 64, "are two different bases"),
    "another revision": ("source.origin.merged.origin.base.origin.revision", "v2", "tell two origins of one base"),
    "another adapter": ("source.origin.merged.origin.adapter.digest", "0" * 64, "general.description: the file says"),
    "other data": (
        "source.origin.merged.origin.adapter.origin.data.sha256",
        "0" * 64,
        f"general.dataset.0.description: the file says 'sha256:{'d' * 64}', its manifest 'sha256:{'0' * 64}'",
    ),
    "another policy": ("source.origin.merged.origin.merge.dtype", "bfloat16", "rounded once to bfloat16"),
    "another converter": ("source.origin.llama_cpp", "ffffffffff", "llama.cpp ffffffffff"),
    "another type": ("type", "q8_0", "general.file_type: the file says 15, its manifest q8_0 (7)"),
    "another source": ("source.sha256", "0" * 64, "m.f16.gguf.json is of another source"),
    "no type": ("type", None, "origin lacks type"),
    "nothing it was made from": ("source", None, "origin lacks what it was made from"),
    "source that is a number": ("source", 5, "origin.source: expected name, sha256 and origin, found 5"),
    "source elsewhere": ("source.name", "../m.f16.gguf", "origin.source: expected name, sha256 and origin"),
    "source of nothing": ("source.origin", None, "origin.source: expected name, sha256 and origin"),
    "base that is a list": ("source.origin.merged.origin.base", [], "merged.origin.base: expected digest and origin"),
    "policy that is a text": ("source.origin.merged.origin.merge", "float16", "expected base_weights and dtype"),
    "data without a name": ("source.origin.merged.origin.adapter.origin.data", {}, "expected name and sha256"),
    "versions in a list": ("source.origin.merged.origin.adapter.origin.versions", [], "versions: expected an object"),
    "no base": ("source.origin.merged.origin.base", None, "merged.origin lacks base"),
}


@pytest.mark.parametrize("edited", ORIGINS)
def test_an_edited_origin(edited: str, chain: Path) -> None:
    place, value, said = ORIGINS[edited]

    def change(manifest: dict[str, Any]) -> None:
        found = manifest["origin"]
        *above, last = place.split(".")
        for key in above:
            found = found[key]
        assert found[last] != value
        found[last] = value

    edit_json(Path(f"{chain / Q4}.json"), change)
    found = problems(chain / Q4)
    assert any(said in each for each in found), found


@pytest.mark.parametrize("name", ["general.description", "general.base_model.0.version", "general.dataset.0.name"])
def test_edited_metadata_in_a_gguf_whose_manifest_was_renewed(name: str, chain: Path) -> None:
    """The sum fits the file then; what the file says of itself does not fit the chain."""
    path, origin = chain / Q4, read_file_manifest(chain / Q4)["origin"]
    field = gguf.GGUFReader(path).get_field(name)
    told = field.contents()
    path.write_bytes(path.read_bytes().replace(told.encode(), b"X" + told.encode()[1:]))
    assert [each for each in problems(path) if "changed: sha256" in each]
    list_gguf(path, origin=origin)
    (found,) = problems(path)
    assert found == f"{name}: the file says {'X' + told[1:]!r}, its manifest {told!r}"


def test_metadata_that_names_more_than_the_chain(chain: Path) -> None:
    source = read_file_manifest(chain / F16)["origin"]["merged"]
    metadata = gguf_metadata(source, artifact="merged", name="m", llama_cpp_commit=LLAMA_CPP)
    metadata["general.base_models"].append({"name": "someone/else"})
    (chain / F16).unlink()
    write_gguf(chain / F16, metadata, quant="f16")
    list_gguf(chain / F16, origin={"merged": source, "llama_cpp": LLAMA_CPP, "type": "f16"})
    assert problems(chain / F16) == [
        "general.base_model.1.name: the file says 'someone/else', its manifest nothing",
        "general.base_model.count: the file says 2, its manifest 1",
    ]


def test_a_file_written_without_a_merged_checkpoint(chain: Path) -> None:
    """Base and adapter straight to a GGUF: the chain has no merged link, the metadata is the same."""
    merged = read_file_manifest(chain / F16)["origin"]["merged"]["origin"]
    list_gguf(chain / F16, origin={**merged, "llama_cpp": LLAMA_CPP, "type": "f16"})
    report = check_artifact(find_artifact(chain / F16), threads=1)
    assert report.problems == []
    assert [line.split()[2] for line in report.lines[1:]] == ["adapter", "base"]


def another_adapter(chain: Path) -> None:
    shutil.rmtree(chain / ADAPTER)
    base = json.loads((chain / BASE / NAME).read_text())
    origin = {"base": {"digest": base["digest"], "origin": base["origin"]}, "data": DATA}
    write_folder(
        chain / ADAPTER, {**FILES[ADAPTER], "adapter_model.safetensors": b"FACTORS"}, artifact="adapter", origin=origin
    )


def test_another_adapter_in_its_place(chain: Path) -> None:
    another_adapter(chain)
    assert problems(chain / ADAPTER) == []
    for name in (MERGED, F16, Q4):
        (found,) = problems(chain / name)
        assert f"{ADAPTER}/{NAME} is of another adapter" in found
    assert problems(chain / BASE_F16) == [], "made without any adapter"


def test_manifests_in_each_others_places(chain: Path) -> None:
    shutil.copy(chain / BASE / NAME, chain / ADAPTER / NAME)
    assert any("is of kind 'base', expected 'adapter'" in each for each in problems(chain / Q4))
    assert "adapter_model.safetensors: not in the manifest" in problems(chain / ADAPTER)


def test_an_edited_list_of_files_seen_from_what_was_made_of_them(chain: Path) -> None:
    rewrite_manifest(chain / ADAPTER, lambda listed: listed["files"]["adapter_model.safetensors"].update(size=1))
    for name in (MERGED, F16, Q4):
        (found,) = problems(chain / name)
        assert found.endswith(f"{ADAPTER}/{NAME} was changed: its digest is not that of the files that it lists")


@pytest.mark.parametrize("name", [ADAPTER, MERGED, Q4])
def test_a_copy_among_strangers_is_not_held_against_them(name: str, chain: Path, tmp_path: Path) -> None:
    """Only where the workflow puts an artifact do its neighbours have to be those that it was made from."""
    place = tmp_path / "stick/given" / Path(name).name
    place.parent.mkdir(parents=True)
    if (chain / name).is_dir():
        shutil.copytree(chain / name, place)
    else:
        for ending in ("", ".json"):
            shutil.copy(f"{chain / name}{ending}", place.parent)
    for model in ("m", "merged", "given", "stick"):
        for folder in (tmp_path / "stick/bases" / model, tmp_path / "bases" / model):
            write_folder(folder, {"x": b"x"}, artifact="base", origin={"kind": "hub", "name": "x/y"})
    assert problems(place) == []


def test_another_origin_of_the_same_base(chain: Path) -> None:
    rewrite_manifest(chain / BASE, lambda listed: listed["origin"].update(revision="v2"))
    assert problems(chain / BASE) == [], "nothing but the chain can tell"
    for name in (ADAPTER, MERGED, F16, Q4, BASE_F16):
        (found,) = problems(chain / name)
        assert f"{BASE}/{NAME} tells another origin" in found and f"revision is 'v2' and '{'c' * 40}'" in found


def test_a_source_that_was_made_anew(chain: Path) -> None:
    flip(chain / F16)
    list_gguf(chain / F16, origin=read_file_manifest(chain / F16)["origin"])
    assert problems(chain / F16) == []
    (found,) = problems(chain / Q4)
    assert "m.f16.gguf.json is of another source" in found


def relist(folder: Path) -> None:
    """Renew the sums of a folder's manifest, as somebody would who hides a change."""
    listed = json.loads((folder / NAME).read_text())
    files = describe_files(folder, listed["files"], threads=1)
    write_folder_manifest(folder, artifact=listed["artifact"], files=files, origin=listed["origin"])


@pytest.mark.parametrize(
    ("folder", "name", "content", "said"),
    [
        (ADAPTER, "adapter_config.json", {"base_model_name_or_path": "x/y"}, "base_model_name_or_path is 'x/y'"),
        (MERGED, "config.json", {"torch_dtype": "float32"}, "torch_dtype is 'float32', its manifest says 'float16'"),
        (MERGED, "config.json", "{", "no valid JSON"),
    ],
)
def test_a_config_that_tells_another_origin(folder: str, name: str, content: Any, said: str, chain: Path) -> None:
    (chain / folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    relist(chain / folder)
    (found,) = problems(chain / folder)
    assert name in found and said in found
