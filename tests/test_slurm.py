"""The workflow on a Slurm cluster, a real one where there is one; and what is asked of Slurm, on its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, run_snakemake, write_project
from slurm_cluster import Cluster

from lib import estimate, slurm
from lib.slurm import SlurmError, cluster_cards, longest_minutes, smallest_card, why_refused
from lib.spec import Project, resolve_project

# Training is stopped by its time limit after some updates, and needs no more than a few seconds for the rest.
UPDATES, STOPPED_FROM = 180, 20
SECONDS = 400.0
GPUS = "a5000=24 a100=80"
# 25 GB on each card are no more than the 24 GiB of an a5000. Training on the CPU has no use for them.
CARDS = ["train_adapter:runtime=1", "train_adapter:gpu=2", "train_adapter:gpu_mem_mb=25000"]


@dataclass(frozen=True)
class Run:
    """A run that is over: its folder, what it said, and its jobs as Slurm shows them."""

    folder: Path
    project: Project
    said: str
    jobs: list[dict[str, str]]
    cluster: Cluster

    def of(self, name: str) -> list[dict[str, str]]:
        """The jobs of that rule or group, by the comment that the plugin gives them; each attempt is one."""
        return [job for job in self.jobs if job["Comment"] == f"rule_{name}"]


def write_long_training(folder: Path, base: Path) -> Project:
    """The tiny model with more to train, made in whichever way the workflow takes by itself."""
    write_project(folder, base=base)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    tiny = config["models"]["tiny"]
    del tiny["quantize"]
    tiny["adapter"]["train"]["num_train_epochs"] = UPDATES // 3
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    with contextlib.chdir(folder):
        return resolve_project(config)


def suspend_training(folder: Path, running: subprocess.Popen[bytes]) -> None:
    """Let it train for some updates and then stand still, until Slurm wakes it up to end it."""
    log, end = folder / "logs/tiny/train_adapter.log", time.monotonic() + SECONDS
    while not (log.exists() and f"step {STOPPED_FROM} of" in log.read_text(encoding="utf-8")):
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    told = [each for each in psutil.process_iter(["cmdline"]) if "adapters/tiny" in (each.info["cmdline"] or [])]
    (process,) = (each for each in told if each.cwd() == str(folder))
    process.send_signal(signal.SIGSTOP)


@pytest.fixture(scope="module")
def run(cluster: Cluster, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny chain through profiles/slurm, with a training that meets its time limit; no test changes it."""
    folder = tmp_path_factory.mktemp("slurm") / "project"
    folder.mkdir()
    project = write_long_training(folder, tiny_base)
    places = {"SBATCH_PARTITION": "other", "MODELMILL_GPUS": GPUS}
    output = folder.with_name("said")
    running = cluster.start(folder, "models/tiny.Modelfile", "--set-resources", *CARDS, output=output, **places)
    try:
        suspend_training(folder, running)
        running.wait(SECONDS)
    finally:
        cluster.end(running, folder)
    said = output.read_text(encoding="utf-8")
    assert running.returncode == 0, said
    return Run(folder, project, said, cluster.jobs(folder), cluster)


def megabytes(shown: str) -> int:
    """What scontrol shows as 891M or 5600M or 2G."""
    return int(shown[:-1]) * {"M": 1, "G": 1024}[shown[-1]]


def minutes(shown: str) -> int:
    """What scontrol shows as 01:30:00."""
    hours, rest, _ = map(int, shown.split(":"))
    return 60 * hours + rest


@pytest.mark.slow
@pytest.mark.slurm
def test_what_jobs_ask_for_is_what_was_estimated(run: Run) -> None:
    """Two steps in one job need the larger memory and the sum of the times."""
    model = run.project.models["tiny"]
    train, build = estimate.train_needs(model, run.project.hardware), estimate.build_needs()
    fetch, check = estimate.fetch_needs(model), estimate.check_base_needs()
    direct, render = estimate.direct_needs(model, ["q4_k_m"]), estimate.modelfile_needs(model)
    expected = {
        "build_llama_cpp": [(build.mem_mb, build.runtime, 8)],
        "fetched_check_base_fetch_base": [(max(fetch.mem_mb, check.mem_mb), fetch.runtime + check.runtime, 4)],
        # On a busy machine the first limit may be met before there is anything to go on from.
        "train_adapter_wildcards_tiny": [
            (train.mem_mb, attempt, 8) for attempt, _ in enumerate(run.of("train_adapter_wildcards_tiny"), start=1)
        ],
        "finished_build_direct_render_modelfile": [
            (max(direct.mem_mb, render.mem_mb), direct.runtime + render.runtime, 8),
        ],
    }
    assert {job["Comment"] for job in run.jobs} == {f"rule_{name}" for name in expected}
    for name, attempts in expected.items():
        asked = [
            (megabytes(job["MinMemoryNode"]), minutes(job["TimeLimit"]), int(job["NumCPUs"])) for job in run.of(name)
        ]
        assert asked == attempts, name
    assert {job["Partition"] for job in run.jobs} == {"other"}


