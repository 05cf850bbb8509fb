"""What quantizing and merging cost a model: the report's content, its table, and its limits."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

from lib.calibration import CHUNK_TOKENS
from lib.provenance import BASE_WEIGHTS
from lib.quant_types import BITS_PER_WEIGHT, IGNORE_IMATRIX, NEED_IMATRIX

# How a file is made otherwise than the model's own, in names of files: without its importance matrix, or with that of
# the general text.
PLAIN, GENERAL = "-plain", "-general"
VARIANTS = ("", PLAIN, GENERAL)
NO_MATRIX = "none"
BETTER, WORSE = "the tuned model predicts them better", "the tuned model predicts them worse than its base"
NO_DIFFERENCE = "no difference that could not be chance"
FIGURES = ("perplexity", "perplexity_ratio", "mean_kld", "kld_999", "top1")
JUDGED_TOKENS = CHUNK_TOKENS - 1 - CHUNK_TOKENS // 2


@dataclass(frozen=True)
class Matrices:
    """
    What the importance matrices of a model are computed from, in words.

    Attributes:
        own: by quantize.imatrix; None without one.
        general: by quality.general_text.
    """

    own: str | None
    general: str | None

    def variants(self, quant: str) -> list[str]:
        """The ways in which a file of that type is made and compared."""
        if self.own is None or quant in IGNORE_IMATRIX:
            return [""]
        plain = [] if quant in NEED_IMATRIX else [PLAIN]
        return ["", *plain, *([GENERAL] if self.general else [])]

    def describe(self, quant: str, variant: str) -> str:
        """The matrix that such a file is made with."""
        if quant in IGNORE_IMATRIX or variant == PLAIN:
            return NO_MATRIX
        return (self.general if variant == GENERAL else self.own) or NO_MATRIX


def add_matrices(parser: argparse.ArgumentParser) -> None:
    """The options of `matrices_from`."""
    parser.add_argument(
        "--matrix", metavar="TEXT", help="what the model's importance matrix is computed from, in words"
    )
    parser.add_argument("--general-matrix", metavar="TEXT", help="likewise that of the variant `general`")


def matrices_from(arguments: argparse.Namespace) -> Matrices:
    """What the options of `add_matrices` say."""
    return Matrices(arguments.matrix, arguments.general_matrix)


def describe_types(types: Mapping[str, Any], matrices: Matrices) -> list[dict[str, Any]]:
    """The figures of each type that measure_types.py wrote, with the matrix that it was made with; large ones first."""
    rows = [{**row, "matrix": matrices.describe(row["type"], row["variant"])} for row in types["types"]]
    return sorted(rows, key=lambda row: (-BITS_PER_WEIGHT[row["type"]], row["type"], VARIANTS.index(row["variant"])))


def compose(
    *,
    model: str,
    types: Mapping[str, Any],
    matrices: Matrices,
    merges: Mapping[str, Any] | None,
    tuning: Mapping[str, Any] | None,
    chosen: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    The report.

    Args:
        model: its name.
        types: what measure_types.py found.
        matrices: which importance matrices the types were made with.
        merges: what compare_merges.py found; None where that was not asked for.
        tuning: what measure_tuning.py found; None where no training data are held out.
        chosen: what choose_type.py wrote; None where the types are named.
    """
    reference = types["reference"]
    report = {
        "model": model,
        "text": types["text"],
        "chunks": reference["chunks"],
        "tokens": reference["chunks"] * JUDGED_TOKENS,
        "reference": reference,
        "types": describe_types(types, matrices),
        "base_weights": None,
        "tuning": None,
        "chosen": chosen and {"type": chosen["type"], "budget": chosen["budget"]},
    }
    if merges:
        each = {weights: {key: merges[weights][key] for key in FIGURES} for weights in BASE_WEIGHTS}
        report["base_weights"] = {**each, "nearer": min(each, key=lambda weights: each[weights]["mean_kld"])}
    if tuning and "reason" in tuning:
        report["tuning"] = tuning
    elif tuning:
        ratio = tuning["tuned"]["perplexity"] / tuning["base"]["perplexity"]
        report["tuning"] = {**tuning, "perplexity_ratio": round(ratio, 6), "verdict": _verdict(tuning)}
    return report


def _verdict(tuning: Mapping[str, Any]) -> str:
    """BETTER, WORSE, or NO_DIFFERENCE where that is within both standard errors."""
    base, tuned = tuning["base"], tuning["tuned"]
    if abs(tuned["perplexity"] - base["perplexity"]) <= hypot(base["error"], tuned["error"]):
        return NO_DIFFERENCE
    return BETTER if tuned["perplexity"] < base["perplexity"] else WORSE


