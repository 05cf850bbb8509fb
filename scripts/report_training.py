"""Report on a training run: its record and a summary as JSON, its curves as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import write_json
from lib.manifest import read_folder_manifest
from lib.outputs import finished_file
from lib.training_report import (
    TrainingReportError,
    describe_run,
    read_history,
    summarize_history,
    write_picture,
)


def report_training(*, history: Path, adapter: Path, title: str, output: Path, picture: Path) -> dict[str, Any]:
    """
    Write the report and the picture of the run that made an adapter.

    Args:
        history: the record that the run left.
        adapter: folder of the adapter with its manifest.
        title: what was trained, for the picture.
        output: the report, JSON.
        picture: PNG file.

    Returns:
        The report: the record, and a `summary`.

    Raises:
        ManifestError: the adapter is not there, or incomplete.
        TrainingReportError: the record is not there, damaged, or another adapter's.
    """
    manifest = read_folder_manifest(adapter, artifact="adapter")
    digest, trained_by = manifest["digest"], "train_heatmap" if "clips" in manifest["origin"] else "train_adapter"
    again = f"train it again with: snakemake -j1 {output} -R {trained_by}"
    if not history.exists():
        raise TrainingReportError(
            f"there is no record of the training of {title} ({history} is missing): it was trained elsewhere, "
            f"or its record was removed; {again}"
        )
    try:
        run, record = read_history(history)
    except TrainingReportError as error:
        raise TrainingReportError(f"{error}\n{again}") from error
    if run.adapter_digest != digest:
        raise TrainingReportError(
            f"{history} is the record of another adapter ({run.adapter_digest[:12]}…) than the one in {adapter} "
            f"({digest[:12]}…); {again}"
        )
    report = {**record, "summary": summarize_history(run)}
    with finished_file(picture) as partial:
        write_picture(run, title=title, path=partial)
    write_json(output, report)
    say(f"{title}: {describe_run(run)}")
    say(f"{output} and {picture} written")
    return report


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--history", type=Path, required=True, metavar="FILE", help="record that the training left")
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="the adapter that was trained")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the report, JSON")
    parser.add_argument("--picture", type=Path, required=True, metavar="FILE", help="the curves, PNG")
    parser.add_argument("--title", required=True, metavar="NAME", help="what was trained, as the picture's title")

    def work(arguments: argparse.Namespace) -> None:
        report_training(
            history=arguments.history,
            adapter=arguments.adapter,
            title=arguments.title,
            output=arguments.output,
            picture=arguments.picture,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
