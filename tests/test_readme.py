"""README.md says what is true: its figures, its file tree, its commands."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml
from conftest import ROOT, run_snakemake

from lib import estimate
from lib.config import mistakes_in, schema
from lib.spec import Model, resolve_project

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Model], estimate.Hardware]:
    monkeypatch.chdir(ROOT)
    project = resolve_project(yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8")))
    return dict(project.models), project.hardware


def test_needs_are_those_of_the_estimate(models: tuple[dict[str, Model], estimate.Hardware]) -> None:
    known, hardware = models
    steps = {
        "fetch_base": estimate.fetch_needs,
        "train_adapter": lambda model: estimate.train_needs(model, hardware),
        "merge_adapter": estimate.merge_needs,
        "convert_gguf": estimate.convert_needs,
        "quantize_gguf": lambda model: estimate.quantize_needs(model, "q4_k_m"),
        "build_direct, instead of these three": lambda model: estimate.direct_needs(model, ["q4_k_m"]),
        "render_modelfile": estimate.modelfile_needs,
    }
    for step, needs_of in steps.items():
        cells = [cell.strip() for cell in re.search(rf"^\| {step} \|(.*)\|$", README, re.MULTILINE)[1].split("|")]
        for cell, name in zip(cells, ("demo", "deepseek32b"), strict=True):
            needs = needs_of(known[name])
            said = [f"{needs.mem_mb / 1000:.1f} GB", f"{needs.disk_mb / 1000:.1f} GB"]
            said += [f"{needs.gpu} × {needs.gpu_mem_mb / 1000:.1f} GB"] if needs.gpu else []
            assert cell == ", ".join(said), (step, name)


def test_file_tree_is_that_of_the_checkout() -> None:
    tree = README.partition("```text\n")[2].partition("```")[0]
    named = [line.split()[0] for line in tree.splitlines()]
    assert all((ROOT / name).exists() for name in named)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {f"{name.split('/')[0]}/" for name in tracked if "/" in name and not name.startswith(".")}
    assert folders <= {name.split("/")[0] + "/" for name in named}


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make (demo|test|[a-z]+-?[a-z]*)(?=`|\s+#)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_example_config_is_valid() -> None:
    example = yaml.safe_load(README.partition("```yaml\n")[2].partition("```")[0])

    assert mistakes_in(example, schema()) == []


@pytest.mark.parametrize("command", re.findall(r"^snakemake ((?:-n|--dry-run).*?)\s+#", README, re.MULTILINE))
def test_planning_commands_work(command: str) -> None:
    assert run_snakemake(ROOT, *command.split()).returncode == 0
