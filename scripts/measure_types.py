"""Measure how far each quantized type of a model is from the 16-bit file that it was made from, on a text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.calibration import identify_text
from lib.cli import UsageError, run_script, script_parser
from lib.code import code_digest
from lib.console import say
from lib.imatrix import identify_imatrix
from lib.jsonfile import read_json, write_json
from lib.llama_cpp import add_llama_cpp_options, llama_cpp_from, llama_cpp_words
from lib.manifest import read_file_manifest
from lib.options import add_setting, add_settings, option_words, settings_from
from lib.outputs import scratch_beside
from lib.perplexity import Evaluator
from lib.process import run_program
from lib.quality_report import GENERAL, VARIANTS
from lib.quant_types import IGNORE_IMATRIX, QUANTIZED_TYPES
from lib.tensor_types import TensorTypes
from lib.typed import build, plain

SCRIPTS = Path(__file__).parent
LOGITS, MATRIX, CANDIDATE = "reference.logits", "general.imatrix.gguf", "candidate.gguf"


@dataclass(frozen=True)
class Candidate:
    """
    A file that is compared.

    Attributes:
        gguf: where it is; None for one that is made for the comparison alone.
        variant: how it is made, see lib.quality_report.
    """

    quant: str
    variant: str
    gguf: Path | None

    @property
    def name(self) -> str:
        """As in q4_k_m-plain."""
        return f"{self.quant}{self.variant}"


@dataclass(frozen=True)
class Recipe:
    """
    How files are made that are there for the comparison alone.

    Attributes:
        tensor_types: as those of the model's own types.
        imatrix: the model's importance matrix, which its own types are made with.
        general_text: what the matrix of the variant `general` is computed from, and by how many chunks.
        llama_cpp: options that name it.
    """

    tensor_types: TensorTypes
    imatrix: Path | None
    general_text: Path | None
    general_chunks: int
    llama_cpp: Sequence[str]

    def identify(self, candidate: Candidate) -> dict[str, Any]:
        """What decides about such a file beside the 16-bit one."""
        made: dict[str, Any] = {"settings": plain(self.tensor_types), "code": code_digest("quantize_gguf.py")}
        if candidate.variant == GENERAL and self.general_text:
            made |= {"text": identify_text(self.general_text), "chunks": self.general_chunks}
        elif self._matrix(candidate):
            made |= {"imatrix": identify_imatrix(self._matrix(candidate))}
        return made

    def make(self, candidate: Candidate, reference: Path, folder: Path) -> Path:
        """
        Make it in a folder, which holds the matrix once that was computed.

        Raises:
            ProgramError: a script failed.
        """
        matrix, made = folder / MATRIX, folder / CANDIDATE
        shared = [f"--source={reference}", *self.llama_cpp]
        if candidate.variant == GENERAL and not matrix.exists():
            words = [f"--text={self.general_text}", f"--chunks={self.general_chunks}", f"--output={matrix}"]
            _run("compute_imatrix.py", *shared, *words)
        own = matrix if candidate.variant == GENERAL else self._matrix(candidate)
        words = [f"--imatrix={own}"] if own else []
        _run("quantize_gguf.py", *shared, f"--quant={candidate.quant}", f"--output={made}", *words, *self._settings())
        return made

    def _matrix(self, candidate: Candidate) -> Path | None:
        """The model's own matrix, for a type that is as the model's own would be."""
        ignored = IGNORE_IMATRIX.issuperset([candidate.quant, *self.tensor_types.tensor_type.values()])
        return None if candidate.variant or ignored else self.imatrix

    def _settings(self) -> list[str]:
        return list(option_words(self.tensor_types))


def measure_types(
    *,
    reference: Path,
    candidates: Sequence[Candidate],
    recipe: Recipe,
    text: Path,
    chunks: int,
    known: Path,
    output: Path,
    evaluator: Evaluator,
) -> dict[str, Any]:
    """
    Compare all candidates with the 16-bit file; what was measured of the same files before is not measured again.

    Args:
        reference: the 16-bit GGUF with its manifest.
        candidates: what is compared with it.
        recipe: how those are made that are not there.
        text: UTF-8 text, of which `chunks` are judged if it has as many.
        known: folder of the figures of each file, which a run that was broken off goes on from.

    Returns:
        The figures: text, reference with its perplexity, and of each type those of a Divergence.

    Raises:
        ManifestError: a file is not whole.
        CalibrationError, QualityError, LogitsError, ProgramError: the text cannot be used, or a program failed.
    """
    judged = {"text": identify_text(text), "chunks": chunks, "llama_cpp": evaluator.llama_cpp.commit}
    setup = {"reference": read_file_manifest(reference)["sha256"], **judged, "code": code_digest("measure_types.py")}
    of_each = {candidate: {**setup, "file": _identity(candidate, recipe)} for candidate in candidates}
    found = {candidate: _known(known, candidate.name, of) for candidate, of in of_each.items()}
    said = _known(known, "reference", setup)
    missing = [candidate for candidate, figures in found.items() if figures is None]
    if missing or said is None:
        with scratch_beside(output) as folder:
            say(f"judging {reference} by {text}")
            logits = folder / LOGITS
            judgement = asdict(evaluator.perplexity(reference, text, chunks=chunks, logits=logits))
            said = _keep(known, "reference", setup, {**_facts(reference), **judgement})
            say(f"perplexity {said['perplexity']:.4f} ± {said['error']:.4f} over {said['chunks']} of {chunks} chunks")
            for candidate in missing:
                gguf = candidate.gguf or recipe.make(candidate, reference, folder)
                figures = {**_facts(gguf), **asdict(evaluator.divergence(gguf, logits))}
                found[candidate] = _keep(known, candidate.name, of_each[candidate], figures)
                if candidate.gguf is None:
                    gguf.unlink()  # the next one needs the room
                _say_figures(candidate, figures)
    types = [
        {"type": candidate.quant, "variant": candidate.variant, **(figures or {})}
        for candidate, figures in found.items()
    ]
    report = {"text": judged["text"], "reference": said, "types": types}
    write_json(output, report)
    _forget(known, {"reference", *(candidate.name for candidate in candidates)})
    return report


def _identity(candidate: Candidate, recipe: Recipe) -> Any:
    return read_file_manifest(candidate.gguf)["sha256"] if candidate.gguf else recipe.identify(candidate)


def _facts(gguf: Path) -> dict[str, Any]:
    return {key: value for key, value in read_file_manifest(gguf).items() if key in ("name", "size", "sha256")}


def _known(folder: Path, name: str, of: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was measured of these very files; None if nothing was."""
    path = folder / f"{name}.json"
    try:
        held = read_json(path)
    except (OSError, ValueError):
        return None
    return held["figures"] if isinstance(held, dict) and held.get("of") == of else None


