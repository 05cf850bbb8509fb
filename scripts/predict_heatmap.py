"""Find the ball in clips: a table of its places, by a merged heatmap model or by its ONNX file."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lib.cli import positive, run_script, script_parser
from lib.clips import COLUMNS, EASY, NO_BALL, Clip, ClipError, Frame, by_number
from lib.console import progress, say
from lib.frames import list_moments
from lib.heatmap_peaks import Peak, highest_places, place_peak
from lib.heatmap_predictor import Prediction, Predictor, load_predictor, predict
from lib.options import add_setting
from lib.outputs import finished_file

PICTURES = (".jpg", ".jpeg", ".png")
STDOUT = Path("-")
# TrackNet's columns first, so that the table of one clip, as its Label.csv, is data like any other.
HEADER = (*COLUMNS, "clip", "score")


def predict_heatmap(
    *, clips: Sequence[Path], model: Path, output: Path, threshold: float, device: str, batch_size: int, threads: int
) -> int:
    """
    Write a row for each frame.

    Args:
        clips: folders of frames.
        model: folder of a merged model, or its ONNX file, for which torch is not needed.
        output: CSV file; `-` is standard output.
        threshold: the least score of a ball.
        device: cpu or cuda.

    Returns:
        The number of frames with a ball.

    Raises:
        ClipError: a folder has no frames, or one cannot be read.
        HeatmapError, OnnxFileError, DeviceError: the model or device cannot be used.
    """
    read = [list_frames(folder) for folder in clips]  # before the model is loaded: mistakes are told at once
    predictor = load_predictor(model, device=device, threads=threads)
    with _opened(output) as file:
        found = _write(file, predictor, read, threshold=threshold, batch_size=batch_size)
    total = sum(len(clip.frames) for clip in read)
    say(f"found a ball in {found} of {total} frames" + ("" if output == STDOUT else f", written to {output}"))
    return found


@contextmanager
def _opened(output: Path) -> Iterator[TextIO]:
    if output == STDOUT:
        yield sys.stdout
        return
    with finished_file(output) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        yield file


def list_frames(folder: Path) -> Clip:
    """
    The pictures of a folder as a clip, in the order of their numbers and names.

    Raises:
        ClipError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise ClipError(f"{folder} is no folder: name the folder of a clip's frames")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file()]
    if not paths:
        below = sorted(path.parent.name for path in folder.glob("*/*") if path.suffix.lower() in PICTURES)
        hint = f"; there are frames in {folder / below[0]}" if below else ""
        raise ClipError(f"{folder} has no frames ({', '.join(PICTURES)}){hint}")
    paths.sort(key=lambda path: by_number([path.name]))
    # Whether there is a ball is what is asked.
    return Clip("", str(folder), tuple(Frame(path, NO_BALL, ball=None, status=None) for path in paths))


def _write(file: TextIO, predictor: Predictor, clips: Sequence[Clip], *, threshold: float, batch_size: int) -> int:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(HEADER)
    found = 0
    with progress("looking for the ball", total=sum(len(clip.frames) for clip in clips), unit="frames") as bar:
        for clip, prediction in _predictions(predictor, clips, batch_size=batch_size):
            peak, score = _locate(prediction, threshold)
            found += peak is not None
            # Labels start at 0, the middle of the first pixel, while a peak may lie half a pixel before it.
            place = ("", "") if peak is None else tuple(f"{max(0.0, at):.2f}" for at in (peak.x, peak.y))
            name = prediction.moment.frame.path.name
            rows.writerow([name, NO_BALL if peak is None else EASY, *place, "", clip.name, f"{score:.4f}"])
            bar.advance()
    return found


def _predictions(predictor: Predictor, clips: Iterable[Clip], *, batch_size: int) -> Iterator[tuple[Clip, Prediction]]:
    for clip in clips:
        moments = list_moments([clip], games=[clip.game], frames=predictor.frames)
        for prediction in predict(predictor, moments, batch_size=batch_size):
            yield clip, prediction


def _locate(prediction: Prediction, threshold: float) -> tuple[Peak | None, float]:
    highest = highest_places(prediction.heatmap[None])[0]
    rows, columns = prediction.heatmap.shape
    peak = place_peak(highest, heatmap_size=(columns, rows), frame_size=prediction.size, threshold=threshold)
    return peak, float(highest[2])


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("clips", type=Path, nargs="+", metavar="CLIP", help="folder of frames, JPEG or PNG")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR|FILE", help="merged model, or its .onnx")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="CSV file; - for standard output")
    add_setting(parser, "evaluation", "threshold")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the model runs")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="frames at a time")

    def work(arguments: argparse.Namespace) -> None:
        predict_heatmap(
            clips=arguments.clips,
            model=arguments.model,
            output=arguments.output,
            threshold=arguments.threshold,
            device=arguments.device,
            batch_size=arguments.batch_size,
            threads=arguments.threads,
        )

    run_script(parser, work, outputs=lambda arguments: [] if arguments.output == STDOUT else [arguments.output])


if __name__ == "__main__":
    main()
