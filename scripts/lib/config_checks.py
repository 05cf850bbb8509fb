"""
What the schema cannot say of a config: files that are not there, and settings that do not go together.

Each check yields lines that name the key and what to change. A section that the schema refuses is absent here, so that
the others are looked at all the same: what is wrong is told in one run.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lib.adapter_search import adapter_problem
from lib.budget import AUTO
from lib.calibration import TRAINING, size_problem
from lib.config import suggest
from lib.documents import ENDINGS, document_files
from lib.modelfile import kept, unheld, unheld_stop
from lib.quant_types import IGNORE_IMATRIX, NEED_IMATRIX, QUANTIZED_TYPES, SOURCE_TYPES
from lib.tensor_types import TensorTypes, pattern_problems, pure_problem
from lib.typed import build

Section = dict[str, Any]
# What Ollama adds to a name that has less.
HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"


def check_sections(where: str, model: Section, *, keep_intermediates: bool) -> Iterator[str]:
    """What is wrong within single sections of a model; `base` and `adapter` are told of where they are resolved."""
    if train := (model.get("adapter") or {}).get("train"):
        yield from check_training(f"{where}.adapter.train", train)
    if "quantize" in model:
        yield from check_quantize(f"{where}.quantize", model["quantize"], keep_intermediates=keep_intermediates)
        if "adapter" in model:
            yield from check_trained_text(f"{where}.quantize.imatrix.text", model)
    if quality := model.get("quality"):
        yield from check_quality(f"{where}.quality", quality, model)
    elif "quality" in model and AUTO in model.get("quantize", {}).get("types", ()):
        yield f"{where}.quality.text: is missing; {where}.quantize.types: {AUTO} measures the types on it"
    for name in ("smoke", "rag"):
        if section := model.get(name):
            yield from check_questions(f"{where}.{name}", section)
    if model.get("rag"):
        yield from check_documents(f"{where}.rag.documents", model["rag"]["documents"])
    if "ollama" in model:
        yield from check_ollama(f"{where}.ollama", model["ollama"])


def check_base(where: str, base: Section) -> Iterator[str]:
    """What is wrong with a base, its shape apart from being known."""
    if base["gguf"] is not None:
        yield from check_file(f"{where}.gguf", base["gguf"])
    yield from check_origin(where, base)
    if base["member"] is not None and (os.path.isabs(base["member"]) or ".." in Path(base["member"]).parts):
        yield f"{where}.member: {base['member']} leads out of the wheel; give the path of the GGUF within it"
    if base["shape"] is not None:
        yield from check_shape(f"{where}.shape", base["shape"])


def check_origin(where: str, base: Section) -> Iterator[str]:
    """What is wrong with a folder or a repository that a base of either family is."""
    if base["path"] is not None:
        yield from check_folder(f"{where}.path", base["path"])
        if os.path.isdir(base["path"]):
            yield from check_file(f"{where}.path", os.path.join(base["path"], "config.json"))
    if base["hub"] is not None and base["revision"] is None:
        yield f"{where}.revision: is empty; name a commit, a tag or a branch, as in main"


def check_shape(where: str, shape: Section) -> Iterator[str]:
    """Sizes that no decoder can have together."""
    width, heads, groups = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    if shape["head_dim"] is None and width % heads:
        yield f"{where}.num_attention_heads: {width} of hidden_size are no multiple of {heads}; give head_dim as well"
    if heads % groups:
        yield f"{where}.num_key_value_heads: {heads} query heads cannot share {groups}; give a divisor of {heads}"


def check_training(where: str, train: Section) -> Iterator[str]:
    """Files of a training run, and sizes of batches."""
    for key in ("data", "eval_data"):
        if train[key] is not None:
            yield from check_file(f"{where}.{key}", train[key])
    yield from check_micro_batching(where, train)


def check_micro_batching(where: str, train: Section) -> Iterator[str]:
    """Sizes of the parts that a batch is split into."""
    splitting = train["micro_batching"]
    first = splitting["micro_batch_size"] or train["per_device_train_batch_size"]
    if splitting["min_micro_batch_size"] > first:
        yield (
            f"{where}.micro_batching.min_micro_batch_size: {splitting['min_micro_batch_size']} samples are more than "
            f"the {first} that are tried first; lower it"
        )


def check_merge(where: str, model: Section, hardware: Section) -> Iterator[str]:
    """Whether a merge can be done on the planned machine, onto the weights that it names."""
    if model["merge"]["device"] == "cuda" and not hardware["gpus"]:
        yield f"{where}.device: cuda, but hardware.gpus plans for none; set cpu, which gives the same bytes"
    if model["merge"]["base_weights"] == "original":
        return
    train = (model["adapter"] or {}).get("train")
    if model["adapter"] is None:
        yield f"{where}.base_weights: nf4 is the base as it was in training, and there is no adapter; take original"
    elif train is not None and train["method"] not in ("qlora", "auto"):  # auto: what forbids it is told already
        yield (
            f"{where}.base_weights: nf4 is the base of a 4-bit training, and method is {train['method']}; "
            "take original, or method: qlora"
        )
    elif train is not None and train["quantization"]["bnb_4bit_quant_type"] != "nf4":
        yield f"{where}.base_weights: nf4, but quantization.bnb_4bit_quant_type is not; take the original ones"


def check_path(where: str, model: Section) -> Iterator[str]:
    """Whether the direct path can be taken for the architecture, as far as the shape tells."""
    if model["quantize"]["path"] == "direct" and (model["base"]["shape"] or {}).get("num_experts"):
        yield f"{where}.path: direct does not know mixtures of experts; take auto or staged"


def check_quantize(where: str, quantize: Section, *, keep_intermediates: bool) -> Iterator[str]:
    """Types that are none, that need a matrix, or that would be removed again; and the matrix's text."""
    known = [*SOURCE_TYPES, *QUANTIZED_TYPES]
    patterns, types = quantize["tensor_type"], [name for name in quantize["types"] if name != AUTO]
    yield from (f"{where}.types: unknown type {name!r}{suggest(name, known)}" for name in types if name not in known)
    yield from check_auto(where, quantize)
    if types[:1] and types[0] in SOURCE_TYPES and not keep_intermediates:
        yield (
            f"{where}.types: {types[0]}, the first, is removed after use by keep_intermediates: false; "
            "set that to true, or name a quantized type first"
        )
    yield from (f"{where}.tensor_type: {problem}" for problem in pattern_problems(patterns))
    settings = build(TensorTypes, quantize)
    impure = {name: problem for name in types if (problem := pure_problem(settings, name))}
    yield from (f"{where}.pure: {problem}" for problem in impure.values())
    if (imatrix := quantize["imatrix"]) is not None:
        # Training data are checked where they are named.
        if imatrix["text"] != TRAINING:
            yield from check_calibration(f"{where}.imatrix.text", imatrix["text"])
        if imatrix["from"] == "q8_0" and not IGNORE_IMATRIX.issuperset(patterns.values()):
            yield f"{where}.imatrix.from: q8_0 needs the matrix itself, by {where}.tensor_type; take f16"
        return
    needing = {"types": types, **{f"tensor_type.{pattern}": [name] for pattern, name in patterns.items()}}
    yield from (
        f"{where}.{key}: {name} needs an importance matrix; set {where}.imatrix.text, or take a larger type"
        for key, names in needing.items()
        for name in names
        if name in NEED_IMATRIX
    )


