"""Measure how well a merged heatmap model finds balls in clips that it was not trained on, and draw what it says."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lib.cli import positive, run_script, script_parser
from lib.clips import read_clips
from lib.console import progress, say
from lib.frames import Moment
from lib.heatmap_evaluation import (
    Evaluated,
    Rules,
    choose_games,
    choose_overlays,
    describe_outcome,
    evaluate,
    report,
)
from lib.heatmap_predictor import Predictor, load_predictor, predict
from lib.jsonfile import write_json
from lib.manifest import describe_files, identify_folder, write_folder_manifest
from lib.options import add_settings
from lib.outputs import finished_folder
from lib.overlays import draw_overlay


def evaluate_heatmap(
    *,
    model: Path,
    clips: Path,
    eval_games: Sequence[str],
    rules: Rules,
    device: str,
    batch_size: int,
    threads: int,
    output: Path,
    overlays: Path | None,
    overlay_count: int,
) -> dict[str, Any]:
    """
    Write the report and, where asked for, pictures.

    Args:
        model: folder of the merged model.
        clips: folder above game1.
        eval_games: names of the games to evaluate on.
        rules: what counts.
        device: cpu or cuda.
        output: JSON file of the report.
        overlays: folder of the pictures.
        overlay_count: how many of them at most.

    Returns:
        The report.

    Raises:
        ClipError, HeatmapError, ManifestError, DeviceError: the clips, model or device cannot be used.
    """
    from lib.heatmap_folder import CONFIG, MERGED, read_heatmap_config

    data = read_clips(clips)
    games = choose_games(data, eval_games)
    read_heatmap_config(model)  # another kind of model says so before its files are hashed
    source = identify_folder(model, None, artifact="merged", names=lambda _: [CONFIG, MERGED], threads=threads)
    predictor = load_predictor(model, device=device, threads=threads)
    total = sum(len(clip.frames) for clip in data if clip.game in games)
    with progress("evaluating", total=total, unit="frames") as bar:
        evaluated = evaluate(predictor, data, games=games, rules=rules, batch_size=batch_size, progress=bar)
    figures = report(evaluated)
    said = {
        "model": {"digest": source["digest"]},
        "games": games,
        "settings": {**asdict(rules), "device": device, "batch_size": batch_size, "threads": threads},
        **figures,
    }
    if overlays:
        said["overlays"] = write_overlays(predictor, evaluated, overlays, count=overlay_count, digest=source["digest"])
    write_json(output, said)
    say(describe(figures, rules))
    say(f"report written to {output}")
    return said


def write_overlays(
    predictor: Predictor, evaluated: Evaluated, folder: Path, *, count: int, digest: str
) -> list[dict[str, Any]]:
    """
    Draw the frames that teach most.

    Returns:
        File, frame, what became of it and error of each picture.
    """
    chosen = choose_overlays(evaluated.outcomes, count)
    drawn: list[dict[str, Any]] = []
    with finished_folder(folder, inputs=[each.moment.frame.path for each in chosen]) as partial:
        # One at a time: heatmaps of a whole evaluation would not fit into memory.
        for number, (outcome, heatmap) in enumerate(
            zip(chosen, _heatmaps(predictor, [each.moment for each in chosen]), strict=True), start=1
        ):
            path = outcome.moment.frame.path
            with Image.open(path) as opened:
                frame = np.array(opened.convert("RGB"))
            picture = draw_overlay(frame, heatmap, outcome.ball, outcome.predicted, describe_outcome(outcome))
            place = "/".join(path.parts[-3:])
            name = f"{number:02d}-{outcome.kind}-{place.rpartition('.')[0].replace('/', '-')}.png"
            Image.fromarray(picture).save(partial / name)
            error = None if outcome.error is None else round(outcome.error, 2)
            drawn.append({"file": name, "frame": place, "kind": outcome.kind, "error": error})
        files = describe_files(partial, [each["file"] for each in drawn], threads=1)
        write_folder_manifest(partial, artifact="overlays", files=files, origin={"merged": {"digest": digest}})
    say(f"{len(drawn)} overlays written to {folder}")
    return drawn


def _heatmaps(predictor: Predictor, moments: Sequence[Moment]) -> Iterator[np.ndarray]:
    return (each.heatmap for each in predict(predictor, moments, batch_size=1))


def describe(figures: dict[str, Any], rules: Rules) -> str:
    """The figures that count, in a line or two."""
    shares = ", ".join(
        f"{name} {'–' if figures[key] is None else format(figures[key], '.3f')}"
        for name, key in (("precision", "precision"), ("recall", "recall"), ("F1", "f1"))
    )
    error, frames = figures["mean_error"], figures["frames"]
    return (
        f"{shares} at {rules.distance:g} pixels; mean error {'–' if error is None else format(error, '.2f')} pixels\n"
        f"{frames['positive']} frames with a ball, {frames['empty']} without "
        f"({figures['without_ball']['false_positives']} false positives there), {frames['left_out']} left out; "
        f"{figures['speed']['model']:g} frames/s, {figures['speed']['with_reading']:g} with reading"
    )


def _work(arguments: argparse.Namespace) -> None:
    evaluate_heatmap(
        model=arguments.model,
        clips=arguments.clips,
        eval_games=arguments.eval_games,
        rules=Rules(
            invisible=arguments.invisible,
            occluded=arguments.occluded,
            threshold=arguments.threshold,
            distance=arguments.distance,
        ),
        device=arguments.device,
        batch_size=arguments.batch_size,
        threads=arguments.threads,
        output=arguments.output,
        overlays=arguments.overlays,
        overlay_count=arguments.overlay_count,
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="merged heatmap model")
    parser.add_argument("--clips", type=Path, required=True, metavar="DIR", help="TrackNet's data: folder above game1")
    add_settings(parser, "clips", without=("path", "synthetic"))
    add_settings(parser, "evaluation")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the model runs")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="frames at a time")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file of the report")
    parser.add_argument("--overlays", type=Path, metavar="DIR", help="folder of pictures")
    parser.add_argument("--overlay-count", type=positive, default=12, metavar="N", help="pictures at most")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
