"""The rebuild table of heatmap models by dry run, and what is said of targets that they do not have."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_snakemake
from test_rebuild import plan, set_in_config

TARGETS = ("models/t.onnx", "reports/t.eval.json", "models/f.onnx", "reports/f.eval.json")
BACKBONE = {"model_type": "vit", "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 8}
HEATMAP = {"kind": "heatmap", "heatmap": {"model": "vit_heatmap"}, "adapter": {"train": {"device": "cpu"}}}
MODELS = {
    "t": {**HEATMAP, "base": {"random": BACKBONE}, "clips": {"synthetic": {"frames": 4}, "eval_games": ["game4"]}},
    "f": {**HEATMAP, "base": {"path": "own"}, "clips": {"path": "tennis", "eval_games": ["game2"]}},
}


def chain(name: str) -> dict[str, set[tuple[str, str]]]:
    """Each job of a model with all that follows from it."""
    evaluated = {("evaluate_heatmap", f"reports/{name}.eval.json")}
    exported = {("export_onnx", f"models/{name}.onnx")}
    merged = {("merge_heatmap", f"models/{name}/merged/MANIFEST.json"), *exported, *evaluated}
    trained = {("train_heatmap", f"adapters/{name}/MANIFEST.json"), *merged}
    checked = {("check_clips", f"work/{name}/clips.json"), *trained}
    return {
        "evaluated": evaluated,
        "merged": merged,
        "trained": trained,
        "checked": checked,
        "made": {("make_clips", f"work/{name}/clips"), *checked},
        "fetched": {("fetch_base", f"bases/{name}/MANIFEST.json"), *trained},
    }


DRAWN, FILMED = chain("t"), chain("f")
EVERYTHING = DRAWN["made"] | DRAWN["fetched"] | FILMED["checked"] | FILMED["fetched"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models as if built: something in the place of each output, which Snakemake's own --touch takes for built."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "own").mkdir()
    (folder / "own/config.json").write_text(json.dumps(BACKBONE))
    (folder / "own/model.safetensors").write_text("weights")
    for game in (1, 2):
        clip = folder / f"tennis/game{game}/Clip1"
        clip.mkdir(parents=True)
        (clip / "Label.csv").write_text("file name,visibility,x-coordinate,y-coordinate,status\n0000.jpg,0,,,\n")
        (clip / "0000.jpg").write_text("picture")
    models = json.loads(json.dumps(MODELS))  # what they share would be one place of the file
    (folder / "config.yaml").write_text(yaml.safe_dump({"models": models}))
    assert plan(folder, ROOT, *TARGETS) == EVERYTHING
    for name in MODELS:
        for place in (f"work/{name}/clips", f"models/{name}/merged", f"reports/{name}.overlays"):
            (folder / place).mkdir(parents=True, exist_ok=True)
        files = [f"work/{name}/clips.made", f"work/{name}/clips.json", f"models/{name}.onnx.json"]
        files += [f"adapters/{name}/{file}" for file in ("MANIFEST.json", "heatmap.safetensors")]
        for file in (*files, *(output for _, output in EVERYTHING)):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / file).is_dir():
                (folder / file).write_text("{}")
    touched = run_snakemake(folder, "-j1", "--touch", "--forceall", *TARGETS)
    assert touched.returncode == 0, touched.stderr
    assert plan(folder, ROOT, *TARGETS) == set()
    return folder


def later(name: str, text: str) -> Callable[[Path, Path], None]:
    """An edit of a file, at a time that is not that of before."""

    def edit(project: Path, checkout: Path) -> None:
        (project / name).write_text(text)
        os.utime(project / name, (2e9, 2e9))

    return edit


def in_model(name: str, *path: str, value: object) -> Callable[[Path, Path], None]:
    return set_in_config("models", name, *path, value=value)


TABLE: dict[str, tuple[Callable[[Path, Path], None], set[tuple[str, str]]]] = {
    "nothing": (lambda project, checkout: None, set()),
    "a threshold": (in_model("t", "evaluation", "threshold", value=0.4), DRAWN["evaluated"]),
    "the distance that counts": (in_model("f", "evaluation", "distance", value=4), FILMED["evaluated"]),
    "the games that are held out": (in_model("t", "clips", "eval_games", value=["game3"]), DRAWN["trained"]),
    "what an occluded ball is": (in_model("t", "clips", "occluded", value="target"), DRAWN["trained"]),
    "how clips are drawn": (in_model("t", "clips", "synthetic", "seed", value=1), DRAWN["made"]),
    "the decoder": (in_model("t", "heatmap", "norm", value="bn"), DRAWN["trained"]),
    "the learning rate": (in_model("f", "adapter", "train", "learning_rate", value=1e-3), FILMED["trained"]),
    "the method": (in_model("t", "adapter", "train", "method", value="int8"), DRAWN["trained"]),
    "the type that is written": (in_model("t", "merge", "dtype", value="float16"), DRAWN["merged"]),
    "the seed of the backbone": (in_model("t", "base", "seed", value=1), DRAWN["fetched"]),
    "a number of the backbone": (in_model("t", "base", "random", "num_hidden_layers", value=1), DRAWN["fetched"]),
    "the backbone's weights": (later("own/model.safetensors", "others"), FILMED["fetched"]),
    "a row of a table": (later("tennis/game1/Clip1/Label.csv", "another"), FILMED["checked"]),
    "a frame": (later("tennis/game1/Clip1/0000.jpg", "another"), FILMED["checked"]),
    "the machine planned for": (set_in_config("hardware", "gpus", value=[24]), set()),
    "a default that is written down": (in_model("t", "heatmap", "sigma", value=2), set()),
}


@pytest.mark.parametrize("edited", TABLE)
def test_edit_reruns_exactly(edited: str, recorded: Path, tmp_path: Path) -> None:
    edit, expected = TABLE[edited]
    project = Path(shutil.copytree(recorded, tmp_path / "copy", symlinks=True))
    edit(project, ROOT)
    assert plan(project, ROOT, *TARGETS) == expected


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("models/t.q4_k_m.gguf", "made for language models only, and t is a heatmap model; it has models/t.onnx"),
        ("models/t.Modelfile", "made for language models only"),
        ("ollama/t.json", "made for language models only"),
        ("reports/t.smoke.json", "made for language models only"),
    ],
)
def test_what_a_heatmap_model_does_not_have(target: str, said: str, recorded: Path) -> None:
    done = run_snakemake(recorded, "-n", target)
    assert done.returncode == 1
    assert f"{target}: {said}" in done.stderr and "Traceback" not in done.stderr


def test_a_model_without_held_out_games_is_not_evaluated(recorded: Path, tmp_path: Path) -> None:
    """Of an evaluation that has no game it would be told at the very end, after the training."""
    project = Path(shutil.copytree(recorded, tmp_path / "copy", symlinks=True))
    in_model("t", "clips", "eval_games", value=[])(project, ROOT)
    done = run_snakemake(project, "-n", "reports/t.eval.json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "reports/t.eval.json: t has no clips.eval_games in config.yaml" in done.stderr
    done = run_snakemake(project, "-n", "all")
    assert done.returncode == 0, done.stderr
    assert "models/t.onnx" in done.stdout and "reports/t.eval.json" not in done.stdout


def test_all_of_a_project_without_language_models(recorded: Path) -> None:
    done = run_snakemake(recorded, "-n", "all")
    assert done.returncode == 0, done.stderr
    assert "t: trained by full in fp32 on cpu (as configured: every weight, without an adapter)" in done.stderr
