"""Samples: training data as token ids with labels, packed into rows and padded into batches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.dataset import DataError, Example, Messages, listing, refuse

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORED = -100  # the label that torch's cross entropy leaves out
THINK, END_OF_THINKING = "<think>", "</think>"
# How the generation prompt of a reasoning model may end: thinking opened, or opened and closed at once.
OPENING = re.compile(r"<think>\s*(</think>\s*)?\Z")
# Around a placeholder, to see whether a template trims; no template has this by itself.
PADDING = "\t \t"
UNASKED = "does not begin it with the generation prompt"


@dataclass(frozen=True)
class Sample:
    """
    What the model sees at once; the model predicts token t + 1 from token t.

    Attributes:
        input_ids: tokens.
        labels: as many; IGNORED wherever nothing is learned.
        cut: tokens that were left out because the sequence length was reached.
        lengths: tokens of each part, of which there is one unless samples were packed; none sees another.
        text: what the tokens are of, special ones included; of a character that was cut in two nothing is left.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int
    lengths: tuple[int, ...]
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class SampleSummary:
    """Counts over samples, each part of a packed one by itself; only cut_samples counts packed ones whole."""

    samples: int
    tokens: int
    learned_tokens: int
    cut_samples: int
    cut_tokens: int


def encode_examples(tokenizer: Any, examples: Sequence[Example], *, max_length: int) -> list[Sample]:
    """
    Turn training data into one sample per example, in their order.

    Args:
        tokenizer: a fast tokenizer of transformers, as it came with the base.
        max_length: in tokens; what is beyond is cut.

    Raises:
        DataError: listing every line that the chat template does not render as it has to, or if there are
            conversations and no chat template.
    """
    if not tokenizer.chat_template and any(example.messages is not None for example in examples):
        raise DataError(
            "the base's tokenizer has no chat template, so conversations cannot be rendered for it; "
            "take an instruction-tuned base, or data of the form text"
        )
    samples, problems = [], []
    for example in examples:
        try:
            if example.messages is None:
                samples.append(encode_text(tokenizer, example.text or "", max_length=max_length))
            else:
                samples.append(encode_conversation(tokenizer, example.messages, max_length=max_length))
        except DataError as error:
            problems.append(f"line {example.line}: {error}")
    if problems:
        raise DataError(listing("training data that does not go with the base's chat template:", problems))
    return samples


def encode_text(tokenizer: Any, text: str, *, max_length: int) -> Sample:
    """Encode plain text, all of which is learned, with one BOS if the tokenizer adds it, and one EOS."""
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    # What the tokenizer adds stands nowhere in the text.
    where = zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
    tokens, places = encoded["input_ids"], [None if added else place for place, added in where]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first, last = 0, len(tokens)
    while bos is not None and tokens[first : first + 2] == [bos, bos]:
        first += 1
    while eos is not None and tokens[first:last][-2:] == [eos, eos]:
        last -= 1
    begin = max((place[1] for place in places[:first] if place), default=0)
    end = min((place[0] for place in places[last:] if place), default=len(text))
    tokens = tokens[first:last]
    places = [place and (place[0] - begin, place[1] - begin) for place in places[first:last]]
    if eos is not None and tokens[-1:] != [eos]:
        tokens, places = [*tokens, eos], [*places, None]
    read = _read_by(tokenizer, text[begin:end], tokens[:max_length], places)
    return _cut(tokens, tokens, max_length, text=read)


