"""What a GGUF file says of where it comes from, in llama.cpp's `general.*` keys."""

from __future__ import annotations

from typing import Any

# llama.cpp's converter guesses these from the folder's name and README; null takes the guess out.
GUESSED = ("author", "version", "organization", "finetune", "basename", "quantized_by", "license.name", "license.link")
# What an adapter was merged into, by `merge.base_weights`.
BASE_WEIGHTS = {"original": "the original weights", "nf4": "the weights of its 4-bit training"}
# Lists of a `--metadata` file, and how the keys begin that the converter makes of their entries.
NUMBERED = {"general.base_models": "general.base_model", "general.datasets": "general.dataset"}


def gguf_metadata(source: dict[str, Any], *, artifact: str, name: str, llama_cpp_commit: str) -> dict[str, Any]:
    """
    The content of the converter's `--metadata` file.

    Only what any path from base and adapter to the file knows: identities, not folders, paths or times.

    Args:
        source: digest and origin of the converted checkpoint, as lib.manifest.identify_folder gives them.
        artifact: "merged" or "base".
        name: of the model.
        llama_cpp_commit: of the converter.
    """
    origin = source["origin"] or {}
    base = source if artifact == "base" else origin.get("base") or {}
    adapter = (origin.get("adapter") or {}) if artifact == "merged" else {}
    metadata: dict[str, Any] = {f"general.{key}": None for key in (*GUESSED, "tags", "languages")}
    metadata["general.name"] = name
    metadata["general.base_models"] = [_base_model(base)]
    parts = []
    if adapter:
        parts.append(f"LoRA adapter sha256:{adapter['digest']}")
        parts.append(merge_policy(origin["merge"]))
        data = (adapter.get("origin") or {}).get("data")
        metadata["general.datasets"] = (
            [{"name": data["name"], "description": f"sha256:{data['sha256']}"}] if data else None
        )
    parts.append(f"llama.cpp {llama_cpp_commit}")
    metadata["general.description"] = "; ".join(parts)
    return metadata


def merge_policy(policy: dict[str, Any]) -> str:
    """In words, how the adapter was merged."""
    weights = BASE_WEIGHTS.get(policy["base_weights"], policy["base_weights"])
    return f"merged in float32 onto {weights}, rounded once to {policy['dtype']}"


def compare_metadata(found: dict[str, Any], metadata: dict[str, Any]) -> list[str]:
    """
    Where a GGUF's own keys tell another origin than its manifest.

    Args:
        found: key → value of the file; keys that tell no origin do not count.
        metadata: as `gguf_metadata` makes it of the manifest's origin.
    """
    expected = {"general.description": metadata["general.description"]}
    told = ["general.description"]
    for plural, key in NUMBERED.items():
        if plural not in metadata:  # left to the converter, which may take it from a model card
            continue
        entries = metadata[plural] or []
        expected |= {
            f"{key}.{number}.{name}": text for number, each in enumerate(entries) for name, text in each.items()
        }
        expected |= {f"{key}.count": len(entries)} if entries else {}
        told += [name for name in found if name.startswith(f"{key}.")]
    return [
        f"{key}: the file says {_quoted(found.get(key))}, its manifest {_quoted(expected.get(key))}"
        for key in sorted({*told, *expected})
        if found.get(key) != expected.get(key)
    ]


def _quoted(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _base_model(base: dict[str, Any]) -> dict[str, str]:
    origin = base.get("origin") or {}
    model = {"name": origin.get("name", "base"), "version": origin.get("revision")}
    model["description"] = f"sha256:{base['digest']}" if base.get("digest") else None
    return {key: value for key, value in model.items() if value}
