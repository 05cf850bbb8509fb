"""Training data: reading JSONL, recognising which form it has, and finding everything that is wrong with it."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import ModelmillError

ROLES = ("system", "user", "assistant")
# Each form by its name, and the keys that make a line one of it.
FORMS = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "question/answer": ("question", "answer"),
    "instruction/output": ("instruction", "output"),
    "text": ("text",),
}
KEYS = "messages, prompt and completion, question and answer, instruction and output (input if there is any), or text"
MOST_LISTED = 20
# Keys of other formats that most chat templates pass over in silence.
NOT_RENDERED = ("reasoning_content", "reasoning", "thinking", "tool_calls")

Messages = list[dict[str, str]]


class DataError(ModelmillError):
    """Training or evaluation data cannot be used."""


@dataclass(frozen=True)
class Example:
    """One line of training data: either a conversation or plain text; the other of the two is None."""

    line: int
    messages: Messages | None = None
    text: str | None = None


def read_examples(path: Path) -> list[Example]:
    """
    Read training data, each line {"messages": [{"role", "content"}, …]} or of another of the FORMS.

    All forms but `text` become messages. Keys that belong to no form are passed over, and one whose value
    is null counts as not there.

    Raises:
        DataError: listing every bad line with its number, and if the lines are not all of one form, the
            forms; or if there is no line at all.
    """
    values, problems = _parse(path)
    examples, first_lines = [], {}
    for number, value in values:
        try:
            form = _recognise(value)
            first_lines.setdefault(form, number)
            examples.append(_as_example(number, form, value))
        except DataError as error:
            problems.append((number, str(error)))
    listed = [f"line {number}: {problem}" for number, problem in sorted(problems)]
    if len(first_lines) > 1:
        forms = ", ".join(f"{form} (first in line {number})" for form, number in first_lines.items())
        listed.insert(0, f"the lines are of more than one form: {forms}; give the file one of them")
    refuse(path, listed)
    return examples


def read_jsonl(path: Path) -> list[tuple[int, Any]]:
    """
    The values of a JSONL file with their line numbers; blank lines are skipped.

    Raises:
        DataError: listing every line that is no JSON, or if there is no line at all.
    """
    values, problems = _parse(path)
    refuse(path, [f"line {number}: {problem}" for number, problem in problems])
    return values


def refuse(path: Path, problems: list[str]) -> None:
    """Raise a DataError that lists the problems found in a file, if there are any."""
    if problems:
        raise DataError(listing(f"{path}:", problems))


def listing(title: str, problems: list[str]) -> str:
    """A message that lists problems below a title, MOST_LISTED of them at most."""
    more = [f"  and {len(problems) - MOST_LISTED} more"] if len(problems) > MOST_LISTED else []
    return "\n".join([title, *(f"  {problem}" for problem in problems[:MOST_LISTED]), *more])


def _parse(path: Path) -> tuple[list[tuple[int, Any]], list[tuple[int, str]]]:
    """The values of a file's lines and what is wrong with the other lines, both with line numbers."""
    values, problems = [], []
    # Windows' editors put a byte order mark first. The lines are not found by `splitlines`, which also splits
    # at U+2028, U+2029 and U+0085; JSON may hold these as they are.
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append((number, json.loads(line.decode("utf-8"))))
        except UnicodeDecodeError:
            problems.append((number, "no UTF-8; save the file in that encoding"))
        except json.JSONDecodeError as error:
            problems.append((number, f"no JSON: {error.msg} at column {error.colno}"))
        except (ValueError, RecursionError) as error:
            problems.append((number, f"no JSON that can be read: {error}"))
    if not values and not problems:
        raise DataError(f"{path} is empty: it holds no line of data")
    return values, problems


def _recognise(value: Any) -> str:
    """The form of a line's value."""
    if not isinstance(value, dict):
        raise DataError(f"expected an object with {KEYS}")
    given = {key for key, content in value.items() if content is not None}
    fitting = [form for form, keys in FORMS.items() if given.issuperset(keys)]
    if not fitting:
        found = ", ".join(repr(key) for key in sorted(given)[:6]) or "none of them"
        raise DataError(f"expected {KEYS}; found {found}")
    if len(fitting) > 1:
        raise DataError(f"fits more than one form: {' and '.join(fitting)}; take the keys of all but one out")
    return fitting[0]


def _as_example(number: int, form: str, value: dict[str, Any]) -> Example:
    if form == "messages":
        return Example(number, messages=_checked_messages(value["messages"]))
    if form == "text":
        if not _is_text(value["text"]) or not value["text"].strip():
            raise DataError("text has to be a text, and not an empty one")
        return Example(number, text=value["text"])
    asked, answer = FORMS[form]
    keys = [asked, answer]
    if form == "instruction/output" and value.get("input") not in (None, ""):
        keys.insert(1, "input")
    wrong = [key for key in keys if not _is_text(value[key])]
    if wrong:
        raise DataError(f"{' and '.join(wrong)}: expected a text")
    if not value[answer].strip():
        raise DataError(f"{answer} is empty: there would be nothing to learn")
    question = "\n\n".join(value[key] for key in keys[:-1] if value[key].strip())
    return Example(
        number, messages=[{"role": "user", "content": question}, {"role": "assistant", "content": value[answer]}]
    )


def _checked_messages(messages: Any) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise DataError('expected {"messages": [{"role": …, "content": …}, …]}')
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(f"every message needs a role out of {', '.join(ROLES)}")
        if not _is_text(message.get("content")):
            raise DataError("every message needs a text as its content")
        if lost := [key for key in NOT_RENDERED if message.get(key)]:
            raise DataError(f"{lost[0]} would be lost: write reasoning into content, as <think>…</think>")
    if messages[0]["role"] == "assistant":
        raise DataError("the assistant speaks first; begin with what it answers")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise DataError("nothing that the assistant says: there would be nothing to learn")
    return messages


def _is_text(value: Any) -> bool:
    """Whether it is a string without half surrogate pairs, which no tokenizer takes."""
    return isinstance(value, str) and not any("\ud800" <= each <= "\udfff" for each in value)
