"""Passages of documents, and which of them belong to a question, by BM25 (Robertson and Zaragoza 2009)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.documents import ENDINGS, document_files
from lib.errors import ModelmillError

# Kana and ideographs, which are written without spaces; Hangul is left to words since it has spaces.
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff々〆"
_WORD = rf"(?:(?![{_UNSPACED}])[^\W_])+"
_TERM = re.compile(rf"(?P<run>[{_UNSPACED}]+)|{_WORD}(?:[._-]{_WORD})*")
_SENTENCE = re.compile(r"(?<=[。！？])|(?<=[.!?])\s+")
HEADING = 200  # characters of a heading that are kept
_FENCE = re.compile(r"\s*(```|~~~)")
_HEADING = re.compile(r"#{1,6}\s+(?P<text>.+?)\s*#*")


class DocumentError(ModelmillError):
    """Documents that cannot be read, or in which nothing can be found."""


@dataclass(frozen=True)
class Passage:
    """A part of a document: its path within the folder, the heading above it, and the text."""

    source: str
    heading: str
    text: str


def read_passages(folder: Path, *, longest: int) -> list[Passage]:
    """
    Split documents into passages: paragraphs under one heading, joined as long as they are short enough.

    Args:
        folder: with documents.
        longest: characters of a passage; a longer paragraph is split between sentences, or where there are none.

    Raises:
        DocumentError: listing every file that is no UTF-8 text; or there is no passage at all.
    """
    passages, problems = [], []
    for file in document_files(folder):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            problems.append(f"  {file}: no UTF-8 at byte {error.start}")
            continue
        source = file.relative_to(folder).as_posix()
        passages += [Passage(source, heading, part) for heading, part in _split(text, longest=longest)]
    if problems:
        raise DocumentError("\n".join([f"documents that cannot be read in {folder}:", *problems]))
    if not passages:
        raise DocumentError(f"{folder} has no text in any document ({', '.join(ENDINGS)})")
    return passages


def _split(text: str, *, longest: int) -> Iterator[tuple[str, str]]:
    heading, collected = "", ""
    for is_heading, block in _blocks(text):
        if is_heading:
            if collected:
                yield heading, collected
            heading, collected = block[:HEADING], ""
            continue
        for part in _pieces(block, longest=longest):
            joined = f"{collected}\n\n{part}" if collected else part
            if len(joined) > longest:
                yield heading, collected
                joined = part
            collected = joined
    if collected:
        yield heading, collected


def _blocks(text: str) -> Iterator[tuple[bool, str]]:
    """Headings and paragraphs, with whether it is one; in fenced code there are no headings."""
    lines: list[str] = []
    fenced = False
    for line in [*text.splitlines(), ""]:
        fenced ^= bool(_FENCE.match(line))
        found = None if fenced else _HEADING.fullmatch(line.strip())
        if (found or not line.strip()) and lines and not fenced:
            yield False, "\n".join(lines)
            lines = []
        if found:
            yield True, found["text"]
        elif line.strip():
            lines.append(line.rstrip())
    if lines:  # of a fence that is never closed
        yield False, "\n".join(lines)


def _pieces(block: str, *, longest: int) -> Iterator[str]:
    piece = ""
    for sentence in _SENTENCE.split(block):
        between = "" if not piece or piece[-1] in "。！？" else " "
        if piece and len(piece) + len(between) + len(sentence) > longest:
            yield piece
            piece, between = "", ""
        piece += between + sentence
        while len(piece) > longest:
            yield piece[:longest]
            piece = piece[longest:]
    if piece:
        yield piece


class PassageIndex:
    """
    Finds passages by the terms that they share with a question, those of the heading above them included.

    Raises:
        DocumentError: no passage has a term.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        import bm25s

        self._passages = passages
        held = [terms(f"{each.heading}\n{each.text}") for each in passages]
        if not any(held):
            raise DocumentError("the documents hold no word")
        self._known = {term for each in held for term in each}
        self._bm25 = bm25s.BM25()
        self._bm25.index(held, show_progress=False)

    def find(self, question: str, *, count: int) -> list[Passage]:
        """The best passages, the best first; none that shares no term with the question."""
        asked = [term for term in terms(question) if term in self._known]
        if not asked:
            return []
        places, scores = self._bm25.retrieve(
            [asked], k=min(count, len(self._passages)), show_progress=False, sorted=True
        )
        return [self._passages[place] for place, score in zip(places[0], scores[0], strict=True) if score > 0]


def terms(text: str) -> list[str]:
    """
    What a text is found by: words in lower case and plain width; of writing without spaces, each pair of characters.

    Pairs find Japanese about as well as a dictionary does, and need none (Nie et al. 2000 on Chinese; Lucene's
    CJKBigramFilter).
    """
    found: list[str] = []
    for match in _TERM.finditer(unicodedata.normalize("NFKC", text).casefold()):
        run = match["run"]
        found += [match[0]] if run is None else [run[place : place + 2] for place in range(max(1, len(run) - 1))]
    return found
