"""Held-out questions: what is asked, and which texts count as an answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lib.dataset import read_jsonl, refuse


@dataclass(frozen=True)
class Question:
    """A question, and for each part of its answer the texts that count as that part."""

    text: str
    expect: tuple[tuple[str, ...], ...]

    def is_answered(self, answer: str) -> bool:
        """Whether every part is in the answer, in any case."""
        folded = answer.casefold()
        return all(any(text.casefold() in folded for text in part) for part in self.expect)


def read_questions(path: Path) -> list[Question]:
    """
    Read held-out questions, one {"question": …, "expect": [[…], …]} a line.

    Raises:
        DataError: listing every bad line.
    """
    questions, problems = [], []
    for number, value in read_jsonl(path):
        expect = value.get("expect") if isinstance(value, dict) else None
        parts_are_lists = isinstance(expect, list) and all(isinstance(part, list) and part for part in expect)
        if not parts_are_lists or not expect or not isinstance(value.get("question"), str):
            problems.append(f'line {number}: expected {{"question": …, "expect": [["a text that counts", …], …]}}')
        else:
            questions.append(Question(value["question"], tuple(tuple(map(str, part)) for part in expect)))
    refuse(path, problems)
    return questions
