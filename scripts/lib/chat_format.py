"""
What a chat template writes around the texts of a conversation, found by rendering it; and Ollama's TEMPLATE for that.

A template is understood if, for every probe conversation, it is the same few texts before, between and behind those of
the conversation. Which model it belongs to is not asked. What it does beside that (trimming, tools, reasoning that it
cuts out) is for the GGUF's own template, which newer servers of Ollama use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lib.errors import ModelmillError
from lib.modelfile import FENCE, dropped

Message = Mapping[str, str]
Conversation = Sequence[Message]
# Renders a conversation for an answer to come; raises TemplateRefusal.
Render = Callable[[Conversation], str]

# Words that no template looks for, and that occur in none.
SYSTEM, FIRST, ANSWER, SECOND, REPLY, THIRD = (
    "Sysword",
    "Firstword",
    "Answerword",
    "Secondword",
    "Replyword",
    "Thirdword",
)


# A special token that marks a turn, and not one for line breaks or the like, nor one that an answer may hold.
MARK = re.compile(r"(?!\W*/?\w*think)[<\[|].*[>\]|]")


# Whether no message of the user or the assistant comes behind; Go's templates cannot count.
LAST = (
    "{{ $last := true }}{{ $self := true }}{{ range slice $.Messages $place }}"
    '{{ if $self }}{{ $self = false }}{{ else if ne .Role "system" }}{{ $last = false }}{{ end }}{{ end }}'
)


class TemplateRefusal(ModelmillError):
    """A chat template refuses a conversation: it raised an exception of its own."""


class FormatError(ModelmillError):
    """A chat template does more than write texts between those of a conversation."""


@dataclass(frozen=True)
class ChatFormat:
    """
    The texts around those of a conversation that begins and ends with the user.

    Attributes:
        opening: before the first user's text where there is no system message; a default one is a part of it.
        answer: between a user's text and the assistant's.
        turn: between an assistant's text and the next user's.
        generation: behind the last user's text.
        system: before and behind the system message, up to the user's text; None if the template refuses one.
        system_turn: the same where the message stands before the last user's text and that is not the first; None if
            it always stands before the first.
    """

    opening: str
    answer: str
    turn: str
    generation: str
    system: tuple[str, str] | None
    system_turn: tuple[str, str] | None

    def render(self, conversation: Conversation) -> str:
        """A conversation as `go_template` renders it."""
        system = "\n\n".join(each["content"] for each in conversation if each["role"] == "system")
        spoken = [each for each in conversation if each["role"] != "system"]
        parts, begun = [], False
        for number, message in enumerate(spoken):
            last = number + 1 == len(spoken)
            if message["role"] == "assistant":
                parts.append(self.answer)
            elif system and self.system_turn and last and begun:
                parts += [self.system_turn[0], system, self.system_turn[1]]
            elif begun:
                parts.append(self.turn)
            elif system and self.system and (last or not self.system_turn):
                parts += [self.system[0], system, self.system[1]]
            else:
                parts.append(self.opening)
            begun = True
            parts.append(message["content"])
            if last and message["role"] == "user":
                parts.append(self.generation)
        return "".join(parts)

    @property
    def texts(self) -> list[str]:
        """All that is written around a conversation's texts."""
        plain = [self.opening, self.answer, self.turn, self.generation]
        return [*plain, *(self.system or ()), *(self.system_turn or ())]


def recognize(render: Render, probes: Mapping[str, Conversation]) -> ChatFormat:
    """
    The format of a chat template.

    Args:
        render: without a BOS that the tokenizer adds by itself.
        probes: more conversations, by name, that it has to be right for as well; what the template refuses is left out.

    Raises:
        FormatError: it renders one of them, or a plain conversation, otherwise than the same texts would.
    """
    try:
        return _recognize(render, probes)
    except TemplateRefusal as error:
        raise FormatError(f"it refuses a plain conversation: {error}") from error


def _recognize(render: Render, probes: Mapping[str, Conversation]) -> ChatFormat:
    opening, generation = _around(render, [("user", FIRST)])
    _, answer, turn, behind = _around(render, [("user", FIRST), ("assistant", ANSWER), ("user", SECOND)])
    if behind != generation:
        raise FormatError("what it writes behind the last user's text depends on the turns before")
    system = system_turn = None
    try:
        *system, behind = _around(render, [("system", SYSTEM), ("user", FIRST)])
        if behind != generation:
            raise FormatError("what it writes behind the last user's text depends on the system message")
    except TemplateRefusal:
        system = None
    if system is not None:
        later = [("system", SYSTEM), ("user", FIRST), ("assistant", ANSWER), ("user", SECOND)]
        rendered = render(_conversation(later))
        if rendered.find(SYSTEM) > rendered.find(ANSWER):
            order = [("user", FIRST), ("assistant", ANSWER), ("system", SYSTEM), ("user", SECOND)]
            system_turn = tuple(_split(rendered, [text for _, text in order])[2:4])
    found = ChatFormat(
        opening, answer, turn, generation, None if system is None else (system[0], system[1]), system_turn
    )
    plain = {f"{len(each)} messages": each for each in _plain(with_system=system is not None)}
    for name, conversation in {**plain, **probes}.items():
        try:
            expected = render(conversation)
        except TemplateRefusal:
            if name in probes:
                continue
            raise
        if found.render(conversation) != expected:
            raise FormatError(f"of {name} it writes more than a few texts between those that were said")
    return found


