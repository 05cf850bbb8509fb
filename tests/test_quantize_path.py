"""Which way each file is made, by the config, what is there and what is asked for; by Snakemake in test_direct_path."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import SHAPE

from lib.jsonfile import digest_json
from lib.quantize_path import QuantizePaths
from lib.spec import Project, resolve_project

HUB = {"hub": "maker/model", "revision": "main", "shape": SHAPE}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("bases", "models"):
        (tmp_path / name).mkdir()
    (tmp_path / "read.txt").write_text("A sentence.\n" * 200)
    return tmp_path


@pytest.fixture
def project(workplace: Path) -> Project:
    """Models of which one takes an importance matrix, and one cannot be streamed."""
    models: dict[str, Any] = {name: {"base": HUB} for name in ("tuned", "plain", "silent")}
    models["weighed"] = {"base": HUB, "quantize": {"imatrix": {"text": "read.txt"}}}
    models["mixture"] = {"base": {**HUB, "shape": {**SHAPE, "num_experts": 8}}}
    return resolve_project({"models": models})


def is_direct(project: Project, file: str, *words: str) -> bool:
    """Whether a file is built directly, as Snakemake sees it: by the rules whose patterns it matches."""
    paths = QuantizePaths(project, words)
    staged = rf"models/(?P<model>{paths.staged_models()})(?P<base>(\.base)?)\.(?P<quant>[^.]+)\.gguf"
    direct = rf"models/(?P<model>{paths.passes()[0].model})(?P<base>(\.base)?)\.(?P<quant>[^.]+)\.gguf"
    matches = [re.fullmatch(pattern, file) is not None for pattern in (staged, direct)]
    assert sum(matches) == 1, file
    return matches[1]


def finish(file: str, origin: dict[str, Any]) -> None:
    """A finished file with what it was made from."""
    Path(file).write_bytes(b"GGUF")
    Path(f"{file}.json").write_text(json.dumps({"size": 4, "sha256": "0" * 64, "origin": origin}))


def base_of(content: str) -> dict[str, Any]:
    """A base in its place, and how an origin names it."""
    files = {"model.safetensors": {"size": 1, "sha256": content * 64}}
    origin = {"kind": "hub", "name": "maker/model"}
    Path("bases/tuned").mkdir(exist_ok=True)
    manifest = {"artifact": "base", "digest": digest_json(files), "files": files, "origin": origin}
    Path("bases/tuned/MANIFEST.json").write_text(json.dumps(manifest))
    return {"digest": digest_json(files), "origin": origin}


def staged_from(base: dict[str, Any]) -> dict[str, Any]:
    made_by = {"llama_cpp": "abc", "type": "q4_k_m"}
    merge = {"base_weights": "original", "dtype": "float16"}
    merged = {"digest": "1" * 64, "origin": {"base": base, "merge": merge}}
    source = {"name": "tuned.f16.gguf", "sha256": "2" * 64, "origin": {"merged": merged, **made_by}}
    return {"source": source, **made_by}


def direct_from(base: dict[str, Any]) -> dict[str, Any]:
    merge = {"base_weights": "original", "dtype": "float16"}
    return {"base": base, "merge": merge, "llama_cpp": "abc", "type": "q4_k_m"}


Q4_K_M, Q8_0 = "models/tuned.q4_k_m.gguf", "models/tuned.q8_0.gguf"


def test_direct_where_nothing_of_the_other_path_is_there(project: Project) -> None:
    assert is_direct(project, Q4_K_M)
    assert not is_direct(project, "models/mixture.q4_k_m.gguf")


@pytest.mark.parametrize(
    "asked",
    [
        "models/tuned/merged",
        "models/tuned/merged/MANIFEST.json",
        "./models/tuned.f16.gguf",
        "models//tuned.bf16.gguf.json",
        "models/tuned.f16.Modelfile",
        "reports/tuned.f16.chat.json",
    ],
)
def test_what_is_asked_for_decides(asked: str, project: Project) -> None:
    assert not is_direct(project, Q4_K_M, asked)
    # The base's own files have nothing to do with that, nor have other models'.
    assert is_direct(project, "models/tuned.base.q4_k_m.gguf", asked)
    assert is_direct(project, "models/plain.q4_k_m.gguf", asked)


def test_a_copy_that_is_there_decides(project: Project) -> None:
    Path("models/tuned.base.f16.gguf").write_bytes(b"GGUF")
    assert not is_direct(project, "models/tuned.base.q4_k_m.gguf")
    assert is_direct(project, Q4_K_M)


def test_a_finished_file_stays_with_the_way_it_was_made(project: Project) -> None:
    finish(Q4_K_M, staged_from(base_of("a")))
    assert not is_direct(project, Q4_K_M)
    assert is_direct(project, Q8_0)
    finish(Q8_0, direct_from(base_of("a")))
    assert is_direct(project, Q8_0, "models/tuned.f16.gguf")
    assert not is_direct(project, "models/tuned.q5_0.gguf", "models/tuned.f16.gguf")


def test_a_file_of_another_base_by_now_is_built_as_a_new_one(project: Project) -> None:
    finish(Q4_K_M, staged_from(base_of("a")))
    base_of("b")
    assert is_direct(project, Q4_K_M)
    finish(Q8_0, direct_from(base_of("a")))
    base_of("b")
    assert not is_direct(project, Q8_0, "models/tuned.f16.gguf")


@pytest.mark.parametrize("path", ["staged", "direct"])
def test_a_path_in_the_config_holds_for_finished_files_too(path: str, workplace: Path) -> None:
    project = resolve_project({"models": {"tuned": {"base": HUB, "quantize": {"path": path}}}})
    for origin in (staged_from(base_of("a")), direct_from(base_of("a"))):
        finish(Q4_K_M, origin)
        assert is_direct(project, Q4_K_M, "models/tuned.f16.gguf") == (path == "direct")


@pytest.mark.parametrize("damage", ["", "[]", '{"size": 4}', '{"size": 5, "sha256": "00", "origin": {}}'])
def test_a_damaged_manifest_decides_nothing(damage: str, project: Project) -> None:
    finish(Q4_K_M, staged_from(base_of("a")))
    Path(f"{Q4_K_M}.json").write_text(damage)
    assert is_direct(project, Q4_K_M)


def test_a_job_on_a_cluster_goes_the_way_it_was_planned(project: Project) -> None:
    assert not is_direct(project, Q4_K_M, "--target-jobs", "quantize_gguf:model=tuned,base=,quant=q4_k_m")
    Path("models/tuned.f16.gguf").write_bytes(b"GGUF")
    assert is_direct(project, Q4_K_M, "--target-jobs", "build_direct:model=tuned,base=,quant=q4_k_m")
    # As a module's, under a name of another workflow's.
    assert is_direct(project, Q4_K_M, "--target-jobs", "mm_build_direct:model=tuned,base=,quant=q4_k_m")


def test_the_matrix_stays_with_the_file_that_computed_it(project: Project) -> None:
    matrix = "models/weighed.imatrix.gguf"
    assert QuantizePaths(project, []).imatrix_source("weighed", "") == "q8_0"
    assert QuantizePaths(project, ["models/weighed.f16.gguf"]).imatrix_source("weighed", "") == "f16"
    computed_by = {"sha256": "3" * 64, "origin": {}}
    finish(matrix, {"source": {"name": "weighed.q8_0.gguf", **computed_by}})
    assert QuantizePaths(project, ["models/weighed.f16.gguf"]).imatrix_source("weighed", "") == "q8_0"
    finish(matrix, {"source": {"name": "weighed.bf16.gguf", **computed_by}})
    assert QuantizePaths(project, []).imatrix_source("weighed", "") == "f16"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["models/tuned.q4_k_m.gguf"], {}),
        (["models/tuned.q8_0.gguf", "./models/tuned.q4_k_m.gguf", "-j1"], {("", ("q4_k_m", "q8_0")): ["tuned"]}),
        (["models/tuned.q8_0.gguf", "models/tuned.base.q4_k_m.gguf", "models/plain.q4_k_m.gguf"], {}),
        (
            [f"models/{model}.{quant}.gguf" for model in ("plain.base", "silent.base") for quant in ("q4_0", "q5_0")],
            {(".base", ("q4_0", "q5_0")): ["plain", "silent"]},
        ),
        (
            ["models/tuned.q8_0.gguf", "models/tuned.f32.gguf", "models/tuned.iq1_s.gguf", "reports/tuned.q4_k_m.gguf"],
            {},
        ),
        # Only of those that take the matrix: q8_0 is what it may be computed with.
        (
            [f"models/weighed.{quant}.gguf" for quant in ("q8_0", "iq1_s", "q4_k_m")],
            {("", ("iq1_s", "q4_k_m")): ["weighed"]},
        ),
        # As Snakemake calls itself in a job on a cluster.
        (
            ["--target-jobs", "build_direct_q4_k_m_and_q8_0_base:model=tuned,base=.base"],
            {(".base", ("q4_k_m", "q8_0")): ["tuned"]},
        ),
        (
            ["--target-jobs", "mm_build_direct_q4_k_m_and_q8_0:model=tuned,base="],
            {("", ("q4_k_m", "q8_0")): ["tuned"]},
        ),
        (["--target-jobs", "build_direct:model=tuned,base=,quant=q8_0"], {}),
    ],
)
def test_types_that_are_asked_for_together(
    words: list[str], expected: dict[tuple[str, tuple[str, ...]], list[str]], project: Project
) -> None:
    assert QuantizePaths(project, words).together() == expected


def test_what_is_there_is_not_built_with_what_is_missing(project: Project) -> None:
    words = [f"models/tuned.{quant}.gguf" for quant in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")]
    for there in words[:2]:
        Path(there).write_text("")
    assert QuantizePaths(project, words).together() == {
        ("", ("q4_0", "q4_1")): ["tuned"],
        ("", ("q5_0", "q5_1", "q8_0")): ["tuned"],
    }


def test_what_was_staged_is_not_built_directly_with_another_type(project: Project) -> None:
    finish(Q4_K_M, staged_from(base_of("a")))
    finish(Q8_0, direct_from(base_of("a")))
    assert QuantizePaths(project, [Q4_K_M, Q8_0]).together() == {}