def _keep(folder: Path, name: str, of: Mapping[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    write_json(folder / f"{name}.json", {"of": of, "figures": figures})
    return figures


def _forget(folder: Path, names: set[str]) -> None:
    for path in folder.glob("*.json"):
        if path.stem not in names:
            path.unlink()


def _say_figures(candidate: Candidate, figures: Mapping[str, Any]) -> None:
    say(
        f"{candidate.name}: mean divergence {figures['mean_kld']:.5f} nats, 99.9 % below {figures['kld_999']:.4f}, the "
        f"likeliest token the same at {figures['top1']:.2%}, perplexity × {figures['perplexity_ratio']:.4f}"
    )


def _run(script: str, *words: str) -> None:
    run_program([sys.executable, str(SCRIPTS / script), *words], follow=say)


def _candidates(words: Sequence[str]) -> list[Candidate]:
    """TYPE=FILE, or TYPE alone or with a variant, as in q4_k_m-plain."""
    found = []
    for word in words:
        name, _, path = word.partition("=")
        quant, dash, rest = name.partition("-")
        if quant not in QUANTIZED_TYPES or dash + rest not in VARIANTS or (path and rest):
            raise UsageError(f"--types {word}: expected TYPE=FILE, TYPE, TYPE-plain or TYPE-general")
        found.append(Candidate(quant, dash + rest, Path(path) if path else None))
    return found


def _work(arguments: argparse.Namespace) -> None:
    candidates = _candidates(arguments.types)
    if arguments.general_text is None and any(candidate.variant == GENERAL for candidate in candidates):
        raise UsageError("--general-text: name the text that the matrix of TYPE-general is computed from")
    llama_cpp = llama_cpp_from(arguments, tools=("llama-perplexity", "llama-quantize"))
    recipe = Recipe(
        tensor_types=build(TensorTypes, settings_from(arguments, "quantize")),
        imatrix=arguments.imatrix,
        general_text=arguments.general_text and Path(arguments.general_text),
        general_chunks=arguments.general_chunks,
        llama_cpp=[f"--threads={arguments.threads}", *llama_cpp_words(arguments)],
    )
    measure_types(
        reference=arguments.reference,
        candidates=candidates,
        recipe=recipe,
        text=Path(arguments.text),
        chunks=arguments.chunks,
        known=arguments.known,
        output=arguments.output,
        evaluator=Evaluator(llama_cpp, arguments.threads, gpu=arguments.device == "cuda"),
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--reference", type=Path, required=True, metavar="FILE", help="the 16-bit GGUF")
    parser.add_argument(
        "--types",
        nargs="+",
        required=True,
        metavar="TYPE=FILE",
        help="what is compared with it; TYPE alone, TYPE-plain and TYPE-general are made: as the model's own, without "
        "importance matrix, and with that of the general text",
    )
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="the model's importance matrix, for a TYPE alone")
    parser.add_argument("--known", type=Path, required=True, metavar="DIR", help="folder of the figures of each file")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="all figures, JSON")
    for name in ("text", "chunks", "general_text", "device"):
        add_setting(parser, "quality", name, required=name == "text")
    parser.add_argument("--general-chunks", type=int, default=100, metavar="N", help="of the general text")
    add_settings(parser, "quantize", without=("types", "path", "imatrix", "budget"))
    add_llama_cpp_options(parser)
    run_script(parser, _work)


if __name__ == "__main__":
    main()
