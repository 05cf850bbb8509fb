"""What a path that a user gives stands for: an artifact, its manifest, or the weights of a Modelfile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lib.errors import ModelmillError
from lib.manifest import NAME, file_manifest
from lib.modelfile import named_weights


class NoArtifactError(ModelmillError):
    """A path leads to nothing that could be checked."""


@dataclass(frozen=True)
class Artifact:
    """
    Something that was built.

    Attributes:
        path: a folder, or a GGUF file.
        manifest: what describes it; None for a GGUF that has none.
        is_folder: which of the two it is, there or not.
        remark: what else the user should know.
    """

    path: Path
    manifest: Path | None
    is_folder: bool
    remark: str = ""


def find_artifact(path: Path, *, manifest: Path | None = None) -> Artifact:
    """
    The artifact that a path stands for.

    Args:
        path: a folder with its manifest, a GGUF or ONNX file, the manifest of either, or a Modelfile.
        manifest: of the folder `path`, where it is kept elsewhere.

    Raises:
        NoArtifactError: nothing is there, or nothing that has a manifest or is a GGUF.
        OSError: a Modelfile cannot be read.
    """
    if manifest is not None:
        return _folder_with(path, manifest)
    if path.name == NAME and is_there(path):
        return Artifact(path.parent, path, is_folder=True)
    if path.name.endswith((".gguf.json", ".onnx.json")) and is_there(path):
        return Artifact(path.with_name(path.name.removesuffix(".json")), path, is_folder=False)
    if _is_folder(path):
        if not is_there(path / NAME):
            raise NoArtifactError(f"{path} holds no {NAME}: give the folder of one artifact, or a GGUF file")
        return Artifact(path, path / NAME, is_folder=True)
    if path.name and is_there(file_manifest(path)):
        return Artifact(path, file_manifest(path), is_folder=False)
    if not is_there(path):
        raise NoArtifactError(f"{path} is not there")
    if path.name.endswith("Modelfile"):
        return _weights_of(path)
    if path.suffix == ".gguf" and path.is_file():
        return Artifact(path, None, is_folder=False)
    part_of = f"; it may be a part of {path.parent}: give that folder" if is_there(path.parent / NAME) else ""
    raise NoArtifactError(f"{path} has no manifest {file_manifest(path).name} beside it{part_of}")


def is_there(path: Path) -> bool:
    """Whether something is there; what nobody lets us look at counts, and reading it will tell why not."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _folder_with(path: Path, manifest: Path) -> Artifact:
    if missing := [str(each) for each in (path, manifest) if not is_there(each)]:
        raise NoArtifactError(f"{', '.join(missing)}: not there")
    if not _is_folder(path):
        raise NoArtifactError(f"{path} is no folder; --manifest is for a folder whose {NAME} is kept elsewhere")
    return Artifact(path, manifest, is_folder=True)


def _weights_of(modelfile: Path) -> Artifact:
    named = named_weights(modelfile.read_text(encoding="utf-8", errors="replace"))
    if named is None or not named.endswith(".gguf"):
        raise NoArtifactError(f"{modelfile} names no GGUF file: its FROM is {named or 'missing'}")
    weights = modelfile.parent / named
    beside = file_manifest(weights)
    remark = f"named by {modelfile}, which has no manifest of its own and was not checked"
    return Artifact(weights, beside if is_there(beside) else None, is_folder=False, remark=remark)