def encode_conversation(tokenizer: Any, messages: Messages, *, max_length: int) -> Sample:
    """
    Render with the tokenizer's own chat template and label what the assistant says, end marks included.

    The last assistant turn begins with exactly what the template gives the model to go on from, and keeps its
    reasoning even where the template drops it; earlier turns are as the template shows them to the model, mostly
    without. What follows the last assistant turn is left out: nothing is learned from it.

    The template is rendered to text and encoded without special tokens: the template already holds them,
    and encoding with them would double BOS.

    Raises:
        DataError: the assistant says nothing, or the template raises, changes a turn once others follow in any
            other way than dropping its reasoning, or drops what is to be learned.
    """
    spoken = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        raise DataError("nothing that the assistant says: there would be nothing to learn")
    *earlier, last = spoken
    prompt = _render(tokenizer, messages[:last], add_generation_prompt=True)
    text = _render_last_turn(tokenizer, messages[: last + 1], prompt)
    spans = [_find_earlier_turn(tokenizer, messages[: turn + 1], prompt) for turn in earlier]
    spans.append((len(prompt), len(text.rstrip())))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = [
        token if any(start <= offset[0] < end for start, end in spans) else IGNORED
        for token, offset in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    read = _read_by(tokenizer, text, encoded["input_ids"][:max_length], encoded["offset_mapping"])
    return _cut(encoded["input_ids"], labels, max_length, text=read)


def _cut(input_ids: list[int], labels: list[int], max_length: int, *, text: str) -> Sample:
    kept = input_ids[:max_length]
    return Sample(kept, labels[:max_length], len(input_ids) - len(kept), (len(kept),), text)


def _read_by(tokenizer: Any, text: str, kept: list[int], places: Sequence[tuple[int, int] | None]) -> str:
    """
    As much of a text as its first tokens are of, with those around it that the tokenizer added.

    Not decoded: that would put spaces where there were none, and be no text where a character was cut in two.

    Args:
        kept: the first tokens of the text.
        places: of all its tokens, those that were cut as well; None for one that was added.
    """
    inside = [number for number, place in enumerate(places) if place]
    before, behind = (inside[0], inside[-1] + 1) if inside else (len(places), len(places))
    head, tail = ("".join(tokenizer.convert_ids_to_tokens(added)) for added in (kept[:before], kept[behind:]))
    if len(kept) >= behind:
        return head + text + tail
    if len(kept) <= before:
        return head
    # Several tokens of one character have its place all; a byte-level token's may leave out the space before it.
    return head + text[: min(places[len(kept) - 1][1], places[len(kept)][0])]


def _render_last_turn(tokenizer: Any, messages: Messages, prompt: str) -> str:
    """The text of messages that end with an assistant turn, beginning with that turn's generation prompt."""
    said = messages[-1]["content"]
    bare = OPENING.sub("", prompt)
    closed = prompt.rstrip().endswith(END_OF_THINKING)
    opened = bare != prompt and not closed
    reasoned = END_OF_THINKING in said or said.lstrip().startswith(THINK)
    whole = _render(tokenizer, messages)
    rendered = whole[len(bare) :]
    if whole.startswith(prompt) and _keeps(rendered, said) and not (opened and END_OF_THINKING not in rendered):
        return whole
    if reasoned and closed:
        raise _fault(messages, "ends the reasoning before the assistant speaks, yet the data has some here")
    if not reasoned and bare == prompt:
        raise _fault(messages, "drops part of it" if whole.startswith(prompt) else UNASKED)
    header, said, footer = _put_in_place(tokenizer, messages)
    if header not in (prompt, bare):
        raise _fault(messages, UNASKED)
    if opened and reasoned:
        said = said.lstrip().removeprefix(THINK).lstrip()
    elif opened:
        # Without an end of the thinking that the prompt begins, the answer would be learned as a thought. No
        # line feed comes before the end: tokenizers would make one token of it and the prompt's.
        said = f"{END_OF_THINKING}\n\n{said.lstrip()}"
    return prompt + said + footer


def _find_earlier_turn(tokenizer: Any, messages: Messages, prompt: str) -> tuple[int, int]:
    """Where in `prompt`, which is of a later turn, the assistant turn stands that is the last of `messages`."""
    before = _render(tokenizer, messages[:-1], add_generation_prompt=True)
    # The generation prompt may open the reasoning that the history has not.
    starts = [len(each) for each in (before, OPENING.sub("", before)) if prompt.startswith(each)]
    answer = messages[-1]["content"].rpartition(END_OF_THINKING)[2]
    if starts:
        start = starts[0]
        after = _render(tokenizer, messages)
        if prompt.startswith(after):
            if answer.strip() not in after[start:]:
                raise _fault(messages, "drops part of it")
            return start, len(after.rstrip())
        # Templates that keep the reasoning of the last turn only, as Qwen3's does.
        footer = _put_in_place(tokenizer, messages)[2].rstrip()
        rest = prompt[start:].lstrip()
        for said in (answer.lstrip(), answer.strip()):
            if rest.startswith(said + footer):
                return start, len(prompt) - len(rest) + len(said + footer)
    raise _fault(messages, "changes it once others follow")


def _put_in_place(tokenizer: Any, messages: Messages) -> tuple[str, str, str]:
    """What the template writes before and after the last message's content, and that, trimmed if it trims."""
    said = messages[-1]["content"]
    texts = [message["content"] for message in messages]
    mark = next(mark for mark in (f"Placeholder{n}" for n in count()) if not any(mark in text for text in texts))
    held = _render(tokenizer, [*messages[:-1], {**messages[-1], "content": PADDING + mark + PADDING}])
    if held.count(mark) != 1:
        raise _fault(messages, "does not write it as it is")
    header, _, footer = held.partition(mark)
    said = said if header.endswith(PADDING) else said.lstrip()
    said = said if footer.startswith(PADDING) else said.rstrip()
    return header.removesuffix(PADDING), said, footer.removeprefix(PADDING)


def _keeps(rendered: str, said: str) -> bool:
    """Whether a rendered turn holds what is said, its reasoning included; white space around tags is free."""
    if said.strip() in rendered:
        return True
    place = 0
    reasoning, end, answer = said.rpartition(END_OF_THINKING)
    for piece in (reasoning.replace(THINK, "", 1).strip(), end, answer.strip()):
        place = rendered.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def _fault(messages: Messages, what: str) -> DataError:
    """What the chat template does wrong with the last of these messages."""
    return DataError(f"turn {len(messages)}, {messages[-1]['content'][:60]!r}: the chat template {what}")


def _render(tokenizer: Any, messages: Messages, *, add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise _fault(messages, f"refuses the conversation up to here: {error}") from error


def check_learnable(samples: Sequence[Sample], examples: Sequence[Example], path: Path, *, max_length: int) -> None:
    """
    Refuse data of which some sample teaches nothing.

    Args:
        samples: plain ones, one for each of `examples`.
        path: the file they are from.
        max_length: to which they were cut.

    Raises:
        DataError: listing every line of which all that is to be learned was cut, or that is but one token.
    """
    problems = []
    for sample, example in zip(samples, examples, strict=True):
        if not _learned(sample):
            whole = len(sample.input_ids) + sample.cut
            problems.append(
                f"line {example.line}: all that is to be learned of its {whole} tokens is cut at max_length "
                f"{max_length}; raise train.max_length or shorten the line"
                if sample.cut
                else f"line {example.line}: too short to learn from: {whole} tokens"
            )
    refuse(path, problems)


def summarize_samples(samples: Sequence[Sample]) -> SampleSummary:
    """Count what there is to learn from, and what was cut of it."""
    return SampleSummary(
        samples=sum(len(sample.lengths) for sample in samples),
        tokens=sum(len(sample.input_ids) for sample in samples),
        learned_tokens=sum(_learned(sample) for sample in samples),
        cut_samples=sum(sample.cut > 0 for sample in samples),
        cut_tokens=sum(sample.cut for sample in samples),
    )


def _learned(sample: Sample) -> int:
    """Labels that count: the first of each part never does, as nothing comes before it."""
    return sum(label != IGNORED for label in _without_first_labels(sample))


def _without_first_labels(sample: Sample) -> list[int]:
    labels, start = list(sample.labels), 0
    for length in sample.lengths:
        labels[start : start + 1] = [IGNORED]
        start += length
    return labels


def pack_samples(samples: Sequence[Sample], *, max_length: int) -> list[Sample]:
    """
    Put whole samples together into rows of at most max_length tokens, by first-fit decreasing.

    The same samples give the same rows. The first label of each part is IGNORED, so that no part is predicted
    from the end of another; `pad_batch` keeps them from attending to one another.

    Raises:
        DataError: a sample is longer than max_length.
    """
    import numpy

    longest = max((len(sample.input_ids) for sample in samples), default=0)
    if longest > max_length:
        raise DataError(f"a sample of {longest} tokens does not fit into rows of {max_length}; cut it first")
    rows: list[list[Sample]] = []
    free = numpy.full(len(samples), max_length)
    for sample in sorted(samples, key=lambda sample: -len(sample.input_ids)):
        row = int(numpy.argmax(free[: len(rows) + 1] >= len(sample.input_ids)))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        free[row] -= len(sample.input_ids)
    return [_join(row) for row in rows]


def _join(parts: Sequence[Sample]) -> Sample:
    return Sample(
        input_ids=[token for part in parts for token in part.input_ids],
        labels=[label for part in parts for label in _without_first_labels(part)],
        cut=sum(part.cut for part in parts),
        lengths=tuple(length for part in parts for length in part.lengths),
        text="".join(part.text for part in parts),
    )


def pad_batch(samples: Sequence[Sample], *, pad: int, mask_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """
    Stack samples, padded on the right to the longest.

    Where a sample has several parts, the mask is block-diagonal, which models take as it is for
    attn_implementation sdpa and eager (not flash attention). Only attention is kept apart by it: packed samples
    must not go to models whose layers carry a state along (Mamba, linear attention) or attend in a sliding window
    shorter than the row.

    Args:
        pad: token id that fills input_ids.
        mask_dtype: None for a boolean block-diagonal mask, which only sdpa understands: eager *adds* it to the
            scores, without an error and without masking anything. A floating dtype, the one the model computes in,
            for a mask that is added, 0 or the dtype's lowest value; eager and sdpa both take it.

    Returns:
        input_ids, labels, position_ids, each (batch, length) of int64; the positions restart in each part.
        attention_mask, (batch, length) of int64 with 1 at tokens, or if any sample has several parts
        (batch, 1, query, key), in which a padding token attends to itself, as no row may be empty.
    """
    import torch

    length = max(len(sample.input_ids) for sample in samples)

    def stack(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.long)

    if all(len(sample.lengths) == 1 for sample in samples):
        mask = stack([[1] * len(sample.input_ids) for sample in samples], 0)
    else:
        mask = _block_diagonal_mask(samples, length, mask_dtype)
    return {
        "input_ids": stack([sample.input_ids for sample in samples], pad),
        "labels": stack([sample.labels for sample in samples], IGNORED),
        "position_ids": stack([[place for part in sample.lengths for place in range(part)] for sample in samples], 0),
        "attention_mask": mask,
    }


def _block_diagonal_mask(samples: Sequence[Sample], length: int, dtype: torch.dtype | None) -> Tensor:
    """Causal within each part, (batch, 1, length, length); every padding token is a part of its own."""
    import torch

    parts = []
    for sample in samples:
        lengths = torch.tensor([*sample.lengths, *[1] * (length - len(sample.input_ids))])
        parts.append(torch.repeat_interleave(lengths))
    part = torch.stack(parts)
    allowed = (part[:, None, :, None] == part[:, None, None, :]).tril()
    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
