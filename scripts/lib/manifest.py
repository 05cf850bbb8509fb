"""
Manifests: the small files that carry an artifact's identity.

A folder's MANIFEST.json lists `{name: {size, sha256}}` of every file in it; a single file has the
same facts beside it as `{name}.json`. Both carry `origin`: what the artifact was made from. They hold
no time and no absolute path, so the same artifact has the same manifest wherever it is built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lib.console import progress
from lib.errors import ModelmillError
from lib.jsonfile import digest_json, read_json, write_json

NAME = "MANIFEST.json"
BLOCK_BYTES = 1 << 20


class ManifestError(ModelmillError):
    """A manifest is missing, damaged or does not describe what is beside it."""


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of one file."""
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def describe_files(folder: Path, names: Iterable[str], *, threads: int) -> dict[str, dict[str, Any]]:
    """`describe_file` of several files in a folder; hashing releases the GIL, so threads help."""
    ordered = sorted(names)
    total = sum((folder / name).stat().st_size for name in ordered)
    described = {}
    with ThreadPoolExecutor(max_workers=threads) as pool, progress("hashing", total=total, unit="B") as bar:
        facts_of_each = pool.map(lambda name: describe_file(folder / name), ordered)
        for name, facts in zip(ordered, facts_of_each, strict=True):
            described[name] = facts
            bar.advance(facts["size"])
    return described


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
    described = _read(path, "artifact", "digest", "files", "origin")
    if described["artifact"] != artifact:
        raise ManifestError(f"{path} describes a {described['artifact']}, expected a {artifact}")
    problems = [
        f"  {name}: {problem}"
        for name, facts in described["files"].items()
        if (problem := _size_problem(folder / name, facts["size"]))
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


def write_file_manifest(path: Path, *, facts: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of one file beside it, as `{name}.json`."""
    manifest = {"artifact": "gguf", "name": path.name, "origin": origin, **facts}
    write_json(path.with_name(path.name + ".json"), manifest)
    return manifest


def read_file_manifest(path: Path) -> dict[str, Any]:
    """
    Read the manifest beside a file and check the file's size.

    Raises:
        ManifestError: no manifest, no file, or another size.
    """
    beside = path.with_name(path.name + ".json")
    if not beside.is_file():
        raise ManifestError(f"{beside} is missing: {path.name} was not finished by modelmill")
    manifest = _read(beside, "size", "sha256", "origin")
    if problem := _size_problem(path, manifest["size"]):
        raise ManifestError(f"{path}: {problem}")
    return manifest


def _read(path: Path, *keys: str) -> dict[str, Any]:
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise ManifestError(str(error)) from error
    lacking = [key for key in keys if key not in manifest] if isinstance(manifest, dict) else list(keys)
    if lacking:
        raise ManifestError(f"{path} is no manifest of modelmill's: it lacks {', '.join(lacking)}")
    return manifest


def _size_problem(path: Path, expected: int) -> str | None:
    if not path.is_file():
        return "missing"
    found = path.stat().st_size
    return None if found == expected else f"{found} bytes, expected {expected}"
