"""The plan of the shipped config.yaml: complete, with every need declared, and made without torch or a network."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from conftest import ROOT, run_snakemake

GOLDEN = Path(__file__).parent / "golden" / "plan.txt"
NEEDS = ("mem_mb", "gpu_mem_mb", "gpu", "disk_mb", "runtime")
CHAIN_32B = {
    "build_llama_cpp", "check_base", "check_data", "fetch_base", "train_adapter", "build_direct",
}  # fmt: skip


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing torch, transformers or peft fails, and no address can be reached."""
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('the plan imported ' + __name__)\n")
    dead = "http://127.0.0.1:9"
    return {"PYTHONPATH": str(tmp_path), "HTTPS_PROXY": dead, "HTTP_PROXY": dead, "HF_ENDPOINT": dead}


def jobs_of(plan: str) -> dict[tuple[str, str], dict[str, str]]:
    """Resources of each job of a dry run, by rule and first output."""
    jobs = {}
    for block in re.split(r"\n\[.*?\]\n", plan)[1:]:
        rule = re.match(r"(?:local)?rule (\w+):", block)[1]
        output = re.search(r"\n    output: ([^,\n ]*)", block)
        resources = re.search(r"\n    resources: (.*)", block)[1]
        jobs[rule, output[1] if output else ""] = dict(each.split("=", 1) for each in resources.split(", "))
    return jobs


def test_every_job_of_all_declares_its_needs(bare: dict[str, str]) -> None:
    done = run_snakemake(ROOT, "-n", "--forceall", "all", environment=bare)
    assert done.returncode == 0, done.stderr
    jobs = jobs_of(done.stdout + done.stderr)
    assert len(jobs) == 22
    for job, resources in jobs.items():
        assert all(re.fullmatch(r"\d+", resources[need]) for need in NEEDS), (job, resources)


def test_the_32b_is_planned_for_two_cards(bare: dict[str, str]) -> None:
    done = run_snakemake(ROOT, "-n", "--forceall", "models/deepseek32b.q4_k_m.gguf", environment=bare)
    assert done.returncode == 0, done.stderr
    jobs = jobs_of(done.stdout + done.stderr)
    assert {rule for rule, _ in jobs} == CHAIN_32B
    train = jobs["train_adapter", "adapters/deepseek32b/MANIFEST.json"]
    assert train["gpu"] == "2"
    assert 15_200 <= int(train["gpu_mem_mb"]) <= 24 * 1074
    assert all(resources["gpu"] == "0" for (rule, _), resources in jobs.items() if rule != "train_adapter")


def test_golden_plan() -> None:
    """Files and rules of the whole plan; `RENEW_GOLDEN=1 pytest tests/test_plan.py` writes them anew."""
    done = run_snakemake(ROOT, "--summary", "all", "reports/demo.smoke.json")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    start = next(i for i, row in enumerate(rows) if row[0] == "output_file")
    columns = rows[start].index("output_file"), rows[start].index("rule")
    plan = "".join(sorted(f"{row[columns[0]]}\t{row[columns[1]]}\n" for row in rows[start + 1 :] if len(row) > 2))
    if os.environ.get("RENEW_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(plan)
    assert plan == GOLDEN.read_text()
