"""Held-out questions: what is asked, and which texts count as an answer."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from lib.dataset import read_jsonl, refuse


@dataclass(frozen=True)
class Question:
    """A question, and for each part of its answer the texts that count as that part."""

    text: str
    expect: tuple[tuple[str, ...], ...]

    def is_answered(self, answer: str) -> bool:
        """Whether every part is in the answer, in any case and width; a number not as a part of another."""
        folded = _fold(answer)
        return all(any(_holds(folded, _fold(text)) for text in part) for part in self.expect)


def read_questions(path: Path) -> list[Question]:
    """
    Read held-out questions, one {"question": …, "expect": [[…], …]} a line.

    Raises:
        DataError: listing every bad line.
    """
    questions, problems = [], []
    for number, value in read_jsonl(path):
        expect = value.get("expect") if isinstance(value, dict) else None
        if not _are_parts(expect) or not _is_text(value.get("question")):
            problems.append(f'line {number}: expected {{"question": …, "expect": [["a text that counts", …], …]}}')
        else:
            questions.append(Question(value["question"], tuple(map(tuple, expect))))
    refuse(path, problems)
    return questions


def _are_parts(expect: object) -> bool:
    parts_are_lists = isinstance(expect, list) and all(isinstance(part, list) and part for part in expect)
    return parts_are_lists and bool(expect) and all(_is_text(text) for part in expect for text in part)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _holds(answer: str, text: str) -> bool:
    before = r"(?<![0-9])" if text[0].isdecimal() else ""
    after = r"(?![0-9])" if text[-1].isdecimal() else ""
    return re.search(f"{before}{re.escape(text)}{after}", answer) is not None
