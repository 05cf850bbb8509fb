"""Everything that the workflow leaves of a model, in miniature, and how it is damaged and checked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import ROOT

from lib.artifact import find_artifact
from lib.manifest import (
    NAME,
    describe_file,
    describe_files,
    read_file_manifest,
    write_file_manifest,
    write_folder_manifest,
)
from lib.modelfile import render_modelfile
from lib.provenance import gguf_metadata
from lib.verification import check_artifact

LLAMA_CPP = "0c1e57098b"
DATA = {"name": "talks.jsonl", "size": 10, "sha256": "d" * 64}
POLICY = {"base_weights": "original", "dtype": "float16"}
VERSIONS = {"torch": "2.13.0", "peft": "0.21.2"}
BASE, ADAPTER, MERGED = "bases/m", "adapters/m", "models/m/merged"
F16, Q4, BASE_F16 = "models/m.f16.gguf", "models/m.q4_k_m.gguf", "models/m.base.f16.gguf"
ARTIFACTS = (BASE, ADAPTER, MERGED, F16, Q4, BASE_F16)
FILES = {
    BASE: {"config.json": b"{}\n", "model.safetensors": b"weights", "tokenizer.json": b"{}\n"},
    ADAPTER: {
        "adapter_config.json": b'{"base_model_name_or_path": "maker/model"}\n',
        "adapter_model.safetensors": b"factors",
    },
    MERGED: {"config.json": b'{"dtype": "float16"}\n', "model.safetensors": b"merged!"},
}
FOLDER_FILES = [f"{folder}/{name}" for folder, files in FILES.items() for name in files]


def write_folder(folder: Path, files: dict[str, bytes], *, artifact: str, origin: dict[str, Any]) -> dict[str, Any]:
    """An artifact's folder; returns its identity, for the origin of others."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    listed = describe_files(folder, files, threads=1)
    written = write_folder_manifest(folder, artifact=artifact, files=listed, origin=origin)
    return {"digest": written["digest"], "origin": origin}


def write_gguf(path: Path, metadata: dict[str, Any], *, quant: str) -> None:
    """A GGUF of one tensor, whose metadata llama.cpp's own library takes from a `--metadata` file."""
    given = path.with_name("metadata")
    given.write_text(json.dumps(metadata), encoding="utf-8")
    writer = gguf.GGUFWriter(path, "llama")
    gguf.Metadata.load(given, None, None, 64).set_gguf_meta_model(writer)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quant.upper()}"])
    writer.add_token_types([1, 2, 3])  # an array: a damaged length must not keep the reader busy
    writer.add_tensor("t", np.arange(64, dtype=np.float32).reshape(8, 8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    given.unlink()


def list_gguf(path: Path, *, origin: dict[str, Any]) -> dict[str, Any]:
    return write_file_manifest(path, facts=describe_file(path), origin=origin)


def write_chain(folder: Path) -> Path:
    """Everything that the workflow leaves of a model `m`, in miniature."""
    hub = {"kind": "hub", "name": "maker/model", "revision": "c" * 40}
    base = write_folder(folder / BASE, FILES[BASE], artifact="base", origin=hub)
    trained = {"base": base, "data": DATA, "settings": {"method": "qlora"}, "versions": VERSIONS}
    adapter = write_folder(folder / ADAPTER, FILES[ADAPTER], artifact="adapter", origin=trained)
    folded = {"base": base, "adapter": adapter, "merge": POLICY}
    merged = write_folder(folder / MERGED, FILES[MERGED], artifact="merged", origin=folded)
    converted = {"llama_cpp": LLAMA_CPP, "type": "f16"}
    for name, artifact, source in ((F16, "merged", merged), (BASE_F16, "base", base)):
        metadata = gguf_metadata(source, artifact=artifact, name="m", llama_cpp_commit=LLAMA_CPP)
        write_gguf(folder / name, metadata, quant="f16")
        list_gguf(folder / name, origin={**converted, artifact: source})
    write_gguf(
        folder / Q4, gguf_metadata(merged, artifact="merged", name="m", llama_cpp_commit=LLAMA_CPP), quant="q4_k_m"
    )
    source = {
        key: value for key, value in read_file_manifest(folder / F16).items() if key in ("name", "sha256", "origin")
    }
    list_gguf(folder / Q4, origin={"source": source, "llama_cpp": LLAMA_CPP, "type": "q4_k_m"})
    text = render_modelfile(
        gguf_name=Path(Q4).name,
        template=None,
        system=None,
        messages=[],
        parameters={},
        stops=[],
        license_text=None,
    )
    (folder / "models/m.Modelfile").write_text(text)
    return folder


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    return write_chain(tmp_path / "project")


def problems(path: Path, **options: Any) -> list[str]:
    return check_artifact(find_artifact(path, **options), threads=2).problems


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_json(folder / NAME, change)


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def verify(*arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/verify.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr, done.stderr
    assert done.stdout == ""
    return done
