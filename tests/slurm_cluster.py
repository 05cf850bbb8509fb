"""The cluster that tests/slurm_cluster.sh starts, as the tests see it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

FOLDER = Path(os.environ.get("MODELMILL_SLURM", "/run/modelmill-slurm"))
# CI sets this, lest the tests be skipped there without anybody's noticing.
REQUIRED = "MODELMILL_REQUIRE_SLURM"
OPTIONS = ("--slurm-status-command=squeue", "--slurm-init-seconds-before-status-checks=1")
# The plugin waits ten seconds longer before each look at its jobs, after a failed job too; here Snakemake looks every
# second.
IMPATIENT = """
import asyncio
from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

async def sleep(self):
    await asyncio.sleep(1)

RemoteExecutor.sleep = sleep
main()
"""


@dataclass(frozen=True)
class Cluster:
    """A running cluster; `environment` is that of its users."""

    environment: dict[str, str]

    def tool(self, *command: str) -> str:
        """What one of Slurm's programs prints."""
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=self.environment)
        return done.stdout

    def start(self, folder: Path, *arguments: str, output: Path, **environment: str) -> subprocess.Popen[bytes]:
        """
        Start the workflow in a folder, as `snakemake --workflow-profile profiles/slurm ARGUMENTS`.

        Args:
            output: file that takes all it writes.
            environment: variables added to those of the cluster's users.
        """
        command = [sys.executable, "-c", IMPATIENT, "-s", ROOT / "Snakefile", "--directory", folder, *OPTIONS]
        command += ["--workflow-profile", ROOT / "profiles/slurm", *arguments]
        with output.open("wb") as file:
            return subprocess.Popen(
                command, stdout=file, stderr=file, cwd=folder, env={**self.environment, **environment}
            )

    def end(self, running: subprocess.Popen[bytes], folder: Path) -> None:
        """End a run that is not over, with its jobs."""
        if running.poll() is None:
            running.kill()
            self.tool("scancel", "--quiet", *(job["JobId"] for job in self.jobs(folder)))

    def jobs(self, folder: Path) -> list[dict[str, str]]:
        """All jobs that were submitted from a folder, as scontrol shows them, in their order."""
        shown = self.tool("scontrol", "--details", "--oneliner", "show", "job").splitlines()
        jobs = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in shown]
        return sorted((job for job in jobs if job.get("WorkDir") == str(folder)), key=lambda job: int(job["JobId"]))

    def devices(self, job: dict[str, str]) -> set[str]:
        """CUDA_VISIBLE_DEVICES of a job's tasks."""
        steps = [line.split(" ") for line in (FOLDER / "devices").read_text().splitlines()]
        return {devices for number, _, devices in steps if number == job["JobId"]}


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The cluster, if it is there; else the test is skipped, or fails where it has to be."""
    script = ROOT / "tests/slurm_cluster.sh"
    status = subprocess.run([script, "status"], capture_output=True, text=True)
    if status.returncode or not shutil.which("sbatch"):
        reason = f"no Slurm to try: `sudo {script.relative_to(ROOT)} start` makes one of Debian's slurm-wlm and munge"
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set, and there is {reason}; {status.stderr}")
        pytest.skip(f"there is {reason}")
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "MODELMILL_GPU"))
    }
    return Cluster({**kept, "SLURM_CONF": str(FOLDER / "slurm.conf"), "PATH": f"{FOLDER}/bin:{os.environ['PATH']}"})
