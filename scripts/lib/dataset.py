"""Training conversations: reading and checking them, and turning them into token ids and labels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import ModelmillError

ROLES = ("system", "user", "assistant")
IGNORED = -100  # the label that torch's cross entropy leaves out
MOST_LISTED = 20

Messages = list[dict[str, str]]


class DataError(ModelmillError):
    """Training or evaluation data cannot be used."""


@dataclass(frozen=True)
class Sample:
    """One conversation as the model sees it; labels are IGNORED wherever the assistant does not speak."""

    input_ids: list[int]
    labels: list[int]
    cut: int


def read_jsonl(path: Path) -> list[tuple[int, Any]]:
    """
    The values of a JSONL file with their line numbers; blank lines are skipped.

    Raises:
        DataError: listing every line that is no JSON, or if there is no line at all.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {number}: no UTF-8; save the file in that encoding") from error
    values, problems = [], []
    # Not `splitlines`, which also splits at U+2028, U+2029 and U+0085; JSON may hold these as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                problems.append(f"line {number}: no JSON: {error.msg} at column {error.colno}")
    refuse(path, problems)
    if not values:
        raise DataError(f"{path} is empty: it holds no line of data")
    return values


def refuse(path: Path, problems: list[str]) -> None:
    """Raise a DataError that lists the problems found in a file, if there are any."""
    if problems:
        more = [f"  and {len(problems) - MOST_LISTED} more"] if len(problems) > MOST_LISTED else []
        raise DataError("\n".join([f"{path}:", *(f"  {problem}" for problem in problems[:MOST_LISTED]), *more]))


def read_conversations(path: Path) -> list[Messages]:
    """
    Read conversations, one {"messages": [{"role", "content"}, …]} a line.

    Raises:
        DataError: listing every bad line with its number.
    """
    conversations, problems = [], []
    for number, value in read_jsonl(path):
        problem = _conversation_problem(value)
        if problem:
            problems.append(f"line {number}: {problem}")
        else:
            conversations.append(value["messages"])
    refuse(path, problems)
    return conversations


def _conversation_problem(value: Any) -> str | None:
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        return 'expected {"messages": [{"role": …, "content": …}, …]}'
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return f"every message needs a role out of {', '.join(ROLES)}"
        content = message.get("content")
        if not isinstance(content, str) or any("\ud800" <= each <= "\udfff" for each in content):
            return "every message needs a text as its content"
    if messages[0]["role"] == "assistant":
        return "the assistant speaks first; begin with what it answers"
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return "nothing that the assistant says: there would be nothing to learn"
    return None


def encode_conversation(tokenizer: Any, messages: Messages, *, max_length: int) -> Sample:
    """
    Render with the tokenizer's own chat template and label what the assistant says, end marks included.

    The template is rendered to text and encoded without special tokens: the template already holds them,
    and encoding with them would double BOS.

    Args:
        tokenizer: a fast tokenizer of transformers with a chat template.
        max_length: in tokens; what is beyond is cut.

    Raises:
        DataError: the template renders a turn differently once others follow it.
    """
    text = _render(tokenizer, messages)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(tokenizer, messages[:turn], add_generation_prompt=True)
            after = _render(tokenizer, messages[: turn + 1])
            if not text.startswith(after) or not after.startswith(before):
                raise DataError(
                    f"the chat template changes turn {turn + 1} once others follow: {message['content'][:60]!r}"
                )
            if message["content"].strip() not in after[len(before) :]:
                raise DataError(f"the chat template drops part of turn {turn + 1}: {message['content'][:60]!r}")
            spans.append((len(before), len(after.rstrip())))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(start <= offset[0] < end for start, end in spans) else IGNORED
        for token, offset in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    cut = max(0, len(labels) - max_length)
    return Sample(encoded["input_ids"][:max_length], labels[:max_length], cut)


def _render(tokenizer: Any, messages: Messages, *, add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise DataError(
            f"the chat template refuses a conversation: {error}: {messages[-1]['content'][:60]!r}"
        ) from error
