"""Ollama's Modelfile: what stands in it and how its values are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lib.errors import ModelmillError

FENCE = '"""'
LINE_ENDS = "\t\n\r"


class ModelfileError(ModelmillError):
    """A value cannot be written into a Modelfile."""


def render_modelfile(
    *,
    gguf_name: str,
    adapter_name: str | None = None,
    template: str | None,
    system: str | None,
    messages: Sequence[Mapping[str, str]],
    parameters: Mapping[str, Any],
    stops: list[str],
    license_text: str | None,
) -> str:
    """
    The text of a Modelfile.

    Args:
        gguf_name: file name of the weights, beside the Modelfile.
        adapter_name: likewise of an adapter that belongs to them.
        template: Ollama's TEMPLATE; without one it uses the chat template inside the GGUF.
        system: system prompt, as `kept` leaves it.
        messages: what was said before every conversation, each with role and content; likewise.
        parameters: Ollama's PARAMETERs; `stop` adds to `stops`.
        stops: texts that end an answer.
        license_text: of the weights.

    Raises:
        ModelfileError: a text that the grammar cannot hold.
    """
    lines = [f"FROM ./{gguf_name}"]
    lines += [] if adapter_name is None else [f"ADAPTER ./{adapter_name}"]
    if template is not None:
        lines.append(f"TEMPLATE {_quoted(template, where='TEMPLATE')}")
    lines += _parameter_lines(parameters, stops)
    if system is not None:
        lines.append(f"SYSTEM {_quoted(kept(system), where='ollama.system')}")
    for message in messages:
        lines.append(f"MESSAGE {message['role']} {_quoted(kept(message['content']), where='ollama.messages')}")
    if license_text is not None:
        lines.append(f"LICENSE {_quoted(kept(license_text), where='the licence')}")
    return "\n".join(lines) + "\n"


def kept(text: str) -> str:
    """A text without what Ollama drops from a Modelfile: full-width spaces and their kin as plain ones, no others."""
    return "".join(each if each.isprintable() or each in LINE_ENDS else " " if each.isspace() else "" for each in text)


def dropped(text: str) -> str:
    """The characters that `kept` does not leave as they are, for a message; empty where there are none."""
    return ", ".join(sorted({f"U+{ord(each):04X}" for each in text if kept(each) != each}))


def unheld(text: str) -> str | None:
    """Why a Modelfile cannot hold a text as `kept` leaves it; None if it can."""
    if FENCE in text or text.endswith('"'):
        return f'a Modelfile cannot hold a text with """ in it or " at its end: {text[:60]!r}'
    return None


def unheld_stop(text: str) -> str | None:
    """Why a Modelfile cannot hold a text that ends an answer, which has to be taken as it is; None if it can."""
    if lost := dropped(text):
        return f"Ollama drops {lost} from a Modelfile: write it without: {text[:60]!r}"
    return unheld(text)


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
    if problem := unheld_stop(text):
        raise ModelfileError(f"{where}: {problem}")
    return f"{FENCE}{text}{FENCE}" if '"' in text or "\n" in text else f'"{text}"'