def write_table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    reference = report["reference"]
    lines = ["| type | importance matrix | MB | perplexity | mean KLD | 99.9 % KLD | same top token |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    lines.append(f"| {type_of(reference)} | | {reference['size'] / 1e6:,.1f} | {reference['perplexity']:.3f} | | | |")
    lines += [
        f"| {row['type']} | {row['matrix']} | {row['size'] / 1e6:,.1f} | {row['perplexity']:.3f} | "
        f"{row['mean_kld']:.5f} | {row['kld_999']:.3f} | {row['top1']:.2%} |"
        for row in report["types"]
    ]
    return "\n".join([*lines, *("\n" + line for line in describe_rest(report))])


def describe_rest(report: Mapping[str, Any]) -> Iterator[str]:
    """What the report says beside its table, in sentences."""
    if chosen := report["chosen"]:
        yield f"Built as auto: {chosen['type']}, the nearest to the 16-bit file of what fits {chosen['budget']}."
    yield from describe_tuning(report)
    yield from describe_merges(report)


def describe_tuning(report: Mapping[str, Any]) -> Iterator[str]:
    """What tuning brought, in a sentence."""
    tuning = report["tuning"]
    if not tuning:
        return
    samples = f"{tuning['samples']} sample{'s' * (tuning['samples'] != 1)}"
    if "reason" in tuning:
        remedy = "hold out more by adapter.train.eval_data or eval_fraction"
        yield f"The held-out training data ({samples}) do not show what tuning brought: {tuning['reason']}; {remedy}."
    else:
        base, tuned = (f"{tuning[role]['perplexity']:.2f} ± {tuning[role]['error']:.2f}" for role in ("base", "tuned"))
        yield (
            f"Perplexity of the held-out training data ({samples}, {type_of(tuning['tuned'])}): "
            f"{base} before tuning, {tuned} after; {tuning['verdict']}."
        )


def describe_merges(report: Mapping[str, Any]) -> Iterator[str]:
    """Which merge is nearer to the model as it was trained, in a sentence."""
    if merges := report["base_weights"]:
        each = [
            f"{merges[weights]['mean_kld']:.5f} nats ({merges[weights]['top1']:.2%} same top token) merged into {name}"
            for weights, name in BASE_WEIGHTS.items()
        ]
        yield f"Away from the model as it was trained: {', '.join(each)}; nearer: {merges['nearer']}."


def type_of(gguf: Mapping[str, Any]) -> str:
    """The type in a file's name."""
    return str(gguf["name"]).removesuffix(".gguf").rpartition(".")[2]


# By the setting: the figure that it limits, and whether that may be no larger than the limit.
LIMITS = {
    "max_kld": ("mean_kld", True),
    "min_top1": ("top1", False),
    "max_perplexity_ratio": ("perplexity_ratio", True),
}


def outside(row: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    """What of a type's figures is outside of the limits, in words."""
    told = []
    for key, limit in limits.items():
        figure, largest = LIMITS[key]
        if (row[figure] > limit) if largest else (row[figure] < limit):
            told.append(f"{figure} {row[figure]:g}, quality.{key} is {limit:g}")
    return told


def refused(
    rows: Sequence[Mapping[str, Any]], types: list[str], limits: Mapping[str, float], *, is_auto: bool = False
) -> list[str]:
    """
    The types that are not within the limits, a line each, and what to try.

    Args:
        rows: see describe_types.
        types: those that are built for use; others were only compared.
        is_auto: whether they were chosen by quantize.budget.
    """
    own = {row["type"]: row for row in rows if not row["variant"]}
    bad = {quant: told for quant in types if quant in own and (told := outside(own[quant], limits))}
    if not bad:
        return []
    lines = [f"{quant}: {'; '.join(told)}" for quant, told in bad.items()]
    good = [quant for quant, row in own.items() if quant not in bad and not outside(row, limits)]
    smallest = min(good, key=lambda quant: own[quant]["size"], default=None)
    # More bits are not always better: what is within the limits may be the smaller one.
    larger = smallest is None or own[smallest]["size"] > max(own[quant]["size"] for quant in bad)
    named = f" ({smallest} is within the limits)" if smallest else ""
    setting = "quantize.budget: room for" if is_auto and larger and "q8_0" not in bad else "quantize.types:"
    tries = [f"{setting} {'a larger' if larger else 'another'} type{named}"]
    if any(own[quant]["matrix"] == NO_MATRIX and quant not in IGNORE_IMATRIX for quant in bad):
        tries.append("quantize.imatrix.text: an importance matrix")
    tries.append("quantize.leave_output_tensor: true")
    return [*lines, f"try {', or '.join(tries)}"]