def check_auto(where: str, quantize: Section) -> Iterator[str]:
    """Whether `auto` stands alone, has a budget, and has a 16-bit file to be measured with."""
    if AUTO not in quantize["types"]:
        if quantize["budget"] is not None:
            yield f"{where}.budget: has no use with types that are named; set {where}.types: {AUTO}, or take it out"
        return
    if quantize["types"] != [AUTO]:
        yield f"{where}.types: {AUTO} stands alone; name the others in quality.types to have them measured"
    if quantize["budget"] is None:
        yield f"{where}.budget: is missing; {where}.types: {AUTO} takes the best type that fits it"
    if quantize["path"] == "direct":
        yield f"{where}.path: direct makes no 16-bit file, with which {AUTO} compares; set auto or staged"


def check_trained_text(where: str, model: Section) -> Iterator[str]:
    """Whether there are training data, where an importance matrix is to be computed on them."""
    chosen = (model["quantize"]["imatrix"] or {}).get("text")
    if chosen == TRAINING and not (model["adapter"] or {}).get("train"):
        yield (
            f"{where}: {TRAINING} is the data that the adapter is trained on, and none is trained here; "
            f"name a text file (one of that name as ./{TRAINING}), or set adapter.train"
        )


def check_calibration(where: str, text: str) -> Iterator[str]:
    """Whether a text can do for an importance matrix, or to be judged by."""
    missing = list(check_file(where, text))
    yield from missing
    if not missing and (problem := size_problem(Path(text))):
        yield f"{where}: {problem}"


