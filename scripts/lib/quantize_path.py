"""
Which way each quantized file is made: directly, or by merged checkpoint and 16-bit GGUF. The bytes are the same.

What `quantize.path: auto` comes to is decided file by file, by what is there and what is asked for, so that no file is
built again only because it was made the other way.
"""

from __future__ import annotations

import os.path
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lib.budget import AUTO
from lib.manifest import FOLDER_KEYS, NAME, ManifestError, read_file_manifest, read_manifest
from lib.origin import PLACES, read_chain
from lib.quant_types import QUANTIZED_TYPES, SOURCE_TYPES
from lib.spec import Project
from lib.targets import FOLDERS, model_names, passed_file

STAGED_RULE, DIRECT_RULE = "quantize_gguf", "build_direct"
JOIN = "_and_"  # between the types in the name of a rule that makes several
BASES = ("", ".base")
_TYPE = "|".join(QUANTIZED_TYPES)
# As Snakemake calls itself in a job on a cluster.
_JOB = re.compile(rf"\w*?({STAGED_RULE}|{DIRECT_RULE}):model=(?P<model>.+),base=(?P<base>.*),quant=(?P<quant>.+)")
_JOB_OF_SEVERAL = re.compile(
    rf"\w*?{DIRECT_RULE}_(?P<types>({_TYPE})({JOIN}({_TYPE}))+)(_base)?:model=(?P<model>.+),base=(?P<base>.*)"
)


class QuantizedFile(NamedTuple):
    """A quantized GGUF, of a tuned model, or of its base if `base` is ".base"."""

    model: str
    base: str
    quant: str

    @property
    def path(self) -> Path:
        """Where it lies."""
        return Path(f"models/{self.model}{self.base}.{self.quant}.gguf")


@dataclass(frozen=True)
class Pass:
    """
    A rule that builds directly.

    Attributes:
        name: of the rule.
        quants: the types that it makes, as they stand in its outputs.
        model, base: regular expressions for these wildcards.
    """

    name: str
    quants: tuple[str, ...]
    model: str
    base: str