@pytest.mark.slow
@pytest.mark.slurm
def test_cards_and_their_devices(run: Run) -> None:
    trainings = run.of("train_adapter_wildcards_tiny")
    for job in run.jobs:
        assert job.get("TresPerJob") == ("gres:gpu:a5000:2" if job in trainings else None)
        assert run.cluster.devices(job) == ({"0,1"} if job in trainings else {""})


@pytest.mark.slow
@pytest.mark.slurm
def test_training_that_met_its_time_limit_goes_on(run: Run) -> None:
    *stopped, last = [job["JobState"] for job in run.of("train_adapter_wildcards_tiny")]
    assert stopped and set(stopped) == {"TIMEOUT"} and last == "COMPLETED"
    assert "SLURM status is: 'TIMEOUT'" in run.said
    log = (run.folder / "logs/tiny/train_adapter.log").read_text(encoding="utf-8")
    went_on = int(re.search(r"going on from the checkpoint at step (\d+)", log)[1])
    assert STOPPED_FROM <= went_on < UPDATES
    steps = json.loads((run.folder / "work/tiny/training.json").read_text(encoding="utf-8"))["steps"]
    assert [step["step"] for step in steps] == list(range(1, UPDATES + 1))


@pytest.mark.slow
@pytest.mark.slurm
def test_results_are_whole_and_light_steps_ran_here(run: Run) -> None:
    paths = ["models/tiny.q4_k_m.gguf", "adapters/tiny"]
    command = [sys.executable, ROOT / "scripts/verify.py", *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=run.folder)
    assert done.returncode == 0, done.stderr
    assert (run.folder / "models/tiny.Modelfile").is_file()
    assert "localrule check_data:" in run.said and (run.folder / "work/tiny/data.json").is_file()


@pytest.mark.slurm
def test_jobs_that_no_node_can_take_are_refused_before_anything_runs(
    cluster: Cluster, tiny_base: Path, tmp_path: Path
) -> None:
    folder = write_project(tmp_path / "project", base=tiny_base)
    before = set(folder.iterdir())
    asked = ["train_adapter:mem_mb=attempt*900000", "merge_adapter:gpu=3", "merge_adapter:gpu_mem_mb=20000"]
    asked += ["smoke_test:gpu=1", "smoke_test:gpu_mem_mb=90000"]
    output = tmp_path / "said"
    targets = ["reports/tiny.smoke.json", "--set-resources", *asked]
    running = cluster.start(folder, *targets, output=output, MODELMILL_GPUS=GPUS)
    assert running.wait(SECONDS) == 1
    said = output.read_text(encoding="utf-8")
    assert "Slurm does not take these jobs of the plan (nothing was run):" in said
    reasons = dict(re.findall(r"^  (.*) \((needs .*)$", said, re.MULTILINE))
    told = {
        "train_adapter tiny": ["needs 900.0 GB of RAM, 8 CPUs", "Memory specification can not be satisfied"],
        "convert_gguf tiny f16 + merge_adapter tiny": [
            "3 × 20.0 GB of GPU (a5000)",
            "node configuration is not available",
        ],
        "smoke_test tiny": ["1 × 90.0 GB of GPU", "no card of MODELMILL_GPUS (a5000, a100) has that memory"],
    }
    assert reasons.keys() == told.keys()
    assert all(word in reasons[job] for job, words in told.items() for word in words), reasons
    assert "Traceback" not in said
    assert {path for path in folder.iterdir() if path.name != ".snakemake"} == before
    # What sbatch refused has a number all the same.
    assert {(job["JobState"], job["RunTime"]) for job in cluster.jobs(folder)} <= {("FAILED", "00:00:00")}


