"""
Manifests: the small files that carry an artifact's identity.

A folder's MANIFEST.json lists `{name: {size, sha256}}` of every file in it; a single file has the
same facts beside it as `{name}.json`. Both carry `origin`: what the artifact was made from. They hold
no time and no absolute path, so the same artifact has the same manifest wherever it is built.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from lib.console import progress
from lib.errors import ModelmillError
from lib.jsonfile import digest_json, read_json, write_json

NAME = "MANIFEST.json"
BLOCK_BYTES = 1 << 20
# What a manifest has to hold: that of a folder, and that of a single file.
FOLDER_KEYS = ("artifact", "digest", "files", "origin")
FILE_KEYS = ("size", "sha256", "origin")


class ManifestError(ModelmillError):
    """A manifest is missing, damaged or does not describe what is beside it."""


def sha256_file(path: Path, *, advance: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file's bytes, in hex, read in blocks of 1 MiB; `advance` is told the bytes of each."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def describe_file(path: Path, *, advance: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Size in bytes and SHA-256 of one file; `advance` as for `sha256_file`."""
    return {"size": path.stat().st_size, "sha256": sha256_file(path, advance=advance)}


def describe_files(folder: Path, names: Iterable[str], *, threads: int) -> dict[str, dict[str, Any]]:
    """`describe_file` of several files in a folder; hashing releases the GIL, so threads help."""
    ordered = sorted(names)
    total = sum((folder / name).stat().st_size for name in ordered)
    with ThreadPoolExecutor(max_workers=threads) as pool, progress("hashing", total=total, unit="B") as bar:
        facts_of_each = pool.map(lambda name: describe_file(folder / name, advance=bar.advance), ordered)
        return dict(zip(ordered, facts_of_each, strict=True))


