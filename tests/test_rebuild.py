"""The rebuild table: edit this, and exactly these rules would run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import yaml
from conftest import copy_built, planned_rules, run_snakemake, write_project

pytestmark = pytest.mark.slow

MODELFILE = {"render_modelfile"}
QUANTIZED = {"quantize_gguf", *MODELFILE}
CONVERTED = {"convert_gguf", *QUANTIZED}
MERGED = {"merge_adapter", *CONVERTED}
TRAINED = {"train_adapter", *MERGED}


def set_in_config(*path: str, value: object) -> Callable[[Path, Path], None]:
    """An edit of one value of config.yaml."""

    def edit(project: Path, checkout: Path) -> None:
        config = yaml.safe_load((project / "config.yaml").read_text(encoding="utf-8"))
        section = config
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section[path[-1]] = value
        (project / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")

    return edit


def replace_in_checkout(file: str, old: str, new: str) -> Callable[[Path, Path], None]:
    """An edit of the code."""

    def edit(project: Path, checkout: Path) -> None:
        text = (checkout / file).read_text(encoding="utf-8")
        assert old in text
        (checkout / file).write_text(text.replace(old, new, 1), encoding="utf-8")

    return edit


def change_a_line_of_data(project: Path, checkout: Path) -> None:
    path = project / "train.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("q4_k_m", "q5_k_m", 1), encoding="utf-8")


def touch_every_script(project: Path, checkout: Path) -> None:
    for script in (checkout / "scripts").rglob("*.py"):
        os.utime(script)


def touch_the_data(project: Path, checkout: Path) -> None:
    os.utime(project / "train.jsonl")


def convert_again(project: Path, checkout: Path) -> None:
    before = (project / "models/tiny.f16.gguf").stat()
    done = run_snakemake(
        project, "-j1", "--until", "convert_gguf", "--forcerun", "convert_gguf", "--", "models/tiny.f16.gguf",
        checkout=checkout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (project / "models/tiny.f16.gguf").stat().st_mtime_ns > before.st_mtime_ns


def change_a_shard_of_the_base(project: Path, checkout: Path) -> None:
    base = Path(yaml.safe_load((project / "config.yaml").read_text())["models"]["tiny"]["base"]["path"])
    mine = project / "base"
    shutil.copytree(base, mine)
    set_in_config("models", "tiny", "base", "path", value=str(mine))(project, checkout)


ANOTHER = {"base": {"hub": "someone/other", "revision": "main", "shape": tiny.SHAPE}}
TABLE = {
    "the Ollama system prompt": (
        set_in_config("models", "tiny", "ollama", "system", value="Be brief."),
        MODELFILE,
    ),
    "a temperature": (
        set_in_config("models", "tiny", "ollama", "parameters", "temperature", value=0.9),
        MODELFILE,
    ),
    "the quantization type": (
        set_in_config("models", "tiny", "quantize", "types", value=["q5_k_m"]),
        QUANTIZED,
    ),
    "the shard size": (set_in_config("models", "tiny", "merge", "max_shard_size", value=2), MERGED),
    "the learning rate": (
        set_in_config("models", "tiny", "adapter", "train", "learning_rate", value=0.02),
        TRAINED,
    ),
    "one line of data": (change_a_line_of_data, {"check_data", *TRAINED}),
    "the base": (change_a_shard_of_the_base, {"fetch_base", *TRAINED}),
    "a helper that only the merge uses": (
        replace_in_checkout("scripts/lib/merge.py", "1 << 24", "1 << 23"),
        MERGED,
    ),
    "a comment in the trainer": (
        replace_in_checkout("scripts/lib/training.py", "def train_lora", "# A remark.\ndef train_lora"),
        set(),
    ),
    "a docstring in the trainer": (
        replace_in_checkout("scripts/lib/training.py", "    Train an adapter.\n", "    Train one adapter.\n"),
        set(),
    ),
    "a comment in the README": (replace_in_checkout("README.md", "modelmill", "<!-- a remark -->modelmill"), set()),
    "the time of every script": (touch_every_script, set()),
    "the time of the data": (touch_the_data, set()),
    "another model's entry": (set_in_config("models", "other", value=ANOTHER), set()),
    "the machine planned for": (set_in_config("hardware", "gpus", value=[24, 24]), set()),
    "a forced conversion to the same bytes": (convert_again, set()),
}


@pytest.mark.parametrize("edited", TABLE)
def test_edit_reruns_exactly(edited: str, built: Path, tmp_path: Path) -> None:
    edit, expected = TABLE[edited]
    project, checkout = copy_built(built, tmp_path / "copy")
    edit(project, checkout)
    targets = ["models/tiny.q4_k_m.gguf", "models/tiny.Modelfile"]
    if edited == "the quantization type":
        targets = ["models/tiny.Modelfile"]
    assert planned_rules(run_snakemake(project, "-n", *targets, checkout=checkout)) == expected


def test_revision_of_a_hub_base_reruns_its_chain(tmp_path: Path, tiny_base: Path) -> None:
    """Snakemake's own --touch takes files as built; so no download is needed for this row."""
    project = write_project(tmp_path / "project", base=tiny_base)
    set_in_config("models", "tiny", value={**ANOTHER, "adapter": {"train": tiny.TRAIN}})(project, project)
    for name in ("bases/tiny/MANIFEST.json", "adapters/tiny/MANIFEST.json", "models/tiny/merged/MANIFEST.json"):
        (project / name).parent.mkdir(parents=True)
        (project / name).write_text("{}")
    for name in ("adapters/tiny/adapter_model.safetensors", "adapters/tiny/adapter_config.json",
                 "models/tiny.f16.gguf", "models/tiny.f16.gguf.json", "models/tiny.q4_k_m.gguf",
                 "models/tiny.q4_k_m.gguf.json", "models/tiny.Modelfile", "work/tiny/data.json",
                 "work/llama_cpp.json"):  # fmt: skip
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(json.dumps({}))
    assert run_snakemake(project, "-j1", "--touch", "all").returncode == 0
    assert planned_rules(run_snakemake(project, "-n", "all")) == set()
    set_in_config("models", "tiny", "base", "revision", value="v2")(project, project)
    assert planned_rules(run_snakemake(project, "-n", "all")) == {"fetch_base", *TRAINED}
