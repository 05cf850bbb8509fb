"""Rendering a chat template as transformers does, by itself or with the tokenizer that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lib.chat_format import Conversation, FormatError, Render, TemplateRefusal
from lib.gguf_file import GgufFile
from lib.loading import explain_loading

TODAY = "strftime_now"  # transformers' function for the date


def chat_template_of(weights: GgufFile) -> str | None:
    """The template inside a GGUF file, which llama.cpp and newer servers of Ollama use."""
    return weights.metadata.get("tokenizer.chat_template")


def special_text(weights: GgufFile, name: str) -> str:
    """The text of the vocabulary's "bos" or "eos" token; empty without one."""
    number = weights.tokenizer(f"{name}_token_id")
    return "" if number is None else weights.tokenizer("tokens")[number]


def render_of(weights: GgufFile, *, without_bos: bool) -> Render:
    """
    A function that renders a conversation by the template inside a GGUF file.

    Args:
        without_bos: leave out the BOS at the beginning, where the tokenizer adds one by itself.

    Raises:
        FormatError: it writes the date of the day, so that what it renders is another text tomorrow.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template, bos = chat_template_of(weights) or "", special_text(weights, "bos")
    if TODAY in template:
        raise FormatError("it writes the date of the day")

    def render(conversation: Conversation) -> str:
        def by_itself() -> str:
            rendered, _ = render_jinja_template(
                [[dict(message) for message in conversation]],
                chat_template=template,
                add_generation_prompt=True,
                bos_token=bos,
                eos_token=special_text(weights, "eos"),
            )
            return rendered[0]

        text = _or_refusal(by_itself)
        return text.removeprefix(bos) if without_bos else text

    return render


def tokens_for_training(
    tokenizer: Path, conversations: Sequence[Conversation], **variables: str
) -> list[list[int] | None]:
    """
    Conversations as token ids, by the files of a tokenizer; None for what its template refuses.

    Args:
        variables: of the template, beside the conversation.

    Raises:
        BaseModelError: transformers cannot load it, or it has no chat template.
    """
    from transformers import AutoTokenizer

    with explain_loading("tokenizer", tokenizer):
        loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True, trust_remote_code=False)
        loaded.get_chat_template()
    read: list[list[int] | None] = []
    for conversation in conversations:
        turns = [dict(message) for message in conversation]
        try:
            read.append(
                _or_refusal(
                    lambda turns=turns: loaded.apply_chat_template(
                        turns, add_generation_prompt=True, return_dict=False, **variables
                    )
                )
            )
        except TemplateRefusal:
            read.append(None)
    return read


def _or_refusal(work: Callable[[], Any]) -> Any:
    """
    Raises:
        TemplateRefusal: the template raised an exception, of its own or by what it did.
    """
    from jinja2 import TemplateError

    try:
        return work()
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise TemplateRefusal(str(error)) from error
