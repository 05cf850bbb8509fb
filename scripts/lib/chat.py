"""How a model is talked to: what each engine makes of its chat template, and what Ollama is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.chat_format import ChatFormat, Conversation, FormatError, TemplateRefusal, go_template, recognize, stop_texts
from lib.chat_jinja import chat_template_of, render_of, tokens_for_training
from lib.chat_parity import (
    BEYOND,
    PROBES,
    SERVED,
    TEMPLATE,
    TRAINED,
    ParityError,
    asked,
    first_difference,
    refuse_differences,
)
from lib.gguf_file import GgufFile
from lib.llama_server import LlamaServer, ServerRefusal
from lib.ollama_template import render_by_go, working_go

CONTROL, USER_DEFINED = 3, 4  # llama.cpp's types of tokens that are no text of their own
OWN = "the system prompt"
DATE = "date_string"  # a variable of templates, Llama 3's first
END_TOKENS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class Chat:
    """
    Attributes:
        template: Ollama's TEMPLATE; None if it cannot say what the chat template writes.
        reason: why there is none.
        stops: texts that end an answer.
        refuses_system: whether the chat template takes no system message.
        report: what each engine makes of each conversation.
    """

    template: str | None
    reason: str | None
    stops: list[str]
    refuses_system: bool
    report: dict[str, Any]


def understand_chat(weights: GgufFile, server: LlamaServer, *, tokenizer: Path, system: str | None) -> Chat:
    """
    Read the probe conversations with every engine there is.

    Args:
        weights: of a GGUF file with a chat template.
        server: that has it loaded.
        tokenizer: folder of the checkpoint whose tokenizer the model was trained with.
        system: the system prompt that is to be used, for a probe of its own.

    Raises:
        ParityError: llama.cpp reads a conversation otherwise than transformers.
        BaseModelError: transformers cannot load the tokenizer.
        GoTemplateError: Go does not take the TEMPLATE.
    """
    around = server.tokenize("", parse_special=True, add_special=True)
    without_bos = weights.tokenizer("bos_token_id") in around
    probes = {**PROBES, **({} if system is None else {OWN: asked(system)})}
    read = dict(zip(probes, tokens_for_training(tokenizer, [*probes.values()]), strict=True))
    trained = {name: tokens for name, tokens in read.items() if tokens is not None}
    if not trained:
        raise ParityError("the chat template refuses every conversation that was tried, even a single question")
    dated = trained
    if DATE in (chat_template_of(weights) or ""):
        # llama.cpp gives a template the date of the day, transformers none, and some then write a fixed one.
        today = tokens_for_training(tokenizer, [probes[name] for name in trained], **{DATE: time.strftime("%d %b %Y")})
        dated = {name: tokens or [] for name, tokens in zip(trained, today, strict=True)}
    served = {name: _tokens(server, _or_none(lambda name=name: server.render(probes[name]))) for name in trained}
    found = [first_difference(name, {TRAINED: dated[name], SERVED: served[name]}) for name in trained]
    refuse_differences([each for each in found if each], texts=weights.tokenizer("tokens"))

    chat_format, template, reason, go = None, None, None, working_go()
    try:
        chat_format = recognize(render_of(weights, without_bos=without_bos), probes)
        template = go_template(chat_format)
        written = _by_template(chat_format, template, {name: probes[name] for name in trained}, go)
        if unlike := [name for name in trained if _tokens(server, written[name]) != trained[name]]:
            raise FormatError(f"TEMPLATE would have {unlike[0]} read as other tokens")
    except FormatError as error:
        template, reason = None, str(error)
    stops = _stops(weights, chat_format, begins=around)
    return Chat(
        template=template,
        reason=reason,
        stops=stops,
        refuses_system="a system message" not in trained,
        report={
            "conversations": {name: _summary(tokens) for name, tokens in read.items()},
            "served_with_the_date_of_the_day": dated != trained,
            "template": {"text": template, "reason": reason, "rendered_by_go": bool(template and go)},
            "stops": stops,
            "beyond_template": _beyond(weights, server, template, go, without_bos=without_bos),
        },
    )


def _stops(weights: GgufFile, found: ChatFormat | None, *, begins: Sequence[int]) -> list[str]:
    texts, kinds = weights.tokenizer("tokens"), weights.tokenizer("token_type", [])
    special = {number: texts[number] for number, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)}
    ends = [weights.tokenizer(f"{name}_token_id") for name in END_TOKENS]
    return stop_texts(found, special=special, ends=[number for number in [*ends, *begins] if number is not None])


def _tokens(server: LlamaServer, text: str | None) -> list[int]:
    return [] if text is None else server.tokenize(text, parse_special=True, add_special=True)


def _or_none(render: Callable[[], str]) -> str | None:
    """What is rendered; None if the template refuses."""
    try:
        return render()
    except (ServerRefusal, TemplateRefusal):
        return None


def _by_template(
    found: ChatFormat, template: str, probes: Mapping[str, Conversation], go: Path | None
) -> Mapping[str, str]:
    """Conversations by Ollama's TEMPLATE: by Go, or where there is none by the texts that it was made from."""
    if go is None:
        return {name: found.render(conversation) for name, conversation in probes.items()}
    return dict(zip(probes, render_by_go([(template, each) for each in probes.values()], go=go), strict=True))


def _summary(tokens: list[int] | None) -> dict[str, Any]:
    return {"refused": True} if tokens is None else {"tokens": len(tokens)}


def _beyond(
    weights: GgufFile, server: LlamaServer, template: str | None, go: Path | None, *, without_bos: bool
) -> dict[str, dict[str, str | None] | str]:
    """
    What the engines make of conversations that a TEMPLATE cannot say as some chat templates do.

    Returns:
        By conversation and engine the text, one text where they all write the same; null for a refusal, and by
        transformers for a template that writes the date of the day.
    """
    by_go: Sequence[str | None] = [None] * len(BEYOND)
    if template and go:
        by_go = render_by_go([(template, conversation) for conversation in BEYOND.values()], go=go)

    def by_transformers(conversation: Conversation) -> str | None:
        try:
            return _or_none(lambda: render_of(weights, without_bos=without_bos)(conversation))
        except FormatError:  # the date of the day
            return None

    found: dict[str, dict[str, str | None] | str] = {}
    for (name, conversation), text in zip(BEYOND.items(), by_go, strict=True):
        served = _or_none(lambda conversation=conversation: server.render(conversation))
        texts = {TRAINED: by_transformers(conversation), SERVED: served}
        if template and go:
            texts[TEMPLATE] = text
        found[name] = served if served is not None and set(texts.values()) == {served} else texts
    return found