def _plain(*, with_system: bool) -> list[Conversation]:
    """Conversations that end with the user, from one to four turns."""
    words = [FIRST, ANSWER, SECOND, REPLY, THIRD, "Fourthword", "Fifthword"]
    turns = [(("user", "assistant")[place % 2], word) for place, word in enumerate(words)]
    heads = [[], [("system", SYSTEM)]] if with_system else [[]]
    return [_conversation([*head, *turns[:count]]) for head in heads for count in (1, 3, 5, 7)]


def _conversation(turns: Sequence[tuple[str, str]]) -> Conversation:
    return [{"role": role, "content": text} for role, text in turns]


def _around(render: Render, turns: Sequence[tuple[str, str]]) -> list[str]:
    return _split(render(_conversation(turns)), [text for _, text in turns])


def _split(rendered: str, texts: Sequence[str]) -> list[str]:
    """What stands before, between and behind texts that occur once each, in their order."""
    places = [rendered.find(text) for text in texts]
    if min(places) < 0 or any(rendered.count(text) > 1 for text in texts) or places != sorted(places):
        raise FormatError("it leaves out, repeats or moves the texts of a conversation")
    ends = [0, *(place + len(text) for place, text in zip(places, texts, strict=True))]
    return [rendered[end:place] for end, place in zip(ends, [*places, len(rendered)], strict=True)]


def go_template(found: ChatFormat) -> str:
    """
    Ollama's TEMPLATE, in Go's text/template.

    Written without trim marks, so that every space and line break in it is one of the format's.

    Raises:
        FormatError: a text holds what Ollama drops from a Modelfile.
    """
    texts = "".join(found.texts)
    if lost := dropped(texts):
        raise FormatError(f"its texts hold {lost}, which Ollama drops from a Modelfile")
    if FENCE in texts:
        raise FormatError(f"its texts hold {FENCE}, which no Modelfile can")
    first, later = _literal(found.opening), _literal(found.turn)
    if found.system:
        first = _if("and $last $.System" if found.system_turn else "$.System", _system(found.system), first)
    if found.system_turn:
        later = _if("and $last $.System", _system(found.system_turn), later)
    text = "{{ $message.Content }}{{ $begun = true }}"
    user = _if("$begun", later, first) + text
    return (
        '{{ $begun := false }}{{ $role := "" }}{{ range $place, $message := .Messages }}'
        + (LAST if found.system_turn else "")
        + '{{ if ne $message.Role "system" }}{{ $role = $message.Role }}{{ end }}'
        + _if('eq $message.Role "user"', user)
        + _if('eq $message.Role "assistant"', _literal(found.answer) + text)
        + "{{ end }}"
        + _if('eq $role "user"', _literal(found.generation))
    )


def _if(condition: str, then: str, otherwise: str = "") -> str:
    other = f"{{{{ else }}}}{otherwise}" if otherwise else ""
    return f"{{{{ if {condition} }}}}{then}{other}{{{{ end }}}}"


def _system(around: tuple[str, str]) -> str:
    return f"{_literal(around[0])}{{{{ $.System }}}}{_literal(around[1])}"


def _literal(text: str) -> str:
    """A text as it stands in a template; Go has no other way to write braces than as a value."""
    return re.sub(r"\{+", r'{{ "\g<0>" }}', text)


def stop_texts(found: ChatFormat | None, *, special: Mapping[int, str], ends: Sequence[int]) -> list[str]:
    """
    What ends an answer: the tokenizer's own marks of an end, and the special tokens that the format writes.

    Args:
        found: None takes the marks alone.
        special: texts of the vocabulary's special tokens, by id.
        ends: ids of those that end an answer or a turn, or begin a text.
    """
    written = "".join(found.texts) if found else ""
    marks = [text for text in special.values() if text in written and MARK.fullmatch(text)]
    return list(dict.fromkeys([*(special[number] for number in ends if number in special), *marks]))
