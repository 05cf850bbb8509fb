"""Training data: which forms a file may have, and what is said of one that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from lib.dataset import FORMS, MOST_LISTED, DataError, Example, read_examples, read_jsonl


def line(*messages: tuple[str, str]) -> str:
    """A line of training data."""
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in messages]}, ensure_ascii=False)


GOOD = line(("user", "a"), ("assistant", "b"))


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "talks.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def problems(path: Path) -> list[str]:
    with pytest.raises(DataError) as refused:
        read_examples(path)
    title, *lines = str(refused.value).splitlines()
    assert title == f"{path}:"
    return [each.strip() for each in lines]


def test_held_out_examples_that_are_trained_on_are_told(tmp_path: Path) -> None:
    """In whatever form: they would be taken for what tuning brought."""
    write(tmp_path, GOOD)
    command = [sys.executable, str(ROOT / "scripts/check_data.py"), "--data", "talks.jsonl", "--output", "o.json"]
    known, unknown = '{"question": "a", "answer": "b"}\n', '{"question": "a", "answer": "c"}\n'
    for content, told in ((known + unknown, True), (unknown, False)):
        (tmp_path / "held.jsonl").write_text(content)
        done = subprocess.run([*command, "--eval-data=held.jsonl"], cwd=tmp_path, capture_output=True, text=True)
        assert ("held.jsonl: 1 of 2 examples stand in talks.jsonl as well" in done.stderr) == told
        assert done.returncode == 0, done.stderr


def test_lines_are_read_with_their_numbers(tmp_path: Path) -> None:
    assert read_jsonl(write(tmp_path, '\n{"a": 1}\n   \n\n[2]\n')) == [(2, {"a": 1}), (5, [2])]


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_conversations_are_read(mark: str, ending: str, tmp_path: Path) -> None:
    second = line(("system", "s"), ("user", "会話"), ("assistant", "はい"))
    first, last = read_examples(write(tmp_path, f"{mark}{GOOD}\n\n{second}{ending}"))
    assert (first.line, last.line) == (1, 3)
    assert [message["role"] for message in first.messages or []] == ["user", "assistant"]
    assert [message["content"] for message in last.messages or []] == ["s", "会話", "はい"]
    assert first.text is None


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        ({"prompt": "Well?", "completion": "Yes."}, "Well?"),
        ({"question": "Well?", "answer": "Yes."}, "Well?"),
        ({"instruction": "Well?", "output": "Yes."}, "Well?"),
        ({"instruction": "Well?", "input": "", "output": "Yes."}, "Well?"),
        ({"instruction": "Well?", "input": None, "output": "Yes."}, "Well?"),
        ({"instruction": "Translate.", "input": " 会話 ", "output": "Yes."}, "Translate.\n\n 会話 "),
        ({"instruction": "", "input": "Well?", "output": "Yes."}, "Well?"),
        # Keys of another form make no line of it while one is missing, as in many published sets.
        ({"prompt": "Well?", "completion": "Yes.", "id": 7, "answer": "No.", "text": None}, "Well?"),
    ],
)
def test_other_forms_become_conversations(value: dict[str, Any], asked: str, tmp_path: Path) -> None:
    assert read_examples(write(tmp_path, json.dumps(value))) == [
        Example(1, messages=[{"role": "user", "content": asked}, {"role": "assistant", "content": "Yes."}])
    ]


def test_text_stays_text(tmp_path: Path) -> None:
    lines = '{"text": " as it is\\n", "source": "a book"}\n\n{"text": "本文", "input": "b"}\n'
    assert read_examples(write(tmp_path, lines)) == [Example(1, text=" as it is\n"), Example(3, text="本文")]


def test_a_file_of_several_forms_is_refused(tmp_path: Path) -> None:
    """Beside all else that is wrong with it; the line of each form is the first one."""
    lines = [GOOD, GOOD, '{"text": "a"}', '{"prompt": "a", "completion": ""}', GOOD, "{"]
    mixed, *others = problems(write(tmp_path, "\n".join(lines)))
    assert mixed == (
        "the lines are of more than one form: messages (first in line 1), text (first in line 3), "
        "prompt/completion (first in line 4); give the file one of them"
    )
    assert [each.partition(":")[0] for each in others] == ["line 4", "line 6"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_only_a_line_feed_ends_a_line(character: str, tmp_path: Path) -> None:
    """JSON may hold these as they are; text from the web does."""
    text = f"first{character}second"
    (example,) = read_examples(write(tmp_path, line(("user", "a"), ("assistant", text))))
    assert example.messages and example.messages[1]["content"] == text


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "no JSON: "),
        ("[" * 100_000, "no JSON that can be read: "),
        ("1" * 5_000, "no JSON that can be read: "),
        ("[1, 2]", "expected an object with messages, prompt and completion, question and answer"),
        ('"text"', "expected an object with messages"),
        ("{}", "expected messages, prompt and completion"),
        ('{"messages": null}', "expected messages"),
        ('{"prompt": "a", "answer": "b"}', "expected messages"),
        ('{"input": "a", "output": "b"}', "expected messages"),
        ('{"text": "a", "prompt": "a", "completion": "b"}', "fits more than one form: prompt/completion and text"),
        ('{"prompt": "a", "completion": " "}', "completion is empty: there would be nothing to learn"),
        ('{"prompt": 1, "completion": ["b"]}', "prompt and completion: expected a text"),
        ('{"instruction": "a", "input": 0, "output": "b"}', "input: expected a text"),
        ('{"text": " "}', "text has to be a text, and not an empty one"),
        ('{"text": ["a"]}', "text has to be a text, and not an empty one"),
        ('{"messages": []}', 'expected {"messages": ['),
        ('{"messages": "a"}', 'expected {"messages": ['),
        ('{"messages": ["a"]}', "every message needs a role out of system, user, assistant"),
        ('{"messages": [{"content": "a"}]}', "every message needs a role out of system, user, assistant"),
        (line(("human", "a"), ("assistant", "b")), "every message needs a role out of system, user, assistant"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "every message needs a role"),
        ('{"messages": [{"role": "assistant"}]}', "every message needs a text as its content"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "every message needs a text as its content"),
        # Half of an emoji, as a tool leaves it that cuts text by UTF-16 units; no tokenizer takes it.
        (
            r'{"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "b"}]}',
            "every message",
        ),
        (line(("assistant", "a"), ("user", "b"), ("assistant", "c")), "the assistant speaks first"),
        (line(("user", "a")), "nothing that the assistant says"),
        (line(("user", "a"), ("assistant", " \n")), "nothing that the assistant says"),
    ],
)
def test_a_bad_line_is_named(bad: str, said: str, tmp_path: Path) -> None:
    listed = problems(write(tmp_path, f"{GOOD}\n\n{bad}\n{GOOD}\n"))
    (problem,) = [each for each in listed if not each.startswith("the lines are of more than one form")]
    assert problem.startswith(f"line 3: {said}")


def test_all_bad_lines_are_listed(tmp_path: Path) -> None:
    user_only = line(("user", "a"))
    listed = problems(write(tmp_path, f"{user_only}\n{GOOD}\n[]\n{{\n{user_only}\n".encode() + b"\xff\n"))
    assert [each.partition(":")[0] for each in listed] == ["line 1", "line 3", "line 4", "line 5", "line 6"]


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    listed = problems(write(tmp_path, "[]\n" * (MOST_LISTED + 3)))
    assert len(listed) == MOST_LISTED + 1
    assert listed[-1] == "and 3 more"


@pytest.mark.parametrize("content", ["", "\n\n", "  \n"])
def test_an_empty_file(content: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"talks\.jsonl is empty"):
        read_examples(write(tmp_path, content))


def test_another_encoding_is_said(tmp_path: Path) -> None:
    """Shift-JIS is still common in Japan."""
    path = write(tmp_path, f"{GOOD}\n{line(('user', '会話'), ('assistant', 'はい'))}\n".encode("shift-jis"))
    with pytest.raises(DataError, match="UTF-8") as refused:
        read_examples(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_said_to_be_one(form: str, tmp_path: Path) -> None:
    """Or the error would keep a form from those who look for it."""
    (problem,) = problems(write(tmp_path, "{}"))
    assert all(key in problem for key in FORMS[form])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "tool_calls"])
def test_what_templates_pass_over_is_refused(key: str, tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "Four.", key: "Two and two."}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "2 + 2?"}, said]}) + "\n")
    with pytest.raises(DataError, match=f"line 1: {key} would be lost"):
        read_examples(path)
    said[key] = None
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "2 + 2?"}, said]}) + "\n")
    assert len(read_examples(path)) == 1
