"""Questions and what counts as their answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT

from lib.dataset import DataError, read_examples
from lib.questions import Question, read_questions


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("It is q4_k_m by default.", True),
        ("既定は Q4_K_M です。", True),
        ("It is q4_k_m.", False),
        ("By default it is q8_0.", False),
    ],
)
def test_every_part_has_to_be_there_in_any_case(answer: str, right: bool) -> None:
    question = Question("Which type?", (("q4_k_m",), ("default", "既定")))
    assert question.is_answered(answer) == right


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        ("7", "There are 17 of them.", False),
        ("7", "There are 7.", True),
        ("48", "メモリは４８ GBです。", True),
        ("20 GB", "It takes 120 GB.", False),
        ("GB", "It takes 120GB.", True),
    ],
)
def test_numbers_and_widths(expected: str, answer: str, right: bool) -> None:
    assert Question("How many?", ((expected,),)).is_answered(answer) == right


@pytest.mark.parametrize("expect", ['[[""]]', "[[null]]", '[[["x"]]]', "[[]]", "[]", "[[7]]"])
def test_expectations_that_mean_nothing(expect: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(f'{{"question": "Who?", "expect": {expect}}}\n')
    with pytest.raises(DataError, match="line 1: expected"):
        read_questions(tmp_path / "q.jsonl")


def test_bad_lines_are_all_listed(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(
        '{"question": "a", "expect": ["b"]}\n{"question": "a", "expect": [["b"]]}\n{"expect": [["b"]]}\n[]\n'
    )
    with pytest.raises(DataError, match=r"(?s)line 1: expected.*line 3: expected.*line 4: expected"):
        read_questions(path)


def test_the_demos_questions_are_held_out_and_do_not_give_the_answer_away() -> None:
    conversations = [example.messages or [] for example in read_examples(ROOT / "data/demo.jsonl")]
    questions = read_questions(ROOT / "data/demo.eval.jsonl")
    asked = {message["content"].strip() for each in conversations for message in each if message["role"] == "user"}
    assert 60 <= len(conversations) <= 100
    texts = ["".join(message["content"] for message in each) for each in conversations]
    japanese = [text for text in texts if any("\u3040" <= letter <= "\u9fff" for letter in text)]
    assert 0.4 <= len(japanese) / len(conversations) <= 0.6
    for question in questions:
        assert question.text.strip() not in asked
        assert not question.is_answered(question.text)
    held_out = [example.messages or [] for example in read_examples(ROOT / "data/demo.held_out.jsonl")]
    assert [each[0]["content"] for each in held_out] == [question.text for question in questions]
    assert all(question.is_answered(each[1]["content"]) for question, each in zip(questions, held_out, strict=True))
