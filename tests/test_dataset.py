"""Conversations: what is wrong with a file, and exactly which tokens are learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lib.dataset import IGNORED, MOST_LISTED, DataError, Messages, encode_conversation, read_conversations, read_jsonl

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
# As of many published models: a system prompt of their own if there is none.
WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
# As of models that take reasoning out of earlier turns.
FORGETFUL = CHATML.replace("m['content'] +", "(m['content'] if loop.last else m['content'].split('</think>')[-1]) +")
# As of DeepSeek-R1: the reasoning is taken out of every turn, the last one too.
SILENT = CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1] +")
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles have to alternate') }}{% endif %}{% endfor %}" + CHATML
)
TALKS: dict[str, Messages] = {
    "one turn": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good morning."}],
    "several turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two.\nAnd three."},
        {"role": "user", "content": "assistant\nFour?"},
        {"role": "assistant", "content": "  five, with spaces  "},
    ],
    "Japanese": [
        {"role": "user", "content": "日本の首都は？"},
        {"role": "assistant", "content": "東京です。🗼"},
        {"role": "user", "content": "ありがとう"},
        {"role": "assistant", "content": "どういたしまして。"},
    ],
    "two answers in a row": [
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "assistant", "content": "And no."},
    ],
    "ends with the user": [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye."},
    ],
}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of a few hundred tokens, which adds BOS by itself, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    marks = ["<s>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = [message["content"] for talk in TALKS.values() for message in talk]
    backend.train_from_iterator([*text, "system\nuser\nassistant\n"] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def learned(tokenizer: Any, labels: Sequence[int]) -> list[str]:
    """The runs of tokens that are learned, as text."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, WITH_SYSTEM], ids=["chatml", "bos", "system"])
@pytest.mark.parametrize("name", TALKS)
def test_exactly_what_the_assistant_says_is_learned(name: str, template: str, tokenizer: Any) -> None:
    """With its end mark, or the model would never stop; without the header, which the user's side writes."""
    talk = TALKS[name]
    sample = encode_conversation(with_template(tokenizer, template), talk, max_length=10_000)
    said = [message["content"] + "<|im_end|>" for message in talk if message["role"] == "assistant"]
    assert learned(tokenizer, sample.labels) == said
    rendered = tokenizer.apply_chat_template(talk, tokenize=False)
    assert tokenizer.decode(sample.input_ids) == rendered
    assert sample.input_ids.count(0) == template.count("bos_token")
    assert len(sample.labels) == len(sample.input_ids)
    assert all(label in (token, IGNORED) for token, label in zip(sample.input_ids, sample.labels, strict=True))
    assert sample.cut == 0


@pytest.mark.parametrize("left", [1, 7])
def test_what_is_too_long_is_cut_and_counted(left: int, tokenizer: Any) -> None:
    whole = encode_conversation(with_template(tokenizer, CHATML), TALKS["several turns"], max_length=10_000)
    length = len(whole.input_ids)
    sample = encode_conversation(tokenizer, TALKS["several turns"], max_length=length - left)
    assert sample.cut == left
    assert sample.input_ids == whole.input_ids[:-left]
    assert sample.labels == whole.labels[:-left]
    assert encode_conversation(tokenizer, TALKS["several turns"], max_length=length).cut == 0


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer: Any) -> None:
    talk = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "<think>hm</think>So."},
        {"role": "user", "content": "Really?"},
        {"role": "assistant", "content": "<think>well</think>Yes."},
    ]
    with pytest.raises(DataError, match="the chat template changes turn 2 once others follow"):
        encode_conversation(with_template(tokenizer, FORGETFUL), talk, max_length=100)
    assert encode_conversation(tokenizer, talk[:2], max_length=100).cut == 0


def test_a_template_that_drops_what_is_to_be_learned_is_refused(tokenizer: Any) -> None:
    """Or a model would silently be trained without the reasoning in its data."""
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>hm</think>So."}]
    with pytest.raises(DataError, match="chat template"):
        encode_conversation(with_template(tokenizer, SILENT), talk, max_length=100)


