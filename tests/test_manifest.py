"""Manifests: identity by content alone, and what does not match them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from lib.manifest import (
    BLOCK_BYTES,
    NAME,
    ManifestError,
    describe_files,
    identify_folder,
    read_file_manifest,
    read_folder_manifest,
    sha256_file,
    write_file_manifest,
    write_folder_manifest,
)

FILES = {"a.bin": b"first", "b.bin": b"second", "c.bin": b""}


def fill(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != NAME)


def write(folder: Path, *, origin: dict[str, object] | None = None) -> dict[str, object]:
    files = describe_files(folder, names(folder), threads=2)
    return write_folder_manifest(folder, artifact="base", files=files, origin=origin or {})


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5])
def test_sha256(size: int, tmp_path: Path) -> None:
    content = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    (tmp_path / "x").write_bytes(content)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("threads", [1, 4])
def test_files_are_described_in_the_order_of_their_names(threads: int, tmp_path: Path) -> None:
    described = describe_files(fill(tmp_path / "x"), reversed(FILES), threads=threads)
    assert list(described) == sorted(FILES)
    assert described["b.bin"] == {"size": 6, "sha256": hashlib.sha256(b"second").hexdigest()}


def test_hashing_tells_how_far_it_is(tmp_path: Path) -> None:
    """In a file of 20 GB as well, not only between files."""
    (tmp_path / "x").write_bytes(bytes(2 * BLOCK_BYTES + 5))
    steps: list[int] = []
    sha256_file(tmp_path / "x", advance=steps.append)
    assert steps == [BLOCK_BYTES, BLOCK_BYTES, 5]


def test_the_same_content_has_the_same_manifest_anywhere(tmp_path: Path) -> None:
    for name in ("here", "elsewhere/deep"):
        write(fill(tmp_path / name), origin={"kind": "hub"})
    here, there = tmp_path / "here" / NAME, tmp_path / "elsewhere/deep" / NAME
    assert here.read_bytes() == there.read_bytes()


def test_the_digest_is_of_the_content_whatever_its_origin(tmp_path: Path) -> None:
    one = write(fill(tmp_path / "one"), origin={"kind": "hub"})
    two = write(fill(tmp_path / "two"), origin={"kind": "path"})
    other = write(fill(tmp_path / "three", FILES | {"a.bin": b"FIRST"}))
    renamed = write(fill(tmp_path / "four", {"z.bin": b"first", "b.bin": b"second", "c.bin": b""}))
    assert one["digest"] == two["digest"]
    assert len({one["digest"], other["digest"], renamed["digest"]}) == 3


def test_a_manifest_is_read_back(tmp_path: Path) -> None:
    folder = fill(tmp_path / "x")
    written = write(folder, origin={"kind": "hub"})
    assert read_folder_manifest(folder, artifact="base") == written == json.loads((folder / NAME).read_text())


def test_every_file_that_does_not_match_is_listed(tmp_path: Path) -> None:
    folder = fill(tmp_path / "x")
    write(folder)
    (folder / "a.bin").unlink()
    (folder / "b.bin").write_bytes(b"sec")
    with pytest.raises(ManifestError) as refused:
        read_folder_manifest(folder, artifact="base")
    assert "a.bin: missing" in str(refused.value)
    assert "b.bin: 3 bytes, expected 6" in str(refused.value)
    assert "c.bin" not in str(refused.value)


def test_another_kind_of_artifact(tmp_path: Path) -> None:
    folder = fill(tmp_path / "x")
    write(folder)
    with pytest.raises(ManifestError, match="describes a base, expected a merged"):
        read_folder_manifest(folder, artifact="merged")


@pytest.mark.parametrize("content", ["{", "", "[]", "{}", '{"artifact": "base"}', '{"artifact": "base", "files": {}}'])
def test_a_damaged_manifest(content: str, tmp_path: Path) -> None:
    folder = fill(tmp_path / "x")
    (folder / NAME).write_text(content)
    with pytest.raises(ManifestError, match=NAME):
        identify_folder(folder, None, artifact="base", names=names, threads=1)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"../a.bin": {"size": 5, "sha256": "0" * 64}}, "'../a.bin' is no file of this folder"),
        ({"/etc/hostname": {"size": 5, "sha256": "0" * 64}}, "'/etc/hostname' is no file of this folder"),
        ({"a.bin": 5}, "a.bin: expected its size and sha256, found 5"),
        ({"a.bin": {"size": "5", "sha256": "0" * 64}}, "a.bin: expected its size and sha256"),
        ({"a.bin": {"size": 5, "sha256": "short"}}, "a.bin: expected its size and sha256"),
        (["a.bin"], "files: expected size and sha256 of each file, found ['a.bin']"),
    ],
)
def test_a_list_of_files_that_makes_no_sense(facts: object, said: str, tmp_path: Path) -> None:
    folder = fill(tmp_path / "x")
    write(folder)
    manifest = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**manifest, "files": facts, "digest": 1}))
    with pytest.raises(ManifestError) as refused:
        read_folder_manifest(folder, artifact="base")
    assert said in str(refused.value)
    assert "digest: expected 64 hex digits, found 1" in str(refused.value), "all of it at once"


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=f"{NAME} is missing"):
        read_folder_manifest(fill(tmp_path / "x"), artifact="base")


def test_a_folder_is_identified_with_or_without_a_manifest(tmp_path: Path) -> None:
    """A folder that somebody else made has no manifest; its content still says what it is."""
    folder = fill(tmp_path / "x")
    unlisted = identify_folder(folder, None, artifact="base", names=names, threads=2)
    written = write(folder, origin={"kind": "hub"})
    listed = identify_folder(folder, None, artifact="base", names=names, threads=2)
    assert unlisted == {"digest": written["digest"], "origin": None}
    assert listed == {"digest": written["digest"], "origin": {"kind": "hub"}}


def test_a_manifest_kept_elsewhere(tmp_path: Path) -> None:
    folder = fill(tmp_path / "x")
    write(folder)
    (folder / NAME).rename(tmp_path / "kept.json")
    found = identify_folder(folder, tmp_path / "kept.json", artifact="base", names=names, threads=1)
    assert found["origin"] == {}
    with pytest.raises(ManifestError, match="missing"):
        identify_folder(folder, tmp_path / "absent.json", artifact="base", names=names, threads=1)


def test_a_files_manifest(tmp_path: Path) -> None:
    path = tmp_path / "m.f16.gguf"
    path.write_bytes(b"GGUF")
    facts = {"size": 4, "sha256": hashlib.sha256(b"GGUF").hexdigest()}
    written = write_file_manifest(path, facts=facts, origin={"type": "f16"})
    assert read_file_manifest(path) == written
    assert written == {"artifact": "gguf", "name": "m.f16.gguf", "origin": {"type": "f16"}, **facts}
    assert write_file_manifest(path, facts=facts, origin={}, artifact="onnx")["artifact"] == "onnx"
    path.write_bytes(b"GG")
    with pytest.raises(ManifestError, match="2 bytes, expected 4"):
        read_file_manifest(path)
    path.unlink()
    with pytest.raises(ManifestError, match="missing"):
        read_file_manifest(path)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_file_without_a_usable_manifest(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    if content is not None:
        (tmp_path / "m.gguf.json").write_text(content)
    with pytest.raises(ManifestError, match=r"m\.gguf\.json"):
        read_file_manifest(path)