def folder_manifest(*, artifact: str, files: dict[str, dict[str, Any]], origin: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a folder; `digest` identifies the content alone, whatever its origin."""
    return {"artifact": artifact, "digest": digest_json(files), "files": files, "origin": origin}


def write_folder_manifest(
    folder: Path, *, artifact: str, files: dict[str, dict[str, Any]], origin: dict[str, Any]
) -> dict[str, Any]:
    """Write a folder's MANIFEST.json, last of all its files, and return it."""
    manifest = folder_manifest(artifact=artifact, files=files, origin=origin)
    write_json(folder / NAME, manifest)
    return manifest


def read_folder_manifest(folder: Path, *, artifact: str, manifest: Path | None = None) -> dict[str, Any]:
    """
    Read a folder's manifest and check that every file it names is there with its size.

    Args:
        folder: the artifact.
        artifact: what the manifest has to describe.
        manifest: the manifest, where that is not in the folder.

    Raises:
        ManifestError: no manifest, another kind of artifact, or files missing or of another size.
    """
    path = manifest or folder / NAME
    if not path.is_file():
        raise ManifestError(f"{path} is missing: {folder} is no complete {artifact}")
    described = read_manifest(path, keys=FOLDER_KEYS)
    if described["artifact"] != artifact:
        raise ManifestError(f"{path} describes a {described['artifact']}, expected a {artifact}")
    problems = [
        f"  {name}: {problem}"
        for name, facts in described["files"].items()
        if (problem := size_problem(folder / name, facts["size"]))
    ]
    if problems:
        raise ManifestError("\n".join([f"{folder} does not match its {NAME}:", *problems]))
    return described


def identify_folder(
    folder: Path, manifest: Path | None, *, artifact: str, names: Callable[[Path], list[str]], threads: int
) -> dict[str, Any]:
    """
    Digest and origin of an input folder, for the origin of what is made from it.

    Args:
        folder: the input.
        manifest: its manifest, where that is not in the folder; None looks there.
        artifact: what the manifest has to describe.
        names: lists the files of a folder that has no manifest; they are hashed.

    Raises:
        ManifestError: the manifest does not describe the folder.
    """
    if manifest is None and not (folder / NAME).is_file():
        return {"digest": digest_json(describe_files(folder, names(folder), threads=threads)), "origin": None}
    described = read_folder_manifest(folder, artifact=artifact, manifest=manifest)
    return {"digest": described["digest"], "origin": described["origin"]}


def write_file_manifest(
    path: Path, *, facts: dict[str, Any], origin: dict[str, Any], artifact: str = "gguf"
) -> dict[str, Any]:
    """Write the manifest of one file beside it, as `{name}.json`."""
    manifest = {"artifact": artifact, "name": path.name, "origin": origin, **facts}
    write_json(file_manifest(path), manifest)
    return manifest


def file_manifest(path: Path) -> Path:
    """Where the manifest of one file lies."""
    return path.with_name(path.name + ".json")


def read_file_manifest(path: Path) -> dict[str, Any]:
    """
    Read the manifest beside a file and check the file's size.

    Raises:
        ManifestError: no manifest, no file, or another size.
    """
    beside = file_manifest(path)
    if not beside.is_file():
        raise ManifestError(f"{beside} is missing: {path.name} was not finished by modelmill")
    manifest = read_manifest(beside, keys=FILE_KEYS)
    if problem := size_problem(path, manifest["size"]):
        raise ManifestError(f"{path}: {problem}")
    return manifest


def read_manifest(path: Path, *, keys: Iterable[str]) -> dict[str, Any]:
    """
    Read a manifest and check its form, not what it describes.

    Args:
        path: the manifest.
        keys: FOLDER_KEYS or FILE_KEYS.

    Raises:
        ManifestError: no JSON, or keys that are missing or of another form; all of these are listed.
    """
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise ManifestError(str(error)) from error
    except RecursionError as error:
        raise ManifestError(f"{path} is no manifest of modelmill's: it is nested too deeply") from error
    lacking = [key for key in keys if key not in manifest] if isinstance(manifest, dict) else list(keys)
    if lacking:
        raise ManifestError(f"{path} is no manifest of modelmill's: it lacks {', '.join(lacking)}")
    wrong = [f"  {problem}" for key in keys for problem in _form_problems(key, manifest[key])]
    if wrong:
        raise ManifestError("\n".join([f"{path} is damaged:", *wrong]))
    return manifest


def is_sha256(value: Any) -> bool:
    """Whether a value is a SHA-256 as we write it: 64 hex digits in lower case."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def size_problem(path: Path, expected: int) -> str | None:
    """What is wrong with a file that should have `expected` bytes: that it is missing, or its size."""
    if not path.is_file():
        return "missing"
    found = path.stat().st_size
    return None if found == expected else f"{found} bytes, expected {expected}"


def _form_problems(key: str, value: Any) -> Iterator[str]:
    if key == "files" and isinstance(value, dict):
        for name, facts in value.items():
            if not _stays_inside(name):
                yield f"files: {name!r} is no file of this folder"
            elif not _are_facts(facts):
                yield f"files: {name}: expected its size and sha256, found {facts!r:.80}"
        return
    expected, fits = {
        "artifact": ("a text", isinstance(value, str)),
        "digest": ("64 hex digits", is_sha256(value)),
        "sha256": ("64 hex digits", is_sha256(value)),
        "size": ("a number of bytes", _is_size(value)),
        "files": ("size and sha256 of each file", False),
        "origin": ("what it was made from", isinstance(value, dict | None)),
    }[key]
    if not fits:
        yield f"{key}: expected {expected}, found {value!r:.80}"


def _stays_inside(name: str) -> bool:
    """Whether a name leads to a file below the folder, and can be a file's name at all."""
    parts = PurePosixPath(name).parts
    encodable = name.encode(errors="replace").decode() == name
    return encodable and "\0" not in name and bool(parts) and ".." not in parts and parts[0] != "/"


def _are_facts(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"size", "sha256"}
        and _is_size(value["size"])
        and is_sha256(value["sha256"])
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