def test_a_template_may_trim_what_is_said(tokenizer: Any) -> None:
    trimming = CHATML.replace("m['content'] +", "m['content'] | trim +")
    talk = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "\n So. "}]
    sample = encode_conversation(with_template(tokenizer, trimming), talk, max_length=100)
    assert learned(tokenizer, sample.labels) == ["So.<|im_end|>"]


def test_a_conversation_that_the_template_refuses(tokenizer: Any) -> None:
    """The template's own words, as an error of the data."""
    with pytest.raises(DataError, match="roles have to alternate"):
        encode_conversation(with_template(tokenizer, STRICT), TALKS["two answers in a row"], max_length=100)


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
        read_conversations(path)
    title, *lines = str(refused.value).splitlines()
    assert title == f"{path}:"
    return [each.strip() for each in lines]


def test_lines_are_read_with_their_numbers(tmp_path: Path) -> None:
    assert read_jsonl(write(tmp_path, '\n{"a": 1}\n   \n\n[2]\n')) == [(2, {"a": 1}), (5, [2])]


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_conversations_are_read(ending: str, tmp_path: Path) -> None:
    second = line(("system", "s"), ("user", "会話"), ("assistant", "はい"))
    conversations = read_conversations(write(tmp_path, f"{GOOD}\n\n{second}{ending}"))
    assert [[message["role"] for message in talk] for talk in conversations] == [
        ["user", "assistant"],
        ["system", "user", "assistant"],
    ]
    assert conversations[1][1]["content"] == "会話"


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_only_a_line_feed_ends_a_line(character: str, tmp_path: Path) -> None:
    """JSON may hold these as they are; text from the web does."""
    text = f"first{character}second"
    (talk,) = read_conversations(write(tmp_path, line(("user", "a"), ("assistant", text))))
    assert talk[1]["content"] == text


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "no JSON: "),
        ("[1, 2]", 'expected {"messages": ['),
        ('"text"', 'expected {"messages": ['),
        ('{"prompt": "a", "completion": "b"}', 'expected {"messages": ['),
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
        (line(("user", "a")), "nothing that the assistant says"),
        (line(("user", "a"), ("assistant", " \n")), "nothing that the assistant says"),
    ],
)
def test_a_bad_line_is_named(bad: str, said: str, tmp_path: Path) -> None:
    (problem,) = problems(write(tmp_path, f"{GOOD}\n\n{bad}\n{GOOD}\n"))
    assert problem.startswith(f"line 3: {said}")


def test_all_bad_lines_are_listed(tmp_path: Path) -> None:
    user_only = line(("user", "a"))
    listed = problems(write(tmp_path, f"{user_only}\n{GOOD}\n[]\n{GOOD}\n{user_only}\n"))
    assert [each.partition(":")[0] for each in listed] == ["line 1", "line 3", "line 5"]


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    listed = problems(write(tmp_path, "[]\n" * (MOST_LISTED + 3)))
    assert len(listed) == MOST_LISTED + 1
    assert listed[-1] == "and 3 more"


@pytest.mark.parametrize("content", ["", "\n\n", "  \n"])
def test_an_empty_file(content: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"talks\.jsonl is empty"):
        read_conversations(write(tmp_path, content))


def test_another_encoding_is_said(tmp_path: Path) -> None:
    """Shift-JIS is still common in Japan."""
    path = write(tmp_path, f"{GOOD}\n{line(('user', '会話'), ('assistant', 'はい'))}\n".encode("shift-jis"))
    with pytest.raises(DataError, match="UTF-8") as refused:
        read_conversations(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, WITH_SYSTEM], ids=["chatml", "bos", "system"])
def test_a_conversation_that_the_assistant_begins(template: str, tokenizer: Any, tmp_path: Path) -> None:
    """Refused as data or learned as it is; transformers renders no empty conversation, so nothing stands before."""
    path = write(tmp_path, line(("assistant", "Welcome!"), ("user", "Hello?"), ("assistant", "Good morning.")))
    try:
        (talk,) = read_conversations(path)
        sample = encode_conversation(with_template(tokenizer, template), talk, max_length=100)
    except DataError as error:
        assert "assistant" in str(error)
    else:
        assert learned(tokenizer, sample.labels) == ["Welcome!<|im_end|>", "Good morning.<|im_end|>"]
