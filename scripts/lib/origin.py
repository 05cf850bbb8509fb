"""The chain inside a manifest's `origin`: what an artifact was made from, link by link, and how it is put in words."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.jsonfile import digest_json
from lib.manifest import FILE_KEYS, FOLDER_KEYS, NAME, is_sha256, read_manifest
from lib.provenance import merge_policy

GGUF, ONNX = "gguf", "onnx"
# What an artifact can be made from, with the kind of artifact that it is itself; nearest first.
ROLES = {"source": GGUF, "merged": "merged", "adapter": "adapter", "base": "base"}
# What people read for those whose own name says too little.
TITLES = {GGUF: "GGUF", ONNX: "ONNX", "merged": "merged checkpoint", "source": "16-bit GGUF"}
# What the origin of each kind has to name.
NEEDED = {
    GGUF: ("type", "llama_cpp"),
    ONNX: ("merged", "opset"),
    "merged": ("base", "merge"),
    "adapter": ("base",),
    "base": ("kind", "name"),
}
# Where the workflow keeps the manifest of each.
PLACES = {"base": "bases/{model}", "adapter": "adapters/{model}", "merged": "models/{model}/merged"}
LORA = "lora"  # the type of an adapter's own GGUF, which is merged into nothing
SHORT = 12


@dataclass(frozen=True)
class Link:
    """
    One thing that an artifact was made from.

    Attributes:
        role: a key of ROLES; a source is the 16-bit GGUF that a quantized one was made of.
        digest: of a folder's content, or the sha256 of a source.
        name: file name of a source, else empty.
        origin: what it was made from itself; None where nobody knew.
        where: its place in the manifest, as in "origin.source".
    """

    role: str
    digest: str
    name: str
    origin: dict[str, Any] | None
    where: str


@dataclass(frozen=True)
class Chain:
    """
    Attributes:
        links: everything that the origin names, the nearest first.
        problems: where the origin is damaged, or contradicts itself.
    """

    links: tuple[Link, ...]
    problems: tuple[str, ...]


def read_chain(origin: Mapping[str, Any], *, artifact: str) -> Chain:
    """
    Take an origin apart.

    Args:
        origin: of a manifest, whatever somebody may have written there.
        artifact: the kind of artifact that it is the origin of; of kinds that are not in NEEDED nothing is known.
    """
    if artifact not in NEEDED:
        return Chain((), ())
    problems: list[str] = []
    links = tuple(_links(origin, artifact=artifact, where="origin", problems=problems))
    return Chain(links, (*problems, *_contradictions(links)))


def metadata_source(origin: dict[str, Any]) -> tuple[dict[str, Any], str, str]:
    """
    What the metadata of a GGUF was made from, for lib.provenance.gguf_metadata.

    Args:
        origin: of a GGUF, sound as `read_chain` finds it.

    Returns:
        Identity of the converted checkpoint, its kind, and the converter's llama.cpp.
    """
    while origin.get("source"):
        origin = origin["source"]["origin"]
    if origin.get("merged"):
        return origin["merged"], "merged", origin["llama_cpp"]
    if origin.get("merge"):  # folded and written in one go: there never was a merged checkpoint
        return {"digest": None, "origin": origin}, "merged", origin["llama_cpp"]
    return origin["base"], "base", origin["llama_cpp"]


def usual_manifest(path: Path, *, artifact: str, link: Link) -> Path | None:
    """
    Where the workflow keeps the manifest of a link, relative to the working directory if `path` is.

    Returns:
        None if the artifact does not lie where the workflow puts it.
    """
    place = Path(os.path.abspath(path))
    if link.role == "source":
        return path.with_name(f"{link.name}.json")
    model, home, expected = {
        GGUF: (place.name.partition(".")[0], place.parent, "models"),
        ONNX: (place.name.partition(".")[0], place.parent, "models"),
        "merged": (place.parent.name, place.parent.parent, "models"),
        "adapter": (place.name, place.parent, "adapters"),
        "base": (place.name, place.parent, "bases"),
    }[artifact]
    if home.name != expected:
        return None
    manifest = home.parent / PLACES[link.role].format(model=model) / NAME
    return manifest if path.is_absolute() else Path(os.path.relpath(manifest))


def compare_link(link: Link, manifest: Path) -> list[str]:
    """
    Where the manifest of something that is here is not the one that the chain names.

    Raises:
        ManifestError: it is damaged.
        OSError: it cannot be read.
    """
    found = read_manifest(manifest, keys=FILE_KEYS if link.role == "source" else FOLDER_KEYS)
    digest = found["sha256" if link.role == "source" else "digest"]
    if found.get("artifact") != ROLES[link.role]:
        return [f"{manifest} is of kind {found.get('artifact')!r}, expected {ROLES[link.role]!r}"]
    if "files" in found and digest != digest_json(found["files"]):
        return [f"{manifest} was changed: its digest is not that of the files that it lists"]
    if digest != link.digest:
        return [f"{manifest} is of another {link.role}: {short(digest)}, {link.where} names {short(link.digest)}"]
    if link.origin is not None and found["origin"] != link.origin:
        return [f"{manifest} tells another origin than {link.where}: {_differing(found['origin'], link.origin)}"]
    return []


def tell_origin(origin: Mapping[str, Any] | None, *, artifact: str) -> str:
    """In a few words what a sound origin says of an artifact beside the links of its chain; empty for nothing."""
    if origin is None:
        return "of unknown origin"
    if artifact == ONNX:
        return f"opset {origin['opset']}"
    if artifact == GGUF:
        made = f"{origin['type']}, by llama.cpp {origin['llama_cpp']}"
        # Of one that was built directly; else the merged checkpoint of its chain tells how it was merged.
        return f"{made}, {merge_policy(origin['merge'])}" if origin.get("adapter") and origin.get("merge") else made
    if artifact == "merged":
        return merge_policy(origin["merge"]) if origin.get("adapter") else f"no adapter, in {origin['merge']['dtype']}"
    if artifact == "adapter":
        return "; ".join(_tell_adapter(origin))
    if artifact == "base":
        revision = f", revision {origin['revision']}" if origin.get("revision") else ""
        return f"{origin['name']} ({origin['kind']}{revision})"
    return ""


def short(digest: str) -> str:
    """The beginning of a digest, enough to tell it from any other here."""
    return f"{digest[:SHORT]}…"


def _links(origin: Mapping[str, Any], *, artifact: str, where: str, problems: list[str]) -> Iterator[Link]:
    lacking = [key for key in NEEDED[artifact] if origin.get(key) is None]
    if artifact == GGUF and not any(origin.get(role) for role in ROLES):
        lacking.append("what it was made from")
    if origin.get("adapter") and origin.get("type") != LORA and not (origin.get("merge") or origin.get("merged")):
        lacking.append("merge")
    problems += [f"{where} lacks {', '.join(lacking)}"] if lacking else []
    problems += [f"{where}.{key}: {wrong}" for key in sorted(origin) if (wrong := _wrong_form(key, origin[key]))]
    for role in ROLES:
        found = origin.get(role)
        if found is None or _wrong_form(role, found):
            continue
        place = f"{where}.{role}"
        digest = found["sha256" if role == "source" else "digest"]
        yield Link(role=role, digest=digest, name=found.get("name") or "", origin=found["origin"], where=place)
        if found["origin"] is not None:
            yield from _links(found["origin"], artifact=ROLES[role], where=f"{place}.origin", problems=problems)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_policy(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(value.get(key)) for key in ("base_weights", "dtype"))


def _is_data(value: Any) -> bool:
    return isinstance(value, dict) and _is_text(value.get("name")) and is_sha256(value.get("sha256"))


def _is_identity(value: Any) -> bool:
    known = isinstance(value, dict) and "origin" in value
    return known and is_sha256(value.get("digest")) and isinstance(value["origin"], dict | None)


def _is_source(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("origin"), dict) or not is_sha256(value.get("sha256")):
        return False
    return _is_text(value.get("name")) and value["name"] == Path(value["name"]).name != ""


_FORMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **{key: ("a text", _is_text) for key in ("type", "llama_cpp", "kind", "name", "revision")},
    **{key: ("an object", _is_object) for key in ("settings", "versions", "four_bit")},
    **{key: ("name and sha256 of a file", _is_data) for key in ("data", "eval_data")},
    **{key: ("digest and origin", _is_identity) for key in ("base", "adapter", "merged")},
    "opset": ("a whole number", lambda value: type(value) is int),
    "source": ("name, sha256 and origin", _is_source),
    "merge": ("base_weights and dtype", _is_policy),
}


def _wrong_form(key: str, value: Any) -> str | None:
    expected, fits = _FORMS.get(key, ("", lambda _: True))
    return None if value is None or fits(value) else f"expected {expected}, found {value!r:.80}"


def _contradictions(links: tuple[Link, ...]) -> Iterator[str]:
    """A chain can name a base twice: as what was merged into, and as what the adapter was trained on."""
    first: dict[str, Link] = {}
    for link in links:
        known = first.setdefault(link.role, link)
        both = f"{known.where} and {link.where}"
        if link.digest != known.digest:
            yield f"{both} are two different {link.role}s: {short(known.digest)} and {short(link.digest)}"
        elif None not in (link.origin, known.origin) and link.origin != known.origin:
            yield f"{both} tell two origins of one {link.role}: {_differing(known.origin, link.origin)}"


def _differing(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str:
    """The first key whose value differs, with both values."""
    one, other = one or {}, other or {}
    key = next((key for key in sorted({*one, *other}) if one.get(key) != other.get(key)), "")
    return f"{key} is {one.get(key)!r:.80} and {other.get(key)!r:.80}"


def _tell_adapter(origin: Mapping[str, Any]) -> Iterator[str]:
    if data := origin.get("data"):
        yield f"trained on {data['name']} {short(data['sha256'])}"
    if origin.get("kind"):
        yield f"taken from {origin.get('name')}"
    if method := (origin.get("settings") or {}).get("method"):
        yield f"method {method}"
    if versions := origin.get("versions"):
        yield ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
