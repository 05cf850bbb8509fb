"""ONNX files of heatmap models: computed as by torch, the same bytes anywhere, and refused where they are not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_onnx import export_model
from onnx import numpy_helper
from tiny_heatmap import BACKBONES, write_model

from lib import onnx_export
from lib.heatmap_folder import load_heatmap
from lib.heatmap_onnx import OnnxFileError, OnnxHeatmap
from lib.manifest import read_file_manifest, read_folder_manifest
from lib.onnx_export import OnnxError, check_parity, export_onnx, make_canonical

ROOT = Path(__file__).resolve().parents[1]


def run(script: Path, *options: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, script, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "merged")


@pytest.fixture(scope="module")
def exported(model: Path) -> Path:
    path = model.parent / "m.onnx"
    export_model(model=model, output=path, threads=1)
    return path


VARIANTS = {
    "dinov2": {"norm": "bn", "squeeze_excite": True, "frames": 3},
    "dinov2_with_registers": {},
    "dinov3_vit": {"heatmap_size": (30, 17)},
    "convnext": {"fusion": "concat", "norm": "bn"},
    "convnextv2": {"fusion": "sum", "frames": 2},
    "dinov3_convnext": {},
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_backbone_is_computed_as_by_torch(kind: str, tmp_path: Path) -> None:
    loaded = load_heatmap(write_model(tmp_path / "m", kind, **VARIANTS[kind]))
    path = tmp_path / "m.onnx"
    export_onnx(loaded, path, threads=1)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    plan, settings = loaded.config.input, loaded.config.heatmap
    for batch in (1, 2, 5):
        frames = torch.randn(batch, 3 * settings.frames, plan.height, plan.width)
        (found,) = session.run(None, {"frames": frames.numpy()})
        with torch.no_grad():
            expected = loaded.model(frames).sigmoid().numpy()
        width, height = settings.heatmap_size
        assert found.shape == (batch, height, width) and found.std() > 1e-3
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-3)


def test_all_kinds_of_backbones_are_covered() -> None:
    assert {*VARIANTS, "vit"} == set(BACKBONES)


def test_the_file_says_all_that_is_needed_to_run_it(exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape, taken.type) == ("frames", ["batch", 3, 48, 64], "tensor(float)")
    assert (given.name, given.shape, given.type) == ("heatmap", ["batch", 24, 32], "tensor(float)")
    said = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert said == {
        "width": 64,
        "height": 48,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "heatmap_size": [32, 24],
        "frames": 1,
    }


def test_the_manifest_tells_what_it_was_made_from(model: Path, exported: Path) -> None:
    manifest = read_file_manifest(exported)
    assert manifest["artifact"] == "onnx" and manifest["name"] == "m.onnx"
    assert manifest["origin"]["merged"]["digest"] == read_folder_manifest(model, artifact="merged")["digest"]
    assert manifest["origin"]["opset"] == onnx.load(exported).opset_import[0].version == 18
    assert manifest["origin"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    parity = manifest["origin"]["parity"]
    assert parity["batches"] == [1, 3] and 0 < parity["largest_difference_at_most"] <= 1e-4
    assert {"normal", "noise", "board", "black", "white"} == set(parity["inputs"])


def test_two_exports_are_the_same_bytes(model: Path, exported: Path, tmp_path: Path) -> None:
    """In another process, of another copy of our code, from another folder, under other names."""
    shutil.copytree(ROOT / "scripts", tmp_path / "elsewhere/scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(model, tmp_path / "renamed")
    (tmp_path / "work").mkdir()
    path = tmp_path / "work/m.onnx"
    done = run(
        tmp_path / "elsewhere/scripts/export_onnx.py", "--model", "../renamed", "--output", path.name, "--threads", "2",
        cwd=path.parent, PYTHONHASHSEED="7", OMP_NUM_THREADS="2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == exported.read_bytes()
    assert path.with_name("m.onnx.json").read_bytes() == exported.with_name("m.onnx.json").read_bytes()
    assert sorted(each.name for each in path.parent.iterdir()) == ["m.onnx", "m.onnx.json"]


def test_nothing_tells_where_it_was_exported(exported: Path) -> None:
    proto = onnx.load(exported)
    for each in proto.graph.initializer:
        each.ClearField("raw_data")
    text = re.sub(r"/(output|constant)_\d+\b", "", str(proto))
    assert "Conv_0" in text and "head.weight" in text
    for trace in ("/", "\\\\", ".py", "torch", "transformers", "aten", "doc_string", "stack_trace", "val_"):
        assert trace not in text, trace


def test_the_exporters_names_do_not_matter(exported: Path) -> None:
    """As if its counters had stood elsewhere, and it had written what it followed."""
    proto = onnx.load(exported)
    expected = proto.SerializeToString(deterministic=True)
    kept = {"frames", "heatmap", *(each.name for each in proto.graph.initializer if "." in each.name)}
    for number, node in enumerate(proto.graph.node):
        node.name, node.doc_string = f"node_{number + 77}", f"File /home/me/{number}.py"
        onnx.helper.set_model_props(proto, {"where": "/home/me"})
        for names in (node.input, node.output):
            changed = [name if name in kept or not name else f"val_{name.replace('/', '_')}_77" for name in names]
            del names[:]
            names.extend(changed)
    for each in proto.graph.initializer:
        each.name = each.name if each.name in kept else f"val_{each.name.replace('/', '_')}_77"
    proto.graph.initializer.sort(key=lambda each: each.name[::-1])
    assert proto.SerializeToString(deterministic=True) != expected
    make_canonical(proto)
    proto.metadata_props.extend(onnx.load(exported).metadata_props)
    assert proto.SerializeToString(deterministic=True) == expected


def test_a_file_that_computes_something_else_is_refused(model: Path, exported: Path, tmp_path: Path) -> None:
    proto, loaded = onnx.load(exported), load_heatmap(model)
    probabilities = onnx_export._Probabilities(loaded.model)
    check_parity(probabilities, loaded.config, exported, threads=1)
    (bias,) = (each for each in proto.graph.initializer if each.name.endswith("head.bias"))
    for change, said in ((0.02, r"by up to 0.00\d+ \(\w+, batch 1: 0.\d+ instead of 0.\d+\)"), (np.nan, "nan instead")):
        bias.CopyFrom(numpy_helper.from_array(np.array([-4.6 + change], np.float32), bias.name))
        onnx.save(proto, tmp_path / "changed.onnx")
        with pytest.raises(OnnxError, match=said):
            check_parity(probabilities, loaded.config, tmp_path / "changed.onnx", threads=1)


def test_a_failed_comparison_leaves_no_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "RELATIVE", -1.0)
    monkeypatch.setattr(onnx_export, "ABSOLUTE", 0.0)
    with pytest.raises(OnnxError, match="by onnxruntime differs from torch by up to"):
        export_model(model=model, output=tmp_path / "m.onnx", threads=1)
    assert list(tmp_path.iterdir()) == []


def test_a_model_beyond_what_a_file_can_hold_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "MOST_BYTES", onnx_export.GRAPH_BYTES + 10_000)
    with pytest.raises(OnnxError, match=r"in float32, and an ONNX file holds .* at most: choose a smaller heatmap"):
        export_onnx(load_heatmap(model), Path("never.onnx"), threads=1)


def test_wrong_models_are_told_in_a_line(tmp_path: Path) -> None:
    script = ROOT / "scripts/export_onnx.py"
    (tmp_path / "language").mkdir()
    (tmp_path / "language/config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    for name, said in (("absent", "no config.json can be read there"), ("language", "it is of a model of type llama")):
        done = run(script, "--model", name, "--output", "m.onnx", cwd=tmp_path)
        assert done.returncode == 1 and said in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "m.onnx").exists()


def test_files_that_are_no_model_of_ours(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(OnnxFileError, match="there is no"):
        OnnxHeatmap(path)
    path.write_text("no protobuf")
    with pytest.raises(OnnxFileError, match="onnxruntime cannot load it") as told:
        OnnxHeatmap(path)
    assert "\n" not in str(told.value)
    proto = onnx.load(exported)
    del proto.metadata_props[:]
    onnx.save(proto, path)
    with pytest.raises(OnnxFileError, match="its metadata lack width, height, mean, std, heatmap_size, frames"):
        OnnxHeatmap(path)
