"""Which type single tensors of a quantized file get, beside what the type of the file says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lib.errors import ModelmillError

# File types with tensors that ggml does not quantize without a matrix (ggml_quantize_requires_imatrix).
NEED_IMATRIX_ALWAYS = frozenset({"iq2_xxs", "iq2_xs", "iq2_s", "iq1_s"})


class TensorTypeError(ModelmillError):
    """A setting of `quantize.tensor_type` that cannot be followed."""


@dataclass(frozen=True)
class TensorTypes:
    """llama-quantize's options of the same names; schemas/config.schema.yaml describes each."""

    pure: bool
    leave_output_tensor: bool
    output_tensor_type: str | None
    token_embedding_type: str | None
    # The first pattern that matches a tensor counts, so their order is a part of what they say.
    tensor_type: Mapping[str, str] = field(metadata={"ordered": True})


def quantizer_options(types: TensorTypes) -> list[str]:
    """The settings as llama-quantize takes them, word by word."""
    words = [f"--{name.replace('_', '-')}" for name in ("pure", "leave_output_tensor") if getattr(types, name)]
    for name in ("output_tensor_type", "token_embedding_type"):
        if (chosen := getattr(types, name)) is not None:
            words += [f"--{name.replace('_', '-')}", chosen]
    for pattern, chosen in types.tensor_type.items():
        words += ["--tensor-type", f"{pattern}={chosen}"]
    return words


def pure_problem(types: TensorTypes, quant: str) -> str | None:
    """Why `pure` cannot be had in a type: llama.cpp stops where its tensors need a matrix that has no entry for one."""
    if not types.pure or quant not in NEED_IMATRIX_ALWAYS:
        return None
    chosen = {"token_embedding_type": types.token_embedding_type, "output_tensor_type": types.output_tensor_type}
    if types.leave_output_tensor:
        del chosen["output_tensor_type"]
    missing = " and ".join(name for name, given in chosen.items() if given is None)
    return f"{quant} cannot hold tensors of which no importance matrix knows; set {missing}" if missing else None


def pattern_problems(patterns: Iterable[str]) -> list[str]:
    """What is wrong with patterns of `tensor_type`, a line each; nothing where llama-quantize takes them as written."""
    return [f"{pattern!r} {problem}" for pattern in patterns if (problem := _pattern_problem(pattern))]


def _pattern_problem(pattern: str) -> str | None:
    if "=" in pattern:
        return "holds a =, at which llama-quantize ends the pattern"
    if pattern != pattern.lower():
        return f"has capital letters, which llama-quantize reads as {pattern.lower()!r}"
    try:
        re.compile(pattern)
    except re.error as error:
        return f"is no valid regular expression: {error}"
    return None


def refuse_unmatched(patterns: Iterable[str], *, names: Iterable[str], source: str) -> None:
    """
    Refuse patterns that llama-quantize would silently have no use for.

    Args:
        patterns: of `tensor_type`.
        names: of the tensors.
        source: what has these tensors, for the message.

    Raises:
        TensorTypeError: naming every pattern that matches no tensor.
    """
    known = sorted(names)
    if lost := [pattern for pattern in patterns if not any(re.search(pattern, name) for name in known)]:
        shown = ", ".join(map(repr, lost))
        layer = [name for name in known if not name.startswith("blk.") or name.startswith("blk.0.")]
        raise TensorTypeError(
            f"quantize.tensor_type: no tensor of {source} matches {shown}; beside further layers it has:\n"
            + "\n".join(f"  {name}" for name in layer)
        )
