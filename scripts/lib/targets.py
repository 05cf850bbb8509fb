"""The names of the files that can be asked for, and what is wrong with one that cannot be made."""

from __future__ import annotations

import os.path
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from lib.budget import AUTO
from lib.config import suggest
from lib.documents import document_files
from lib.quant_types import BUILDABLE_TYPES, NEED_IMATRIX, QUANTIZED_TYPES, SOURCE_TYPES
from lib.spec import Model, Project

ADAPTER = ".adapter"  # in the name of a Modelfile over a base, and of the GGUF adapter that it names
FOLDERS = ("bases", "adapters", "models", "ollama", "reports")
HEATMAP_ENDINGS = (".onnx", ".onnx.json", ".eval.json", ".overlays")
TRAINING_ENDINGS = (".training.json", ".training.png")


# What heatmap models have, and what they have not, by the ends of files' names.
HEATMAP_FILES = "models/{0}.onnx, reports/{0}.eval.json, models/{0}/merged/MANIFEST.json and adapters/{0}/MANIFEST.json"
LANGUAGE_ENDINGS = (".gguf", ".gguf.json", "Modelfile", ".chat.json", ".quality.json", ".smoke.json", ".rag.json")
QUALITY_ENDINGS = (".quality.json", ".quality.png")


def final_files(project: Project) -> list[str]:
    """
    Default GGUF and Modelfile of every language model, that its limits are met if it has any, and ONNX file of every
    heatmap model.
    """
    files = [
        file
        for name, model in project.models.items()
        for file in (f"models/{name}.{model.default_quant}.gguf", f"models/{name}.Modelfile")
    ]
    files += [passed_file(name) for name, model in project.models.items() if model.quality and model.quality.limits]
    return files + [f"models/{name}.onnx" for name in project.heatmaps]


def passed_file(name: str) -> str:
    """What says that a model's types are within its limits."""
    return f"work/{name}/quality.json"


def evaluated(project: Project) -> list[str]:
    """Heatmap models with held-out games to evaluate them on."""
    return [name for name, model in project.heatmaps.items() if model.clips.eval_games]


def report_files(project: Project) -> list[str]:
    """What the HTML report shows of every model, where it was made."""
    endings = ("training.png", "resources.png", "quality.png", "smoke.json", "rag.json")
    files = [f"reports/{name}.{ending}" for name in project.models for ending in endings]
    heatmap_endings = ("training.png", "resources.png", "eval.json")
    return files + [f"reports/{name}.{ending}" for name in project.heatmaps for ending in heatmap_endings]


def model_names(project: Project, names: Collection[str] | None = None, *, without: Iterable[str] = ()) -> str:
    """
    A regular expression for the language models' names, or some of them, in paths of files that can be made.

    A type that needs an importance matrix can be made of models that have one alone, and `auto` of those whose types
    are that; no constraint of the type's own wildcard can say so, but one of the name's, which looks ahead.

    Args:
        project: the resolved config.
        names: of the models, if not all.
        without: regular expressions for files of these that are left out, from the name on.
    """
    plain = [name for name, model in project.models.items() if model.quantize.imatrix is None]
    named = [name for name, model in project.models.items() if not model.quantize.is_auto]
    impossible = [
        rf"({'|'.join(names) or '(?!)'})(\.base)?\.({'|'.join(types)})\."
        for names, types in ((plain, sorted(NEED_IMATRIX)), (named, [AUTO]))
    ]
    return rf"(?!{'|'.join([*impossible, *without])})({'|'.join(project.models if names is None else names) or '(?!)'})"


def wrong_targets(project: Project) -> str:
    """A regular expression for files in our folders that no rule makes and that are no input of the user's."""
    every, adapted, trained, judged, asked, calibrated, documented = (
        "|".join(names) or "(?!)"
        for names in (
            project.models,
            [name for name, model in project.models.items() if model.adapter],
            [name for name, model in project.models.items() if model.adapter and model.adapter.train],
            [name for name, model in project.models.items() if model.quality],
            [name for name, model in project.models.items() if model.adapter and model.smoke],
            [name for name, model in project.models.items() if model.quantize.imatrix],
            [name for name, model in project.models.items() if model.rag],
        )
    )
    heatmaps = "|".join(project.heatmaps) or "(?!)"
    held_out = "|".join(evaluated(project)) or "(?!)"
    chosen = "|".join(name for name, model in project.models.items() if model.quantize.is_auto) or "(?!)"
    types, low_types = "|".join([*SOURCE_TYPES, *BUILDABLE_TYPES]), "|".join(sorted(NEED_IMATRIX))
    made = [
        rf"bases/({every})(/MANIFEST\.json)?",
        rf"adapters/({adapted})/(MANIFEST\.json|adapter_model\.safetensors|adapter_config\.json)",
        rf"models/({every})/merged(/MANIFEST\.json)?",
        rf"models/({every})(\.base)?\.({types})\.gguf(\.json)?",
        rf"models/({every})(\.({types}))?\.Modelfile",
        rf"models/({adapted})\{ADAPTER}\.(gguf(\.json)?|Modelfile)",
        rf"reports/({adapted})\{ADAPTER}\.chat\.json",
        rf"reports/({every})(\.({types}))?\.chat\.json",
        rf"models/({calibrated})(\.base)?\.({low_types}|imatrix)\.gguf(\.json)?",
        rf"models/({chosen})(\.base)?\.{AUTO}\.gguf(\.json)?",
        rf"models/({chosen})\.{AUTO}\.Modelfile",
        rf"reports/({chosen})\.{AUTO}\.chat\.json",
        rf"models/({calibrated})\.({low_types})\.Modelfile",
        rf"reports/({calibrated})\.({low_types})\.chat\.json",
        rf"reports/({trained})\.training\.(json|png)",
        rf"reports/({every})\.resources\.(json|png)",
        rf"reports/({judged})\.quality\.(json|png)",
        rf"reports/({asked})\.smoke\.json",
        rf"reports/({documented})\.rag\.json",
        rf"ollama/({every})\.json",
        rf"bases/({heatmaps})(/MANIFEST\.json)?",
        rf"adapters/({heatmaps})/(MANIFEST\.json|heatmap\.safetensors)",
        rf"models/({heatmaps})/merged(/MANIFEST\.json)?",
        rf"models/({heatmaps})\.onnx(\.json)?",
        rf"reports/({held_out})\.(eval\.json|overlays)",
        rf"reports/({heatmaps})\.(training|resources)\.(json|png)",
    ]
    own = [pattern for model in project.models.values() for pattern in _users_files(model)]
    folders = [path for model in project.heatmaps.values() for path in (model.base.path, model.clips.path) if path]
    own += [re.escape(os.path.normpath(folder)) + "/.*" for folder in folders]
    return f"(?!({'|'.join(made + own)})$)({'|'.join(FOLDERS)})/.+"


