"""Ollama's Modelfile: what stands in it and how its values are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lib.errors import ModelmillError

FENCE = '"""'


class ModelfileError(ModelmillError):
    """A value cannot be written into a Modelfile."""


def render_modelfile(
    *, gguf_name: str, template: str | None, system: str | None, parameters: Mapping[str, Any], stops: list[str]
) -> str:
    """
    The text of a Modelfile.

    Args:
        gguf_name: file name of the weights, beside the Modelfile.
        template: Ollama's TEMPLATE; without one it uses the chat template inside the GGUF.
        system: system prompt.
        parameters: Ollama's PARAMETERs; `stop` adds to `stops`.
        stops: texts that end an answer.

    Raises:
        ModelfileError: a text that the grammar cannot hold.
    """
    lines = [f"FROM ./{gguf_name}"]
    if template is not None:
        lines.append(f"TEMPLATE {_quoted(template, where='TEMPLATE')}")
    lines += _parameter_lines(parameters, stops)
    if system is not None:
        lines.append(f"SYSTEM {_quoted(system, where='ollama.system')}")
    return "\n".join(lines) + "\n"


def named_weights(text: str) -> str | None:
    """What a Modelfile's FROM names: a file beside it, or a model of Ollama's."""
    lines = (line.split(maxsplit=1) for line in text.splitlines())
    return next((words[1].strip() for words in lines if len(words) == 2 and words[0].upper() == "FROM"), None)


def _parameter_lines(parameters: Mapping[str, Any], stops: list[str]) -> Iterator[str]:
    for name, value in sorted(parameters.items()):
        if name != "stop":
            yield f"PARAMETER {name} {str(value).lower() if isinstance(value, bool) else value}"
    for stop in dict.fromkeys([*stops, *parameters.get("stop", [])]):
        yield f"PARAMETER stop {_quoted(stop, where='ollama.parameters.stop')}"


def _quoted(text: str, *, where: str) -> str:
    """Plain quotes know no escapes, so a text with a quote or a line break stands between triple ones."""
    lost = sorted({f"U+{ord(each):04X}" for each in text if not each.isprintable() and each not in "\t\n\r"})
    if lost:
        raise ModelfileError(
            f"{where}: Ollama drops {', '.join(lost)} from a Modelfile: write it without: {text[:60]!r}"
        )
    if FENCE in text or text.endswith('"'):
        raise ModelfileError(f'{where}: a Modelfile cannot hold a text with """ in it or " at its end: {text[:60]!r}')
    return f"{FENCE}{text}{FENCE}" if '"' in text or "\n" in text else f'"{text}"'