def check_quality(where: str, quality: Section, model: Section) -> Iterator[str]:
    """Texts that are judged by, types that cannot be made or have no use, and merges that cannot be compared."""
    quantize, train = model.get("quantize"), (model.get("adapter") or {}).get("train")
    matrix = f"{where.removesuffix('quality')}quantize.imatrix.text"
    if quality["base_weights"] and "adapter" in model and (train or {}).get("method") not in ("qlora", "auto"):
        yield f"{where}.base_weights: compares with the weights of a 4-bit training, and there is none; take it out"
    elif quality["base_weights"] and train and train["quantization"]["bnb_4bit_quant_type"] != "nf4":
        yield f"{where}.base_weights: the 4-bit weights that can be merged into are nf4; train on those, or take it out"
    yield from check_calibration(f"{where}.text", quality["text"])
    if quality["general_text"] is not None:
        yield from check_calibration(f"{where}.general_text", quality["general_text"])
        if quantize and quantize["imatrix"] is None:
            yield f"{where}.general_text: has nothing to be compared with; set {matrix}, or take it out"
    settings = build(TensorTypes, quantize) if quantize else None
    for name in quality["types"]:
        if name not in QUANTIZED_TYPES:
            yield f"{where}.types: unknown type {name!r}{suggest(name, QUANTIZED_TYPES)}"
        elif name in NEED_IMATRIX and quantize and quantize["imatrix"] is None:
            yield f"{where}.types: {name} needs an importance matrix; set {matrix}, or take a larger type"
        elif settings and (problem := pure_problem(settings, name)):
            yield f"{where}.types: {problem}"
    limits = [key for key in ("max_kld", "min_top1", "max_perplexity_ratio") if quality[key] is not None]
    if limits and quantize and set(quantize["types"]) <= set(SOURCE_TYPES):
        yield f"{where}.{limits[0]}: limits quantized types, and quantize.types names none; add one, or take it out"
    if quantize and quantize["imatrix"] and quality["text"] == quantize["imatrix"]["text"]:
        yield f"{where}.text: the importance matrix is computed from it, which would flatter the types; take another"


def check_ollama(where: str, ollama: Section) -> Iterator[str]:
    """What a Modelfile cannot hold is told before anything long starts."""
    texts = [("system", ollama["system"] or ""), *(("messages", each["content"]) for each in ollama["messages"])]
    told = [(key, unheld(kept(text))) for key, text in texts]
    told += [("parameters.stop", unheld_stop(text)) for text in ollama["parameters"].get("stop", [])]
    yield from (f"{where}.{key}: {problem}" for key, problem in told if problem)


def check_names(models: Mapping[str, Section]) -> Iterator[str]:
    """Two models under one name in Ollama, of which the later would take the place of the earlier."""
    first: dict[str, str] = {}
    for name, model in models.items():
        if "ollama" not in model:
            continue
        called = _full_name(model["ollama"]["name"] or name)
        if first.setdefault(called.casefold(), name) != name:  # Ollama does not tell capitals from small letters
            short = called.removeprefix(f"{HOST}/{NAMESPACE}/")
            yield f"models.{name}.ollama.name: {short} is models.{first[called.casefold()]}'s already; give another"


def _full_name(called: str) -> str:
    *places, last = called.split("/")
    last = last if ":" in last else f"{last}:{TAG}"
    return "/".join([*[HOST, NAMESPACE][: 2 - len(places)], *places, last])


