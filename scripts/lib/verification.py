"""Checking an artifact against its manifest, its own metadata and what it was made from, wherever it lies now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.adapter_folder import CONFIG
from lib.artifact import Artifact, is_there
from lib.checkpoint import is_side_file
from lib.cli import describe_os_error
from lib.gguf_file import GgufError, read_gguf
from lib.jsonfile import digest_json, read_json
from lib.manifest import (
    FILE_KEYS,
    FOLDER_KEYS,
    ManifestError,
    describe_files,
    file_manifest,
    read_manifest,
    size_problem,
)
from lib.origin import (
    GGUF,
    LORA,
    ROLES,
    TITLES,
    Chain,
    Link,
    compare_link,
    metadata_source,
    read_chain,
    short,
    tell_origin,
    usual_manifest,
)
from lib.outputs import ALSO_OURS
from lib.provenance import compare_metadata, gguf_metadata


@dataclass
class Report:
    """
    What was found out about one artifact.

    Attributes:
        lines: what it is and what it was made from.
        problems: what is wrong; none if all is well.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def text(self) -> Iterator[str]:
        """All of it, for people to read."""
        count = len(self.problems)
        result = [f"  {count} problem{'s' * (count > 1)}:"] if count else ["  ok"]
        result += ["    " + each.replace("\n", "\n    ") for each in self.problems]
        for line in "\n".join([*self.lines, *result]).splitlines():
            # A manifest may hold anything, also what moves a terminal's cursor.
            seen = (sign if sign.isprintable() or sign.isspace() else "\N{REPLACEMENT CHARACTER}" for sign in line)
            yield "".join(seen)


def check_artifact(artifact: Artifact, *, threads: int) -> Report:
    """
    Recompute everything that can be: sizes, digests, the origin in a GGUF's own metadata, the chain of manifests.

    Args:
        threads: for hashing.
    """
    report = Report([str(artifact.path)])
    try:
        if artifact.manifest is None:
            _check_lone_gguf(artifact.path, report)
        elif artifact.is_folder:
            _check_folder(artifact.path, artifact.manifest, report, threads=threads)
        else:
            _check_file(artifact.path, artifact.manifest, report, threads=threads)
    except (ManifestError, GgufError) as error:
        report.problems.append(str(error))
    except OSError as error:
        report.problems.append(f"cannot be read: {describe_os_error(error)}")
    report.lines += [f"  {artifact.remark}"] if artifact.remark else []
    return report


def _check_lone_gguf(path: Path, report: Report) -> None:
    report.problems.append(f"{file_manifest(path).name} is missing: there is nothing to check this file against")
    own = read_gguf(path).metadata
    told = {key: own[key] for key in sorted(own) if key.startswith(("general.base_model.0.", "general.dataset.0."))}
    told = {key: own[key] for key in ("general.name", "general.description") if key in own} | told
    report.lines += [f"  it says of itself: {key} {value}" for key, value in told.items()]


def _check_file(path: Path, manifest: Path, report: Report, *, threads: int) -> None:
    described = read_manifest(manifest, keys=FILE_KEYS)
    named = described.get("name")
    if named != path.name:
        report.problems.append(f"{manifest.name} describes a file of another name: {named!r}")
    kind = described.get("artifact", GGUF)
    chain = read_chain(described["origin"] or {}, artifact=kind)
    _tell(report, kind, f"{_megabytes(described['size'])}, sha256 {short(described['sha256'])}", described, chain)
    facts = {key: described[key] for key in ("size", "sha256")}
    report.problems += changed_files(path.parent, {path.name: facts}, threads=threads)
    if path.is_file() and kind == GGUF:
        report.problems += _header_problems(path, described["origin"], sound=not chain.problems)
    _check_chain(path, kind, chain, report)


def _check_folder(folder: Path, manifest: Path, report: Report, *, threads: int) -> None:
    described = read_manifest(manifest, keys=FOLDER_KEYS)
    kind, files, origin = described["artifact"], described["files"], described["origin"] or {}
    chain = read_chain(origin, artifact=kind)
    size = _megabytes(sum(facts["size"] for facts in files.values()))
    _tell(report, kind, f"{len(files)} files, {size}, digest {short(described['digest'])}", described, chain)
    if described["digest"] != digest_json(files):
        report.problems.append(f"{manifest.name} was changed: its digest is not that of the files that it lists")
    present = {path.name for path in folder.iterdir()}
    if kind == "base" and origin.get("kind") == "path" and manifest.parent == folder and not present & files.keys():
        report.problems.append(
            f"its files are used in place, in a folder {origin.get('name')!r} elsewhere; to check them: "
            f"python scripts/verify.py --manifest {manifest} FOLDER"
        )
        return
    report.problems += changed_files(folder, files, threads=threads)
    report.problems += _surplus(folder, files, in_place=manifest.parent != folder)
    if not chain.problems:
        report.problems += _config_problems(folder, kind, origin)
    _check_chain(folder, kind, chain, report)


