"""Whether a conversation becomes the same tokens for the trainer, for llama.cpp, and by Ollama's TEMPLATE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lib.chat_format import Conversation
from lib.errors import ModelmillError

ADVICE = """the tokenizer's files (tokenizer.json, tokenizer_config.json, chat_template.jinja) have to agree on the
template, on whether a text begins with BOS, and on whether with a space (add_prefix_space in tokenizer_config.json:
behind a special token llama.cpp adds it again, transformers does not)"""
TRAINED, SERVED, TEMPLATE = "transformers", "llama.cpp", "Ollama's TEMPLATE"


class ParityError(ModelmillError):
    """A conversation is served otherwise than the model was trained on it."""


def _said(*turns: tuple[str, str]) -> Conversation:
    return [{"role": role, "content": text} for role, text in turns]


QUESTION, ANSWER = ("user", "What is 17 + 25?"), ("assistant", "It is 42.")


def asked(system: str) -> Conversation:
    """A question after a system message."""
    return _said(("system", system), QUESTION)


GUIDE = ("system", "Answer briefly. 簡潔に答えてください。")
# What every engine has to read as the same tokens.
PROBES: Mapping[str, Conversation] = {
    "one turn": _said(QUESTION),
    "several turns": _said(QUESTION, ANSWER, ("user", "And doubled?"), ("assistant", "84"), ("user", "Why?")),
    "a system message": _said(GUIDE, QUESTION),
    "a system message and several turns": _said(GUIDE, QUESTION, ANSWER, ("user", "And doubled?")),
    "Japanese": _said(("user", "日本の首都は？"), ("assistant", "東京です。🗼"), ("user", "人口は「約」何人ですか？")),
    "code": _said(("user", 'def f(x):\n    return f"{x:02d}"  # {{ x }} "quoted"\n\nWhat does it do?')),
    "an earlier answer with reasoning": [
        *_said(QUESTION),
        {**dict(_said(ANSWER)[0]), "reasoning_content": "17 and 25 are 42."},
        *_said(("user", "And doubled?")),
    ],
}
# What no Go template can say, as the report tells of it.
BEYOND: Mapping[str, Conversation] = {
    "a system message at the end": _said(QUESTION, GUIDE),
    "two system messages": _said(GUIDE, ("system", "Be kind."), QUESTION),
    "a system message in the middle": _said(QUESTION, ANSWER, GUIDE, ("user", "And doubled?")),
    "two questions in a row": _said(QUESTION, ("user", "And doubled?")),
    "an answer first": _said(ANSWER, QUESTION),
    "an answer at the end": _said(QUESTION, ANSWER),
    "reasoning in the text of an earlier answer": _said(
        QUESTION, ("assistant", "<think>\n17 and 25 are 42.\n</think>\n\nIt is 42."), ("user", "And doubled?")
    ),
    "spaces around a text": _said(("user", "  What is 17 + 25?\n")),
}


@dataclass(frozen=True)
class Difference:
    """The first place at which two engines read a conversation otherwise; a token is None behind the end."""

    conversation: str
    place: int
    tokens: Mapping[str, int | None]


def first_difference(conversation: str, read: Mapping[str, Sequence[int]]) -> Difference | None:
    """
    Where engines differ.

    Args:
        conversation: its name.
        read: token ids by engine.
    """
    for place in range(max(map(len, read.values()))):
        tokens = {engine: ids[place] if place < len(ids) else None for engine, ids in read.items()}
        if len(set(tokens.values())) > 1:
            return Difference(conversation, place, tokens)
    return None


def refuse_differences(found: Sequence[Difference], *, texts: Sequence[str]) -> None:
    """
    Args:
        texts: of the vocabulary, by token id.

    Raises:
        ParityError: naming each conversation, the place and the tokens there.
    """
    lines = []
    for each in found:
        tokens = (f"{engine} reads {_shown(token, texts)}" for engine, token in each.tokens.items())
        lines.append(f"  {each.conversation}: at token {each.place} {', '.join(tokens)}")
    if lines:
        raise ParityError("\n".join(["the chat template is not served as it is trained with:", *lines, ADVICE]))


def _shown(token: int | None, texts: Sequence[str]) -> str:
    if token is None:
        return "the end"
    return f"{token} {texts[token]!r}" if 0 <= token < len(texts) else str(token)
