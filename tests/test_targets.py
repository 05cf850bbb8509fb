"""Names of files that can be asked for, and the explanation of those that cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import SHAPE
from tiny_adapter import write_constants

from lib.spec import Project, resolve_project
from lib.targets import explain_target, final_files, model_names, report_files, wrong_targets

HUB = {"hub": "maker/model", "revision": "main", "shape": SHAPE}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (
        "talks.jsonl",
        "asked.jsonl",
        "models/own.gguf",
        "adapters/talks.jsonl",
        "reports/asked.jsonl",
        "reports/notes/a.md",
        "models/clips/game1/Clip1/Label.csv",
        "models/clips/game2/Clip1/Label.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "models/read.txt").write_text("A sentence.\n" * 200)
    write_constants(tmp_path / "adapters" / "run7")
    write_constants(tmp_path / "models" / "runs" / "b")
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    (tmp_path / "bases" / "mine" / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path


def project_of(**models: dict[str, Any]) -> Project:
    return resolve_project({"models": models})


@pytest.fixture
def project(workplace: Path) -> Project:
    """One model that is asked, one without adapter, one never asked, one that is imported, one with a matrix."""
    train = {"train": {"data": "talks.jsonl"}}
    return project_of(
        tuned={"base": HUB, "adapter": train, "smoke": {"questions": "asked.jsonl"}},
        plain={"base": HUB, "quantize": {"types": ["q8_0", "f16"]}, "smoke": {"questions": "asked.jsonl"}},
        silent={"base": HUB, "adapter": train, "merge": {"dtype": "bfloat16"}},
        taken={"base": HUB, "adapter": {"path": "adapters/run7"}, "smoke": {"questions": "asked.jsonl"}},
        weighed={
            "base": HUB,
            "quantize": {"imatrix": {"text": "models/read.txt"}},
            "rag": {"documents": "reports/notes", "questions": "asked.jsonl"},
        },
        tennis={
            "kind": "heatmap",
            "base": {"random": {"model_type": "vit", "hidden_size": 96, "num_hidden_layers": 2, "patch_size": 8}},
            "clips": {"path": "models/clips", "eval_games": ["game1"]},
            "heatmap": {"model": "vit_heatmap"},
            "adapter": {"train": {}},
        },
    )


def is_wrong(file: str, project: Project) -> bool:
    """As Snakemake matches a wildcard: the whole name."""
    return re.fullmatch(wrong_targets(project), file) is not None


def test_final_files(project: Project) -> None:
    assert final_files(project) == [
        "models/tuned.q4_k_m.gguf",
        "models/tuned.Modelfile",
        "models/plain.q8_0.gguf",
        "models/plain.Modelfile",
        "models/silent.q4_k_m.gguf",
        "models/silent.Modelfile",
        "models/taken.q4_k_m.gguf",
        "models/taken.Modelfile",
        "models/weighed.q4_k_m.gguf",
        "models/weighed.Modelfile",
        "models/tennis.onnx",
    ]
    assert not any(is_wrong(file, project) for file in final_files(project))


def test_report_files(project: Project) -> None:
    files = report_files(project)
    assert "reports/plain.resources.png" in files and "reports/weighed.rag.json" in files
    assert len(files) == len(set(files)) == 5 * len(project.models) + 3 * len(project.heatmaps)
    assert {"reports/tennis.training.png", "reports/tennis.resources.png"} <= set(files)


@pytest.mark.parametrize(
    "file",
    [
        "bases/tuned/MANIFEST.json",
        "bases/plain",
        "adapters/tuned/MANIFEST.json",
        "adapters/tuned/adapter_model.safetensors",
        "adapters/silent/adapter_config.json",
        "adapters/taken/adapter_model.safetensors",
        "models/tuned/merged/MANIFEST.json",
        "models/plain/merged",
        "models/tuned.f16.gguf",
        "models/tuned.bf16.gguf.json",
        "models/tuned.q4_k_m.gguf",
        "models/tuned.iq4_xs.gguf.json",
        "models/plain.q8_0.gguf",
        "models/tuned.base.f16.gguf",
        "models/tuned.base.q4_k_m.gguf.json",
        "models/tuned.Modelfile",
        "models/tuned.q6_k.Modelfile",
        "models/tuned.bf16.Modelfile",
        "models/weighed.imatrix.gguf",
        "models/weighed.base.imatrix.gguf.json",
        "models/weighed.iq2_xs.gguf",
        "models/weighed.base.iq1_s.gguf.json",
        "models/weighed.q2_k_s.Modelfile",
        "models/read.txt",
        "models/tuned.adapter.gguf",
        "models/taken.adapter.gguf.json",
        "models/tuned.adapter.Modelfile",
        "reports/tuned.adapter.chat.json",
        "ollama/plain.json",
        "reports/weighed.rag.json",
        "reports/plain.resources.json",
        "reports/taken.resources.png",
        "reports/notes/a.md",
        "reports/tuned.smoke.json",
        "reports/taken.smoke.json",
        "bases/tennis/MANIFEST.json",
        "adapters/tennis/heatmap.safetensors",
        "models/tennis/merged/MANIFEST.json",
        "models/tennis.onnx.json",
        "models/clips/game1/Clip1/Label.csv",
        "reports/tennis.overlays",
        "reports/tennis.training.json",
        "reports/tennis.resources.png",
        # Outside our folders: other rules', the user's, Snakemake's.
        "logs/tuned/merge_adapter.log",
        "work/tuned/data.json",
        "data/talks.jsonl",
        "README.md",
    ],
)
def test_what_can_be_made_is_no_wrong_target(file: str, project: Project) -> None:
    assert not is_wrong(file, project)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (
            "models/tunned.q4_k_m.gguf",
            ["unknown model 'tunned'", "did you mean 'tuned'?", "plain, silent, taken, tennis, tuned"],
        ),
        ("models/other.Modelfile", ["unknown model 'other'", "plain, silent, taken, tennis, tuned"]),
        ("bases/other/MANIFEST.json", ["unknown model 'other'"]),
        ("reports/tuned-v2.smoke.json", ["unknown model 'tuned-v2'", "did you mean 'tuned'?"]),
        ("models/tuned.q4km.gguf", ["unknown type 'q4km'", "did you mean 'q4_k_m'?"]),
        ("models/tuned.Q4_K_M.gguf", ["unknown type 'Q4_K_M'", "did you mean 'q4_k_m'?"]),
        ("models/tuned.q4km.gguf.json", ["unknown type 'q4km'", "did you mean 'q4_k_m'?"]),
        ("models/tuned.base.q5km.gguf", ["unknown type 'q5km'", "did you mean 'q5_k_m'?"]),
        ("models/tuned.q4km.Modelfile", ["unknown type 'q4km'", "did you mean 'q4_k_m'?"]),
        ("models/tuned.auto.gguf", ["auto is a type only where models.tuned.quantize.types is auto"]),
        ("models/tuned.auto.Modelfile", ["auto is a type only where"]),
        ("models/tuned.iq2_xs.gguf", ["iq2_xs needs an importance matrix; set models.tuned.quantize.imatrix.text"]),
        ("models/tuned.base.iq2_xs.gguf.json", ["iq2_xs needs an importance matrix"]),
        ("models/tuned.imatrix.gguf", ["tuned has no importance matrix; set models.tuned.quantize.imatrix.text"]),
        ("models/weighed.iq2_xz.gguf", ["unknown type 'iq2_xz'"]),
        ("models/tuned.iq2_xs.Modelfile", ["iq2_xs needs an importance matrix"]),
        ("models/tuned.onnx", ["heatmap", "tuned is a language model", "it has models/tuned.q4_k_m.gguf and"]),
        ("models/tuned.onnx.json", ["heatmap", "tuned is a language model"]),
        ("reports/tuned.overlays", ["heatmap", "tuned is a language model"]),
        *(
            (
                file,
                ["language models only, and tennis is a heatmap model; it has models/tennis.onnx, reports/tennis.ev"],
            )
            for file in (
                "models/tennis.q4_k_m.gguf",
                "models/tennis.f16.gguf.json",
                "models/tennis.base.q4_k_m.gguf",
                "models/tennis.Modelfile",
                "models/tennis.q8_0.Modelfile",
                "ollama/tennis.json",
                "reports/tennis.smoke.json",
                "reports/tennis.rag.json",
                "reports/tennis.chat.json",
            )
        ),
        ("models/tennis.onx", ["nothing is built under that name of tennis, a heatmap model; it has models/tennis.on"]),
        (
            "models/tenis.onnx",
            ["unknown model 'tenis'", "did you mean 'tennis'?", "plain, silent, taken, tennis, tuned"],
        ),
        ("reports/tuned.eval.json", ["heatmap", "tuned is a language model"]),
        ("adapters/plain/MANIFEST.json", ["plain has no adapter in config.yaml"]),
        ("adapters/plain/adapter_model.safetensors", ["plain has no adapter in config.yaml"]),
        ("reports/silent.smoke.json", ["silent has no smoke.questions in config.yaml"]),
        ("reports/plain.smoke.json", ["plain has no adapter in config.yaml"]),
        ("models/tuned/merged/config.jsn", ["nothing is built under that name", "README.md"]),
        ("adapters/tuned/weights.bin", ["nothing is built under that name"]),
        ("models/plain.adapter.gguf", ["plain has no adapter in config.yaml"]),
        ("models/tuned.base.adapter.gguf", ["unknown type 'adapter'"]),
        ("models/plain.adapter.Modelfile", ["plain has no adapter in config.yaml"]),
        ("reports/tuned.rag.json", ["tuned has no rag.documents in config.yaml"]),
        ("ollama/other.json", ["unknown model 'other'"]),
        ("reports/plain.resources.svg", ["nothing is built under that name"]),
        ("ollama/tuned.txt", ["nothing is built under that name"]),
    ],
)
def test_what_cannot_be_made_is_explained(file: str, said: list[str], project: Project) -> None:
    assert is_wrong(file, project)
    explanation = explain_target(file, project)
    assert explanation.startswith(f"{file}: ")
    assert [part for part in said if part not in explanation] == []


@pytest.mark.parametrize("file", ["models/tuned.base.q4_k_m.Modelfile", "models/tuned.gguf", "models/tuned.base.gguf"])
def test_a_known_type_is_not_called_unknown(file: str, project: Project) -> None:
    """Nor is a missing one called 'gguf'."""
    assert is_wrong(file, project)
    explanation = explain_target(file, project)
    assert "unknown type 'q4_k_m'" not in explanation
    assert "unknown type 'gguf'" not in explanation


@pytest.mark.parametrize("base", ["bases/mine", "bases/mine/", "./bases/mine", "bases//mine"])
def test_the_users_own_checkpoint_is_no_wrong_target(base: str, workplace: Path) -> None:
    """However its folder is written, Snakemake sees the files as `Path` does."""
    project = project_of(m={"base": {"path": base}})
    assert not is_wrong("bases/mine/config.json", project)
    assert is_wrong("bases/miner/config.json", project)


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ({"base": {"gguf": "models/own.gguf", "shape": SHAPE}}, "models/own.gguf"),
        ({"base": HUB, "adapter": {"train": {"data": "adapters/talks.jsonl"}}}, "adapters/talks.jsonl"),
        ({"base": HUB, "smoke": {"questions": "reports/asked.jsonl"}}, "reports/asked.jsonl"),
        ({"base": HUB, "adapter": {"path": "adapters/run7"}}, "adapters/run7/adapter_model.safetensors"),
        ({"base": HUB, "adapter": {"latest_in": "./models//runs/"}}, "models/runs/b/adapter_config.json"),
    ],
)
def test_no_input_of_the_users_is_a_wrong_target(model: dict[str, Any], file: str, workplace: Path) -> None:
    assert not is_wrong(file, project_of(m=model))


def test_names_of_models_in_paths(project: Project) -> None:
    """What Snakemake compiles: the name's pattern within the path's."""
    path = re.compile(rf"models/(?P<model>{model_names(project)})(?P<base>(\.base)?)\.(?P<rest>.+)")
    for file, fits in {
        "models/tuned.q4_k_m.gguf": True,
        "models/tuned.iq2_xs.gguf": False,
        "models/tuned.base.iq2_xs.gguf": False,
        "models/tuned.iq2_xs.Modelfile": False,
        "models/weighed.iq2_xs.gguf": True,
        "models/weighed.base.iq2_xs.gguf": True,
        "models/other.q4_k_m.gguf": False,
        "models/tennis.q4_k_m.gguf": False,
    }.items():
        assert (path.fullmatch(file) is not None) == fits, file


def test_a_name_that_begins_like_another(workplace: Path) -> None:
    project = project_of(**{"a": {"base": HUB}, "a-b": {"base": HUB}})
    assert not is_wrong("models/a-b.q4_k_m.gguf", project)
    assert not is_wrong("models/a.q4_k_m.gguf", project)
    assert is_wrong("models/a-.q4_k_m.gguf", project)