def _users_files(model: Model) -> Iterator[str]:
    """Patterns of what the user put there; in the form that Snakemake gives to paths."""
    train = model.adapter and model.adapter.train
    imatrix = model.quantize.imatrix
    files = [model.base.gguf, train and train.data, train and train.eval_data, model.smoke and model.smoke.questions]
    files += [imatrix.text] if imatrix and not imatrix.of_training else []
    files += [model.quality.text, model.quality.general_text] if model.quality else []
    files += [model.rag.questions, *map(str, document_files(Path(model.rag.documents)))] if model.rag else []
    yield from (re.escape(os.path.normpath(file)) for file in files if file)
    for folder in (model.base.path, model.adapter and model.adapter.path):
        if folder:
            yield re.escape(os.path.normpath(folder)) + "/.*"


def explain_target(target: str, project: Project) -> str:
    """
    Say why a file cannot be made.

    Args:
        target: path of the file, in one of FOLDERS.
        project: the resolved config.
    """
    folder, _, rest = target.partition("/")
    model = re.split(r"[./]", rest, maxsplit=1)[0]
    known = sorted(project.names)
    if model in project.heatmaps:
        return f"{target}: {_explain_of_heatmap(folder, rest, model)}"
    if model not in project.models:
        return f"{target}: unknown model {model!r}{suggest(model, known)} (config.yaml has: {', '.join(known)})"
    if rest.endswith(HEATMAP_ENDINGS):
        usual = f"models/{model}.{project.models[model].default_quant}.gguf and models/{model}.Modelfile"
        return f"{target}: made for heatmap models only, and {model} is a language model; it has {usual}"
    if folder == "adapters" and project.models[model].adapter is None:
        return f"{target}: {model} has no adapter in config.yaml"
    if rest.endswith(TRAINING_ENDINGS):
        if project.models[model].adapter is None:
            return f"{target}: {model} has no adapter in config.yaml, so nothing was trained"
        return f"{target}: {model}'s adapter was not trained here, so there is no record of its training"
    if rest.endswith(QUALITY_ENDINGS):
        return f"{target}: {model} has no quality.text in config.yaml"
    if rest.endswith(".smoke.json"):
        if project.models[model].adapter is None:
            return f"{target}: {model} has no adapter in config.yaml, so there is nothing to compare with its base"
        return f"{target}: {model} has no smoke.questions in config.yaml"
    if rest.endswith(".rag.json"):
        return f"{target}: {model} has no rag.documents in config.yaml"
    named = re.fullmatch(
        r"(?P<base>\.base)?(\.(?P<quant>.+))?\.(gguf(\.json)?|(?P<modelfile>Modelfile))", rest[len(model) :]
    )
    if folder == "models" and named:
        if named["base"] and named["modelfile"]:
            return f"{target}: there are Modelfiles of tuned models only"
        if named["quant"] == ADAPTER.removeprefix(".") and not named["base"]:
            return f"{target}: {model} has no adapter in config.yaml"
        if named["quant"] is None:
            return f"{target}: say which type, as in models/{model}.{project.models[model].default_quant}.gguf"
        return f"{target}: {_explain_type(named['quant'], model)}"
    return f"{target}: nothing is built under that name; README.md lists the targets"


def _explain_of_heatmap(folder: str, rest: str, model: str) -> str:
    has = f"it has {HEATMAP_FILES.format(model)}"
    if folder == "ollama" or rest.endswith(LANGUAGE_ENDINGS):
        return f"made for language models only, and {model} is a heatmap model; {has}"
    if rest == f"{model}.eval.json":
        return f"{model} has no clips.eval_games in config.yaml, so there is nothing to evaluate it on"
    return f"nothing is built under that name of {model}, a heatmap model; {has}"


def _explain_type(quant: str, model: str) -> str:
    known = [*SOURCE_TYPES, *QUANTIZED_TYPES]
    if quant == AUTO:
        return f"{AUTO} is a type only where models.{model}.quantize.types is {AUTO}"
    if quant in NEED_IMATRIX:
        return f"{quant} needs an importance matrix; set models.{model}.quantize.imatrix.text"
    if quant == "imatrix":
        return f"{model} has no importance matrix; set models.{model}.quantize.imatrix.text"
    near = suggest(quant.lower(), known) or "; known are " + ", ".join(known)
    return f"unknown type {quant!r}{near}"