class QuantizePaths:
    """
    The way of every file that can be asked for.

    Args:
        project: the resolved config.
        words: of the command line: files, or in a job on a cluster its rule and wildcards.
    """

    def __init__(self, project: Project, words: Iterable[str]) -> None:
        self._project = project
        self._words = list(words)
        asked = {os.path.normpath(word) for word in self._words}
        self._default = {(name, base): self._by_default(name, base, asked) for name in project.models for base in BASES}
        self._direct = {
            file: self._is_kept_direct(file, self._default[model, base])
            for (model, base) in self._default
            for quant in QUANTIZED_TYPES
            for file in [QuantizedFile(model, base, quant)]
        }
        # A job was planned where it was asked for, and has not to decide it again.
        self._direct |= _told(self._words)

    def is_direct(self, file: QuantizedFile) -> bool:
        """Whether a file is built from base and adapter alone; one in 16 bits never is."""
        return self._direct.get(file, False)

    def staged_models(self) -> str:
        """A regular expression for the wildcard `model` where a file is quantized from the 16-bit one."""
        return self._models(direct=False)

    def passes(self) -> list[Pass]:
        """The rules that build directly: one for a single type, then those for types that are asked for together."""
        single = Pass(DIRECT_RULE, ("{quant}",), self._models(direct=True), r"(\.base)?")
        together = [
            Pass(
                name=f"{DIRECT_RULE}_{JOIN.join(quants)}{base.replace('.', '_')}",
                quants=quants,
                model=model_names(self._project, models),
                base=f"({re.escape(base)})",  # Snakemake takes an empty constraint for none
            )
            for (base, quants), models in self.together().items()
        ]
        return [single, *together]

    def together(self) -> dict[tuple[str, tuple[str, ...]], list[str]]:
        """
        The files of a model that the command asks for together, which one pass over its base can make.

        What is there already does not go with what is missing, nor a type that takes the importance matrix with one
        that does not.

        Returns:
            The models, by ".base" or "" and the types.
        """
        asked: dict[tuple[str, str, bool, bool], set[str]] = defaultdict(set)
        together: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
        name = re.compile(
            rf"models/(?P<model>{model_names(self._project)})(?P<base>(\.base)?)\.(?P<quant>{_TYPE})\.gguf"
        )
        for word in self._words:
            if job := _JOB_OF_SEVERAL.fullmatch(word):
                together[job["base"], tuple(job["types"].split(JOIN))].append(job["model"])
            if (named := name.fullmatch(os.path.normpath(word))) and self._direct[QuantizedFile(**named.groupdict())]:
                file = QuantizedFile(**named.groupdict())
                uses_imatrix = self._project.models[file.model].quantize.uses_imatrix(file.quant)
                asked[file.model, file.base, file.path.exists(), uses_imatrix].add(file.quant)
        for (model, base, *_), quants in asked.items():
            if len(quants) > 1:
                together[base, tuple(sorted(quants))].append(model)
        return together

    def imatrix_source(self, model: str, base: str) -> str:
        """The type of the file that computes the matrix: f16, which stands for the 16-bit one, or q8_0."""
        settings = self._project.models[model].quantize
        made_from = _origin(Path(f"models/{model}{base}.imatrix.gguf"), model).get("source")
        if made_from and settings.path == "auto" and settings.imatrix and not settings.imatrix.source:
            return "q8_0" if made_from["name"].endswith(".q8_0.gguf") else "f16"
        return settings.imatrix_source(directly=self._default[model, base])

    def _by_default(self, name: str, base: str, asked: set[str]) -> bool:
        """Whether a file that is not there is built directly."""
        model = self._project.models[name]
        if model.quantize.path != "auto":
            return model.quantize.path == "direct"
        shape = model.base.shape
        if model.default_quant in (*SOURCE_TYPES, AUTO) or (shape and shape.num_experts):
            return False
        sources = [f"models/{name}{base}.{kind}" for kind in SOURCE_TYPES]
        copies = [f"{source}{ending}" for source in sources for ending in (".gguf", ".gguf.json")]
        copies += [] if base else [f"models/{name}/merged", f"models/{name}/merged/{NAME}"]
        named = [f"{source}.Modelfile" for source in sources]
        named += [f"reports/{name}.{kind}.chat.json" for kind in SOURCE_TYPES if not base]
        # Types are compared with the 16-bit file, so that it has to be made.
        named += [f"reports/{name}.quality.json", f"reports/{name}.quality.png", passed_file(name)]
        there = [copy for copy in copies if not copy.endswith(".json") and os.path.exists(copy)]
        limited = not base and model.quality is not None and bool(model.quality.limits) and _asks_for_all(asked)
        return not (there or limited) and asked.isdisjoint([*copies, *named])

    def _is_kept_direct(self, file: QuantizedFile, default: bool) -> bool:
        if self._project.models[file.model].quantize.path != "auto":
            return default
        origin = _origin(file.path, file.model)
        return not origin.get("source") if origin else default

    def _models(self, *, direct: bool) -> str:
        files = [file for file, way in self._direct.items() if way == direct]
        models = {file.model for file in files}
        apart: dict[str, list[str]] = defaultdict(list)
        for file, way in self._direct.items():
            if way != direct and file.model in models:
                apart[re.escape(file.model + file.base)].append(file.quant)
        without = [rf"{name}\.({'|'.join(quants)})\." for name, quants in apart.items()]
        return model_names(self._project, sorted(models), without=without)


def _asks_for_all(asked: Iterable[str]) -> bool:
    """Whether `all` is asked for, by name or by asking for nothing else."""
    words = list(asked)
    places = (*(f"{folder}/" for folder in FOLDERS), "work/")
    return "all" in words or not any(word.startswith(places) for word in words)


def _origin(path: Path, model: str) -> Mapping[str, Any]:
    """What a finished file was made from; empty if it is not there, or if base or adapter are others by now."""
    try:
        origin: Mapping[str, Any] = read_file_manifest(path)["origin"]
    except (ManifestError, OSError):
        return {}
    for link in read_chain(origin, artifact="gguf").links:
        manifest = Path(PLACES.get(link.role, "").format(model=model), NAME)
        if link.role in ("base", "adapter") and manifest.is_file() and _digest(manifest) != link.digest:
            return {}
    return origin


def _digest(manifest: Path) -> str | None:
    try:
        return read_manifest(manifest, keys=FOLDER_KEYS)["digest"]
    except ManifestError:
        return None


def _told(words: Iterable[str]) -> dict[QuantizedFile, bool]:
    """What the call of a job tells of its file: whether it is built directly."""
    jobs = [job for word in words if (job := _JOB.fullmatch(word))]
    return {QuantizedFile(job["model"], job["base"], job["quant"]): job[1] == DIRECT_RULE for job in jobs}
