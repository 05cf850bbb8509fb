"""Which way a quantized file is made: directly, or by merged checkpoint and 16-bit GGUF, with the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, copy_built, planned_rules, run_snakemake
from test_rebuild import set_in_config

STAGED = {"merge_adapter", "convert_gguf", "quantize_gguf"}


def chosen_way(project: Path, checkout: Path, *targets: str) -> set[str]:
    """The rules of both ways that a dry run would run."""
    done = run_snakemake(project, "-n", *targets, checkout=checkout)
    return {rule for rule in planned_rules(done) if rule in STAGED or rule.startswith("build_direct")}


@pytest.mark.slow
def test_the_direct_rule_gives_the_files_of_the_staged_ones(built: Path, tmp_path: Path) -> None:
    project, checkout = copy_built(built, tmp_path / "copy")
    set_in_config("models", "tiny", "quantize", "path", value="direct")(project, checkout)
    names = ["models/tiny.q4_k_m.gguf", "models/tiny.base.q4_k_m.gguf"]
    expected = [hashlib.sha256((built / name).read_bytes()).hexdigest() for name in names]
    shutil.rmtree(project / "models")
    done = run_snakemake(project, "-j1", *names, checkout=checkout)
    assert done.returncode == 0, done.stderr
    assert [hashlib.sha256((project / name).read_bytes()).hexdigest() for name in names] == expected
    assert [json.loads((project / f"{name}.json").read_text())["sha256"] for name in names] == expected
    made = {path.name for path in (project / "models").iterdir()}
    assert made == {Path(name).name + end for name in names for end in ("", ".json")}
    assert planned_rules(run_snakemake(project, "-n", *names, checkout=checkout)) == set()
    verified = subprocess.run(
        [sys.executable, ROOT / "scripts/verify.py", *names, "adapters/tiny"],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert [line for line in verified.stderr.splitlines() if line.strip() == "ok"] == ["  ok"] * 3
    assert "from the adapter" in verified.stderr
    assert "merged in float32 onto the original weights, rounded once to float16" in verified.stderr


@pytest.mark.slow
def test_types_that_are_asked_for_together_are_one_job(built: Path, tmp_path: Path) -> None:
    project, checkout = copy_built(built, tmp_path / "copy")
    set_in_config("models", "tiny", "quantize", "path", value="direct")(project, checkout)
    expected = hashlib.sha256((built / "models/tiny.q4_k_m.gguf").read_bytes()).hexdigest()
    shutil.rmtree(project / "models")
    names = ["models/tiny.q8_0.gguf", "models/tiny.q4_k_m.gguf"]
    assert chosen_way(project, checkout, *names) == {"build_direct_q4_k_m_and_q8_0"}
    # A job on a cluster is a call of Snakemake that names no file.
    job = ["--target-jobs", "build_direct_q4_k_m_and_q8_0:model=tiny,base=", "--mode=remote"]
    done = run_snakemake(project, "-j1", *job, checkout=checkout)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (project / "models").iterdir()} == {
        Path(name).name + end for name in names for end in ("", ".json")
    }
    assert hashlib.sha256((project / names[1]).read_bytes()).hexdigest() == expected
    shutil.rmtree(project / "models")
    done = run_snakemake(project, "-j1", *names, checkout=checkout)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256((project / names[1]).read_bytes()).hexdigest() == expected
    # Alone or together, it is the same file, and is built once.
    for targets in ([names[0]], [names[1]], names):
        assert planned_rules(run_snakemake(project, "-n", *targets, checkout=checkout)) == set()
    # Nor is it built again when the 16-bit file is asked for later.
    set_in_config("models", "tiny", "quantize", "path", value="auto")(project, checkout)
    assert chosen_way(project, checkout, "models/tiny.f16.gguf", *names) == STAGED - {"quantize_gguf"}
    (project / names[0]).unlink()
    assert chosen_way(project, checkout, *names) == {"build_direct"}
    planned = run_snakemake(project, "-n", *names, checkout=checkout).stdout
    assert "output: models/tiny.q8_0.gguf" in planned and "output: models/tiny.q4_k_m.gguf" not in planned


@pytest.mark.slow
def test_auto_goes_by_what_is_there_or_asked_for(built: Path, tmp_path: Path) -> None:
    project, checkout = copy_built(built, tmp_path / "copy")
    target = "models/tiny.q5_k_m.gguf"
    set_in_config("models", "tiny", "quantize", "path", value="auto")(project, checkout)
    assert chosen_way(project, checkout, target) == {"quantize_gguf"}
    # What is finished stays as it is without the copies that it was made of.
    shutil.rmtree(project / "models/tiny/merged")
    for copy in ("tiny.f16.gguf", "tiny.f16.gguf.json", "tiny.base.f16.gguf", "tiny.base.f16.gguf.json"):
        (project / "models" / copy).unlink()
    built_already = ("models/tiny.q4_k_m.gguf", "models/tiny.Modelfile", "reports/tiny.smoke.json")
    assert planned_rules(run_snakemake(project, "-n", *built_already, checkout=checkout)) == set()
    assert chosen_way(project, checkout, target) == {"build_direct"}
    shutil.rmtree(project / "models")
    assert chosen_way(project, checkout, target) == {"build_direct"}
    assert chosen_way(project, checkout, target, "models/tiny.f16.gguf") == STAGED
    assert chosen_way(project, checkout, target, "models/tiny/merged/MANIFEST.json") == STAGED
    set_in_config("models", "tiny", "quantize", "types", value=["f16", "q4_k_m"])(project, checkout)
    assert chosen_way(project, checkout, "all", target) == STAGED
    set_in_config("models", "tiny", "quantize", value={"path": "staged"})(project, checkout)
    assert chosen_way(project, checkout, target) == STAGED


@pytest.mark.slow
def test_the_matrix_of_the_direct_path_comes_from_q8_0(built: Path, tmp_path: Path) -> None:
    project, checkout = copy_built(built, tmp_path / "copy")
    shutil.rmtree(project / "models")
    (project / "read.txt").write_text("words and words\n" * 400)
    set_in_config("models", "tiny", "quantize", value={"path": "direct", "imatrix": {"text": "read.txt"}})(
        project, checkout
    )
    done = run_snakemake(project, "-n", "models/tiny.iq2_xs.gguf", checkout=checkout)
    assert planned_rules(done) == {"build_direct", "compute_imatrix", "check_calibration"}
    assert "input: models/tiny.q8_0.gguf.json" in done.stdout + done.stderr
