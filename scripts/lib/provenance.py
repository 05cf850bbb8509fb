"""What a GGUF file says of where it comes from, in llama.cpp's `general.*` keys."""

from __future__ import annotations

from typing import Any

# llama.cpp's converter guesses these from the folder's name and README; null takes the guess out.
GUESSED = ("author", "version", "organization", "finetune", "basename", "quantized_by", "license.name", "license.link")


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
        policy = origin["merge"]
        parts.append(f"merged in float32 onto the {policy['base_weights']} weights, rounded once to {policy['dtype']}")
        data = (adapter.get("origin") or {}).get("data")
        metadata["general.datasets"] = (
            [{"name": data["name"], "description": f"sha256:{data['sha256']}"}] if data else None
        )
    parts.append(f"llama.cpp {llama_cpp_commit}")
    metadata["general.description"] = "; ".join(parts)
    return metadata


def _base_model(base: dict[str, Any]) -> dict[str, str]:
    origin = base.get("origin") or {}
    model = {"name": origin.get("name", "base"), "version": origin.get("revision")}
    model["description"] = f"sha256:{base['digest']}" if base.get("digest") else None
    return {key: value for key, value in model.items() if value}
