"""The workflow used from other places: another folder, a read-only checkout, a module of another workflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import copy_checkout, planned_rules, write_project
from other_run import other_run
from read_only import read_only
from test_chain import digests

OUTER = """
configfile: "config.yaml"

rule all:
    input: "report.txt"

{before}
module modelmill:
    snakefile: {snakefile!r}
    config: config["modelmill"]
{module}

use rule * from modelmill as mm_*

rule report:
    input: "models/tiny.Modelfile"
    output: "report.txt"
    shell: "cp {{input:q}} {{output:q}}"

rule own:
    output: "reports/{{name}}.html"
    shell: "echo own > {{output:q}}"
{after}
"""


def snakemake(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("日本語 の checkout"))


def write_outer(folder: Path, checkout: Path, *, base: Path, **parts: str) -> Path:
    """A workflow with a rule and a setting of its own, which has modelmill make what it needs."""
    write_project(folder, base=base)
    own = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    config = {"modelmill": own, "title": "x"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    (folder / "workflow").mkdir()
    snakefile = os.path.relpath(checkout / "Snakefile", folder / "workflow")
    blank = {"before": "", "module": "", "after": ""}
    (folder / "workflow/Snakefile").write_text(OUTER.format(snakefile=snakefile, **{**blank, **parts}))
    return folder


@pytest.fixture
def outer(checkout: Path, tiny_base: Path, tmp_path: Path) -> Path:
    return write_outer(tmp_path / "外の workflow", checkout, base=tiny_base)


@pytest.mark.slow
def test_from_anywhere_the_same_bytes(built: Path, outer: Path, checkout: Path, tmp_path: Path) -> None:
    """A module, called from another folder, with blanks and Japanese in all paths, from a read-only checkout."""
    with read_only(checkout) as problem:
        place = ("-s", os.path.relpath(outer / "workflow/Snakefile", tmp_path), "--directory", outer)
        done = snakemake(*place, "-j2", "all", "mm_all", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert digests(outer) == digests(built)
        assert (outer / "report.txt").read_bytes() == (outer / "models/tiny.Modelfile").read_bytes()
        again = snakemake(*place, "-j2", "all", "mm_all", cwd=tmp_path)
        assert "Nothing to be done" in again.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == [outer.name], "something lies where it was called"
    if problem:
        pytest.skip(f"all of it works, but the checkout was not read-only: {problem}")


@pytest.fixture(scope="module")
def plain(checkout: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project beside a read-only checkout."""
    with read_only(checkout):
        yield write_project(tmp_path_factory.mktemp("plain") / "計画 1", base=tiny_base)


@pytest.mark.parametrize("way", ["another folder", "another folder and --directory", "a link"])
def test_the_plan_from_elsewhere(way: str, plain: Path, checkout: Path, tmp_path: Path) -> None:
    snakefile, cwd, more = checkout / "Snakefile", plain, []
    if way == "another folder":
        snakefile = os.path.relpath(snakefile, plain)
    elif way == "a link":
        (tmp_path / "link").symlink_to(checkout)
        snakefile = tmp_path / "link/Snakefile"
    else:
        cwd, more = tmp_path, ["--directory", os.path.relpath(plain, tmp_path)]
    done = snakemake("-s", snakefile, *more, "-n", "all", cwd=cwd)
    assert planned_rules(done) >= {"fetch_base", "train_adapter", "quantize_gguf", "render_modelfile"}
    assert "profiles/default" in done.stderr, "the settings of the profile have to come along"


def config_of(outer: Path, *said: str) -> dict[str, Any]:
    """The config that the module's preflight gets."""
    done = snakemake("-n", "--printshellcmds", "mm_preflight", *said, cwd=outer)
    assert done.returncode == 0, done.stderr
    words = next(line for line in done.stdout.splitlines() + done.stderr.splitlines() if "--changes " in line)
    return json.loads(words.partition("--changes '")[2].partition("' --json")[0])


def test_what_a_call_says_is_said_to_whom_it_belongs(outer: Path) -> None:
    assert config_of(outer)["models"].keys() == {"tiny"}
    assert "force" not in config_of(outer, "--config", "title=y", "force=true")
    assert config_of(outer, "--config", "modelmill={force: true}")["force"] is True


def test_files_of_the_workflows_own_lie_beside_ours(outer: Path) -> None:
    done = snakemake("-j1", "reports/own.html", cwd=outer)
    assert done.returncode == 0, done.stderr
    assert (outer / "reports/own.html").read_text() == "own\n"


@pytest.mark.slow
def test_preflight_of_a_module(outer: Path) -> None:
    done = snakemake("-j1", "mm_preflight", cwd=outer)
    assert "tiny: weights in memory" in done.stdout, done.stderr
    assert json.loads((outer / "reports/preflight.json").read_text())["models"].keys() == {"tiny"}


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"before": 'onstart:\n    print("own check")\n'},
        {"after": 'onstart:\n    print("own check")\n    modelmill.onstart()\n'},
    ],
    ids=["no onstart", "onstart before", "onstart after"],
)
def test_our_checks_before_the_first_job(
    parts: dict[str, str], checkout: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """A job that outlived its Snakemake is seen; Snakemake itself runs no `onstart` of a module."""
    outer = write_outer(tmp_path / "outer", checkout, base=tiny_base, **parts)
    with other_run(outer / "bases/tiny"):
        done = snakemake("-j1", cwd=outer)
    assert done.returncode == 1
    assert "bases/tiny is being written by another run" in done.stderr and "nothing was run" in done.stderr
    assert ("own check" in done.stdout) == ("after" in parts)


def test_a_prefix_is_refused(checkout: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Snakemake would put it before outputs, but not into commands."""
    outer = write_outer(tmp_path / "outer", checkout, base=tiny_base, module='    prefix: "sub"\n')
    done = snakemake("-n", cwd=outer)
    assert done.returncode == 1
    assert "modelmill cannot be a module with a prefix" in done.stdout + done.stderr