def test_the_profile_takes_its_places_from_the_environment(tiny_base: Path, tmp_path: Path) -> None:
    folder = write_project(tmp_path / "project", base=tiny_base)
    places = {
        "SBATCH_PARTITION": "24h",
        "SBATCH_ACCOUNT": "a-b",
        "MODELMILL_GPU_PARTITION": "gpu",
        "MODELMILL_GPUS": GPUS,
    }
    cards = ["train_adapter:gpu=2", "train_adapter:gpu_mem_mb=26000"]
    options = ["-n", "--workflow-profile", str(ROOT / "profiles/slurm"), "--set-resources", *cards]
    done = run_snakemake(folder, *options, environment=places)
    assert done.returncode == 0, done.stderr
    asked = dict(re.findall(r"rule (\w+):\n(?:.*\n)*?.*resources: (.*)", done.stdout + done.stderr))
    assert all("slurm_account=a-b" in resources for resources in asked.values())
    (train,) = [asked.pop("train_adapter")]
    assert "gpu=2" in train and "gpu_model=a100" in train and "slurm_partition=gpu" in train
    assert len(asked) > 5
    assert all("slurm_partition=24h" in resources and "gpu_model" not in resources for resources in asked.values())


def test_a_list_of_cards_that_is_none(tiny_base: Path, tmp_path: Path) -> None:
    folder = write_project(tmp_path / "project", base=tiny_base)
    done = run_snakemake(folder, "-n", environment={"MODELMILL_GPUS": "a5000:24"})
    assert done.returncode == 1
    assert (
        "MODELMILL_GPUS: expected names and GiB, as in 'a5000=24 a100=80'; found 'a5000:24'"
        in done.stdout + done.stderr
    )
    assert "Traceback" not in done.stdout + done.stderr


def test_cards() -> None:
    cards = cluster_cards("a100=80, a5000=24 a30=24")
    assert cards == {"a100": 80, "a5000": 24, "a30": 24}
    # 24 GiB are 25,770 MB.
    assert [smallest_card(cards, size) for size in (1, 25_769, 25_770, 85_899, 85_900)] == [
        *("a30", "a30", "a100", "a100", None)
    ]
    assert cluster_cards("") == {} and smallest_card({}, 1) is None
    for wrong in ("a5000", "a5000=", "a5000=0", "a5000=-1", "=24", "a5000=24GiB"):
        with pytest.raises(SlurmError, match="MODELMILL_GPUS"):
            cluster_cards(wrong)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a shell script in the place of one of Slurm's programs."""

    def put(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    longest_minutes.cache_clear()
    yield put
    longest_minutes.cache_clear()


@pytest.mark.parametrize(
    ("partition", "expected"),
    [(None, 30), ("day", 1440), ("main", 30), ("short", 1), ("open", float("inf")), ("none", float("inf"))]
    + [("short,week", 10_350)],
)
def test_the_longest_time_of_a_partition(
    partition: str | None, expected: float, program: Callable[[str, str], None]
) -> None:
    told = r"main* 30:00\nday 1-00:00:00\nshort 1:30\nopen infinite\nweek 7-04:30:00\n"
    program("sinfo", f"printf '{told}'")
    assert longest_minutes(partition) == expected


def test_no_time_is_too_long_where_slurm_does_not_answer(program: Callable[[str, str], None]) -> None:
    program("sinfo", "exit 1")
    assert longest_minutes("main") == float("inf")


def test_a_job_that_only_its_test_refuses_is_no_refusal(program: Callable[[str, str], None], tmp_path: Path) -> None:
    program("sbatch", 'case "$*" in *--test-only*) exit 1 ;; *) echo "17;here" ;; esac')
    program("scancel", f'echo "$@" > {tmp_path}/cancelled')
    assert why_refused("sbatch --parsable") is None
    assert (tmp_path / "cancelled").read_text() == "17\n"


def test_a_refusal_in_slurms_words(program: Callable[[str, str], None]) -> None:
    program("sbatch", 'echo "sbatch: error: Too much" >&2; echo "sbatch: error: Batch job refused" >&2; exit 1')
    assert slurm.why_refused("sbatch") == "Too much; Batch job refused"
