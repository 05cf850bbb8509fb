"""The names of the files that can be asked for, and what is wrong with one that cannot be made."""

from __future__ import annotations

import re

from lib.config import suggest
from lib.quant_types import BUILDABLE_TYPES, NEED_IMATRIX, QUANTIZED_TYPES, SOURCE_TYPES
from lib.spec import Project

FOLDERS = ("bases", "adapters", "models", "ollama", "reports")
HEATMAP_ENDINGS = (".onnx", ".eval.json")


def final_files(project: Project) -> list[str]:
    """Default GGUF and Modelfile of every model."""
    return [
        file
        for name, model in project.models.items()
        for file in (f"models/{name}.{model.default_quant}.gguf", f"models/{name}.Modelfile")
    ]


def wrong_targets(project: Project) -> str:
    """A regular expression for files in our folders that no rule makes and that are no input of the user's."""
    every, trained, asked = (
        "|".join(names) or "(?!)"
        for names in (
            project.models,
            [name for name, model in project.models.items() if model.adapter],
            [name for name, model in project.models.items() if model.adapter and model.smoke],
        )
    )
    types = "|".join([*SOURCE_TYPES, *BUILDABLE_TYPES])
    made = [
        rf"bases/({every})(/MANIFEST\.json)?",
        rf"adapters/({trained})/(MANIFEST\.json|adapter_model\.safetensors|adapter_config\.json)",
        rf"models/({every})/merged(/MANIFEST\.json)?",
        rf"models/({every})(\.base)?\.({types})\.gguf(\.json)?",
        rf"models/({every})(\.({types}))?\.Modelfile",
        rf"reports/({asked})\.smoke\.json",
    ]
    own = [re.escape(model.base.gguf) for model in project.models.values() if model.base.gguf]
    own += [re.escape(model.base.path) + "/.*" for model in project.models.values() if model.base.path]
    return f"(?!({'|'.join(made + own)})$)({'|'.join(FOLDERS)})/.+"


def explain_target(target: str, project: Project) -> str:
    """
    Say why a file cannot be made.

    Args:
        target: path of the file, in one of FOLDERS.
        project: the resolved config.
    """
    folder, _, rest = target.partition("/")
    model = re.split(r"[./]", rest, maxsplit=1)[0]
    known = sorted(project.models)
    if model not in project.models:
        return f"{target}: unknown model {model!r}{suggest(model, known)} (config.yaml has: {', '.join(known)})"
    if rest.endswith(HEATMAP_ENDINGS):
        return f"{target}: made for heatmap models only, and {model} is a language model"
    if folder == "adapters" and project.models[model].adapter is None:
        return f"{target}: {model} has no adapter in config.yaml"
    if rest.endswith(".smoke.json"):
        return f"{target}: {model} has no smoke.questions in config.yaml"
    quant = rest.removeprefix(model).removeprefix(".base").strip(".").removesuffix(".gguf").removesuffix(".Modelfile")
    if folder == "models" and rest.endswith((".gguf", ".gguf.json", ".Modelfile")):
        return f"{target}: {_explain_type(quant.removesuffix('.gguf.json'))}"
    return f"{target}: nothing is built under that name; README.md lists the targets"


def _explain_type(quant: str) -> str:
    known = [*SOURCE_TYPES, *QUANTIZED_TYPES]
    if quant in NEED_IMATRIX:
        return f"{quant} needs an importance matrix, which is not configured"
    near = suggest(quant.lower(), known) or "; known are " + ", ".join(known)
    return f"unknown type {quant!r}{near}"
