"""Print what was built of a model: where, how large, how long it took, and how to run it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lib.cli import run_script, script_parser
from lib.errors import ModelmillError
from lib.jsonfile import read_json


class SummaryError(ModelmillError):
    """There is nothing to summarize."""


def summarize_build(*, model: str, folder: Path) -> str:
    """
    The summary as text of at most 80 columns, where file names allow it.

    Args:
        model: name of the model.
        folder: where `models/`, `reports/` and `logs/` lie.

    Raises:
        SummaryError: nothing of that model was built.
    """
    artifacts = [
        folder / "adapters" / model,
        folder / "models" / model / "merged",
        *sorted((folder / "models").glob(f"{model}.*.gguf")),
        folder / "models" / f"{model}.Modelfile",
        *sorted((folder / "models").glob(f"{model}.*.Modelfile")),
        folder / "models" / f"{model}.onnx",
    ]
    there = [path for path in artifacts if path.exists()]
    if not there:
        raise SummaryError(f"nothing of {model} is built in {folder.resolve()}")
    steps = _step_seconds(folder, model)
    lines = [f"\n{model}: built in {_duration(sum(steps.values()))}" if steps else f"\n{model}: built"]
    lines += [f"  {_size(path):>9}  {path.relative_to(folder)}" for path in there]
    if steps:
        lines += ["steps:", *(f"  {_duration(seconds):>9}  {name}" for name, seconds in steps.items())]
    lines += _describe_answers(folder / "reports" / f"{model}.smoke.json")
    lines += _describe_documents(folder / "reports" / f"{model}.rag.json")
    lines += _describe_balls(folder / "reports" / f"{model}.eval.json", folder)
    modelfile = folder / "models" / f"{model}.Modelfile"
    if registered := _registered_as(folder, model):
        lines += ["to talk to it, where it is registered with Ollama:", f"  ollama run {registered}"]
    elif modelfile.is_file():
        lines += ["to talk to it with Ollama:", f"  ollama create {model} -f {modelfile.relative_to(folder)}"]
        lines += [f"  ollama run {model}"]
    return "\n".join(lines)


def _registered_as(folder: Path, model: str) -> str | None:
    """What the model is called in Ollama, if what is registered there are weights that lie here."""
    receipt = folder / "ollama" / f"{model}.json"
    if not receipt.is_file():
        return None
    registered = read_json(receipt)
    here = {read_json(each)["sha256"] for each in (folder / "models").glob(f"{model}.*.gguf.json")}
    return registered["name"] if registered["weights"]["sha256"] in here else None


def _step_seconds(folder: Path, model: str) -> dict[str, float]:
    """Wall-clock seconds of each step by its benchmark file, in the order in which they ended."""
    files = [*(folder / "logs" / model).glob("*.jsonl")]
    if any((folder / "models").glob(f"{model}.*.gguf")):
        files += (folder / "logs").glob("build_llama_cpp.jsonl")
    ended = sorted(files, key=lambda path: path.stat().st_mtime)
    return {path.stem: json.loads(path.read_text().splitlines()[-1])["s"] for path in ended}


def _describe_answers(report: Path) -> list[str]:
    if not report.is_file():
        return []
    smoke = read_json(report)
    right, asked = smoke["right"], smoke["asked"]
    lines = [f"held-out questions answered rightly: {right['tuned']} of {asked}, before tuning {right['base']}"]
    example = next((row for row in smoke["questions"] if row["tuned"]["right"] and not row["base"]["right"]), None)
    if example:
        lines += [f"  question  {example['question']}"]
        lines += [f"  before    {_one_line(example['base']['answer'])}"]
        lines += [f"  after     {_one_line(example['tuned']['answer'])}"]
    return lines


def _describe_documents(report: Path) -> list[str]:
    if not report.is_file():
        return []
    rag = read_json(report)
    example = next((row for row in rag["questions"] if row["with"]["right"] and not row["without"]["right"]), None)
    right = rag["right"]
    lines = [f"questions answered from documents: {right['with']} of {rag['asked']}, without them {right['without']}"]
    if example:
        lines += [f"  question  {example['question']}"]
        lines += [f"  answer    {_one_line(example['with']['answer'])}"]
        lines += [f"  source    {example['passages'][0]['source']}"]
    return lines


def _describe_balls(report: Path, folder: Path) -> list[str]:
    if not report.is_file():
        return []
    found, model = read_json(report), report.name.removesuffix(".eval.json")
    error = "" if found["mean_error"] is None else f", {found['mean_error']:.1f} pixels off"
    lines = [
        f"balls found on held-out clips: F1 {found['f1'] or 0:.3f} at {found['settings']['distance']:g} pixels{error}"
    ]
    lines += [f"  pictures  {folder / 'reports' / f'{model}.overlays'}"] if found.get("overlays") else []
    return [
        *lines,
        "to find balls in frames of yours:",
        f"  python scripts/predict_heatmap.py --model models/{model}.onnx --output balls.csv FOLDER",
    ]


def _one_line(text: str) -> str:
    folded = " ".join(text.split())
    return folded if len(folded) <= 66 else folded[:65] + "…"


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    size = sum(file.stat().st_size for file in files)
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} B"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--model", required=True, help="name of the model")
    parser.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="where it was built")

    def work(arguments: argparse.Namespace) -> None:
        print(summarize_build(model=arguments.model, folder=arguments.folder))

    run_script(parser, work)


if __name__ == "__main__":
    main()
