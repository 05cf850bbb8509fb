"""Check artifacts against their manifests, their own metadata and what they were made from, also after copying."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lib.artifact import NoArtifactError, find_artifact
from lib.cli import UsageError, run_script, script_parser
from lib.console import say
from lib.errors import ModelmillError
from lib.verification import check_artifact


class VerificationError(ModelmillError):
    """Something is not what its manifest says."""


def verify(*, paths: Sequence[Path], manifest: Path | None, threads: int) -> None:
    """
    Tell of each artifact what it is, what it was made from, and `ok` or what is wrong.

    Args:
        paths: folders, GGUF files, manifests or Modelfiles; the same artifact is checked once.
        manifest: of the only path, a folder whose manifest is kept elsewhere.
        threads: for hashing.

    Raises:
        UsageError: before any work, if a path leads to nothing that can be checked.
        VerificationError: after all of it, if anything is wrong.
    """
    artifacts, wrong = {}, []
    for path in paths:
        try:
            found = find_artifact(path, manifest=manifest)
            artifacts.setdefault((found.path, found.manifest), found)
        except NoArtifactError as error:
            wrong.append(str(error))
    if wrong:
        raise UsageError("\n".join(wrong))
    failed = []
    for artifact in artifacts.values():
        report = check_artifact(artifact, threads=threads)
        for line in report.text():
            say(line)
        failed += [artifact] if report.problems else []
    if failed:
        raise VerificationError(f"{len(failed)} of {len(artifacts)} checked did not pass")


def _work(arguments: argparse.Namespace) -> None:
    if arguments.manifest and len(arguments.paths) != 1:
        raise UsageError("--manifest is of one folder: give that alone")
    verify(paths=arguments.paths, manifest=arguments.manifest, threads=arguments.threads)


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="artifact's folder, GGUF file, manifest or Modelfile"
    )
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="the folder's manifest, if not in that folder")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