def check_questions(where: str, section: Section) -> Iterator[str]:
    """Whether questions are there, and enough of them for what they are to show."""
    path, gain = section["questions"], section["min_gain"]
    missing = list(check_file(f"{where}.questions", path))
    yield from missing
    if missing or not gain:
        return
    count = sum(1 for line in Path(path).read_bytes().splitlines() if line.strip())
    if count < gain:
        yield f"{where}.min_gain: {gain} more right answers cannot be had of {count} questions in {path}; lower it"


def check_documents(where: str, folder: str) -> Iterator[str]:
    """Whether there are documents, under names that Snakemake can hold."""
    files = document_files(Path(folder))
    if problem := _brace_problem(*map(str, files)):
        yield f"{where}: {problem}"
    if not files:
        yield f"{where}: there is no folder {folder} with documents ({', '.join(ENDINGS)}) in it"


def check_adapter_folder(where: str, folder: Path, copies: Iterable[Path]) -> Iterator[str]:
    """Whether an adapter that is there can be taken; `copies` is where modelmill copies them to."""
    try:
        real = Path(os.path.realpath(folder))
    except ValueError as error:  # a zero byte, or half of a character
        yield f"{where}.path: {str(folder)!r} cannot be read: {error}"
        return
    if braces := _brace_problem(str(folder)):
        yield f"{where}.path: {braces}"
    elif not {Path(os.path.realpath(copy)) for copy in copies}.isdisjoint([real, *real.parents]):
        yield f"{where}.path: {folder} is where modelmill copies an adapter to; name the original"
    elif problem := adapter_problem(folder):
        yield f"{where}.path: {folder} is no complete adapter: {problem}"


def check_sources(models: Mapping[str, Section]) -> Iterator[str]:
    """Bases that are made from the very model that they are the base of, or that change while they are read."""
    needs = {name: _made_by(model.get("base") or {}, models) for name, model in models.items()}
    for name, (key, path, maker) in ((name, need) for name, need in needs.items() if need):
        where = f"models.{name}.base.{key}"
        way = [name]
        while maker not in way and needs.get(maker):
            way.append(maker)
            maker = needs[maker][2]
        if maker == name:
            circle = " from ".join([*way, name])
            yield f"{where}: {path} is made from {name} itself ({circle}); name the original base"
        elif key == "path" and Path(path).parts[0] == "models":
            yield f"{where}: {path} is rewritten whenever models.{needs[name][2]} is; name a copy of it elsewhere"


def _made_by(base: Section, models: Mapping[str, Section]) -> tuple[str, str, str] | None:
    """Which key of a base names a file that modelmill makes: the key, the path from here, and the model it is of."""
    for key in ("path", "gguf"):
        if base.get(key) and not set("\0\n") & set(base[key]):
            path = os.path.relpath(os.path.realpath(base[key]), os.path.realpath("."))
            folder, _, rest = path.partition("/")
            maker = rest.split("/")[0].split(".")[0]
            if folder in ("bases", "adapters", "models") and maker in models:
                return key, path, maker
    return None


def check_file(where: str, path: str) -> Iterator[str]:
    """Whether a file is there, and can be read."""
    if problem := _path_problem(path, folder=False):
        yield f"{where}: {problem}"


def check_folder(where: str, path: str) -> Iterator[str]:
    """Whether a folder is there, and can be looked into."""
    if problem := _path_problem(path, folder=True):
        yield f"{where}: {problem}"


def _brace_problem(*paths: str) -> str | None:
    braced = [path for path in paths if set("{}") & set(path)]
    return f"Snakemake takes braces for wildcards; rename {', '.join(braced)}" if braced else None


def _path_problem(path: str, *, folder: bool) -> str | None:
    kind, other = ("folder", "file") if folder else ("file", "folder")
    if problem := _brace_problem(path):
        return problem
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
            found = other if stat.S_ISDIR(mode) or stat.S_ISREG(mode) else "device or a pipe"
            return f"{path} is a {found}; name a {kind}"
        if folder:
            os.scandir(path).close()
        else:
            with open(path, "rb") as file:
                file.read(1)
    except (FileNotFoundError, NotADirectoryError):
        return f"there is no {kind} {path}" + ("; write it without ~, as a whole path" if path.startswith("~") else "")
    except (OSError, ValueError) as error:  # ValueError: of a path with a zero byte
        return f"{path!r} cannot be read: {getattr(error, 'strerror', None) or error}"
    return None