def changed_files(folder: Path, files: dict[str, dict[str, Any]], *, threads: int) -> list[str]:
    """
    Every file of a list that is missing or has another size or content, read in full.

    Args:
        files: name → size and sha256, as in a manifest.
    """
    problems = {}
    for name, facts in files.items():
        problems[name] = size_problem(folder / name, facts["size"]) or _closed(folder / name)
    whole = [name for name, problem in problems.items() if problem is None]
    for name, found in describe_files(folder, whole, threads=threads).items():
        if found["sha256"] != files[name]["sha256"]:
            problems[name] = f"changed: sha256 {short(found['sha256'])}, expected {short(files[name]['sha256'])}"
    return [f"{name}: {problem}" for name, problem in sorted(problems.items()) if problem]


def _closed(path: Path) -> str | None:
    """Why a file cannot be opened."""
    try:
        path.open("rb").close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _surplus(folder: Path, files: dict[str, Any], *, in_place: bool) -> list[str]:
    """Files that the manifest does not name; of a folder that is not ours, only what would belong to a checkpoint."""
    known = {Path(name).parts[0] for name in files} | ALSO_OURS
    surplus = sorted(path.name for path in folder.iterdir() if path.name not in known)
    return [f"{name}: not in the manifest" for name in surplus if not in_place or is_side_file(name)]


def _header_problems(path: Path, origin: dict[str, Any] | None, *, sound: bool) -> list[str]:
    """What is wrong with a GGUF's header, and where it tells another origin than a sound one of the manifest."""
    try:
        own = read_gguf(path).metadata
    except GgufError as error:
        return [str(error)]
    if not sound or origin is None:
        return []
    if origin["type"] == LORA:
        found = own.get("adapter.type")
        return [] if found == LORA else [f"adapter.type: the file says {found!r}, its manifest {LORA}"]
    source, artifact, commit = metadata_source(origin)
    expected = gguf_metadata(source, artifact=artifact, name=str(own.get("general.name")), llama_cpp_commit=commit)
    return [*_type_problems(own, origin["type"]), *compare_metadata(own, expected)]


def _type_problems(own: dict[str, Any], named: str) -> list[str]:
    from gguf import LlamaFileType

    expected = LlamaFileType.__members__.get(f"MOSTLY_{named.upper()}")
    found = own.get("general.file_type")
    if expected is None or found == expected:
        return []
    return [f"general.file_type: the file says {found!r}, its manifest {named} ({int(expected)})"]


def _config_problems(folder: Path, kind: str, origin: dict[str, Any]) -> Iterator[str]:
    """Where an adapter's or a merged checkpoint's own config tells another origin."""
    if kind == "adapter":
        name, keys = CONFIG, ("base_model_name_or_path",)
        expected = (origin["base"]["origin"] or {}).get("name")
    elif kind == "merged":
        name, keys, expected = "config.json", ("dtype", "torch_dtype"), origin["merge"]["dtype"]
    else:
        return
    if not (folder / name).is_file():
        return
    try:
        config = read_json(folder / name)
    except ValueError as error:
        yield str(error)
        return
    told = {key: config[key] for key in keys if key in config} if isinstance(config, dict) else {}
    for key, found in told.items():
        if expected is not None and found != expected:
            yield f"{name}: {key} is {found!r:.80}, its manifest says {expected!r:.80}"


def _tell(report: Report, kind: str, facts: str, described: dict[str, Any], chain: Chain) -> None:
    """The lines of an artifact and of what it was made from."""
    about = "" if chain.problems else tell_origin(described["origin"] or {}, artifact=kind)
    report.lines[0] = ": ".join([report.lines[0], ", ".join(filter(None, [TITLES.get(kind, kind), facts, about]))])
    report.problems += chain.problems


def _check_chain(path: Path, kind: str, chain: Chain, report: Report) -> None:
    """Hold every link against the manifest in its usual place; what is not there was not copied along."""
    told = set()
    for link in chain.links:
        if (link.role, link.digest) in told:
            continue
        told.add((link.role, link.digest))  # a base that the chain names twice is told once
        manifest = usual_manifest(path, artifact=kind, link=link)
        here = manifest is not None and is_there(manifest)
        about = "" if chain.problems else tell_origin(link.origin, artifact=ROLES[link.role])
        named = " ".join(
            filter(None, [f"  from the {TITLES.get(link.role, link.role)}", link.name, short(link.digest)])
        )
        report.lines.append(f"{', '.join(filter(None, [named, about]))}: {f'see {manifest}' if here else 'not here'}")
        report.problems += _link_problems(link, manifest) if here else []


def _link_problems(link: Link, manifest: Path) -> list[str]:
    try:
        return compare_link(link, manifest)
    except ManifestError as error:
        return [str(error)]
    except OSError as error:
        return [f"cannot be read: {describe_os_error(error)}"]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
