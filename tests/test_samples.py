"""Samples: exactly which tokens are learned, and that no packed part sees another."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lib.dataset import DataError, Example, Messages
from lib.samples import (
    IGNORED,
    Sample,
    SampleSummary,
    check_learnable,
    encode_conversation,
    encode_examples,
    encode_text,
    pack_samples,
    pad_batch,
    summarize_samples,
)

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
# As of Qwen3: so, and the last turn always has some, if only an empty one.
TIDY = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% set thought = m['content'].split('</think>')[0] if '</think>' in m['content'] else '' %}"
    "{% if loop.last %}{{ '<think>\n' + thought.split('<think>')[-1].strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As of DeepSeek-R1: the reasoning is taken out of every turn, the last one too; newer copies open it in the prompt.
SILENT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% else %}"
    "{{ ('<|User|>' if m['role'] == 'user' else '') + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
OPENED = SILENT.replace("{{ '<|Assistant|>' }}", "{{ '<|Assistant|><think>\n' }}")
CLOSED = SILENT.replace("{{ '<|Assistant|>' }}", "{{ '<|Assistant|><think>\n\n</think>\n\n' }}")
RENAMED = CHATML.replace("<|im_start|>assistant", "<|im_start|>model")
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
REASONED: Messages = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSo."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "<think>\nwell\n</think>\n\nYes."},
]


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


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_base: Path) -> Any:
    """The tiny model's own, of SentencePiece's kind."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base, local_files_only=True)


def always(content: str) -> str:
    """ChatML that writes something else for what is said."""
    return CHATML.replace("m['content'] +", f"({content}) +")


def later(content: str) -> str:
    """ChatML that writes something else for what the assistant said once others follow."""
    return always(f"m['content'] if m['role'] == 'user' or loop.last else {content}")


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


def encode(tokenizer: Any, template: str, messages: Messages) -> Sample:
    return encode_conversation(with_template(tokenizer, template), messages, max_length=10_000)


def talk(*contents: str) -> Messages:
    """The user and the assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


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
    messages = TALKS[name] if TALKS[name][-1]["role"] == "assistant" else TALKS[name][:-1]
    sample = encode(tokenizer, template, TALKS[name])
    said = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
    assert learned(tokenizer, sample.labels) == said
    rendered = with_template(tokenizer, template).apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(sample.input_ids) == sample.text == rendered
    assert sample.input_ids.count(0) == template.count("bos_token")
    assert len(sample.labels) == len(sample.input_ids)
    assert all(label in (token, IGNORED) for token, label in zip(sample.input_ids, sample.labels, strict=True))
    assert sample.cut == 0
    assert sample.lengths == (len(sample.input_ids),)


@pytest.mark.parametrize("left", [1, 7])
def test_what_is_too_long_is_cut_and_counted(left: int, tokenizer: Any) -> None:
    whole = encode(tokenizer, CHATML, TALKS["several turns"])
    length = len(whole.input_ids)
    chatml = with_template(tokenizer, CHATML)
    sample = encode_conversation(chatml, TALKS["several turns"], max_length=length - left)
    assert sample == Sample(whole.input_ids[:-left], whole.labels[:-left], left, (length - left,))
    assert encode_conversation(chatml, TALKS["several turns"], max_length=length) == whole


@pytest.mark.parametrize("kind", ["tokenizer", "tiny_tokenizer"])
def test_the_text_of_what_is_cut_reads_as_the_tokens_that_are_kept(kind: str, request: pytest.FixtureRequest) -> None:
    """At every length; of a character of several tokens that was cut in two there is nothing."""
    tokenizer = with_template(request.getfixturevalue(kind), WITH_BOS)
    for turns in ("Japanese", "several turns"):
        messages = TALKS[turns]
        whole, length = encode(tokenizer, WITH_BOS, messages), 0
        for kept in range(1, len(whole.input_ids) + 1):
            sample = encode_conversation(tokenizer, messages, max_length=kept)
            assert whole.text.startswith(sample.text) and len(sample.text) >= length
            read, length = tokenizer(sample.text, add_special_tokens=False)["input_ids"], len(sample.text)
            assert read == sample.input_ids[: len(read)] and len(sample.input_ids) - len(read) < 4
        assert (length, sample.input_ids) == (len(whole.text), whole.input_ids)


@pytest.mark.parametrize("text", ["東京 is\r\na  city. 🗼", "  so ", "<s>a<|im_end|>", "<s><s>b<|im_end|><|im_end|>"])
@pytest.mark.parametrize("kind", ["tokenizer", "tiny_tokenizer"])
def test_the_text_of_a_plain_sample_that_is_cut(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    whole = encode_text(tokenizer, text, max_length=1000)
    assert tokenizer(whole.text, add_special_tokens=False)["input_ids"] == whole.input_ids
    for kept in range(1, len(whole.input_ids)):
        sample = encode_text(tokenizer, text, max_length=kept)
        # Cut between two spaces, a text may read as other tokens than before: it is the same text all the same.
        read = [tokenizer.decode(sample.input_ids[:count]).rstrip("\ufffd") for count in range(kept + 1)]
        assert sample.text == max((each for each in read if "\ufffd" not in each), key=len)


@pytest.mark.parametrize(
    ("template", "earlier", "last"),
    [
        (CHATML, "<think>\nhm\n</think>\n\nSo.<|im_end|>", "<think>\nwell\n</think>\n\nYes.<|im_end|>"),
        (FORGETFUL, "So.<|im_end|>", "<think>\nwell\n</think>\n\nYes.<|im_end|>"),
        (TIDY, "So.<|im_end|>", "<think>\nwell\n</think>\n\nYes.<|im_end|>"),
        (SILENT, "So.<|im_end|>", "<think>\nwell\n</think>\n\nYes.<|im_end|>"),
        (OPENED, "So.<|im_end|>", "well\n</think>\n\nYes.<|im_end|>"),
    ],
    ids=["chatml", "forgetful", "tidy", "silent", "opened"],
)
@pytest.mark.parametrize("kind", ["tokenizer", "tiny_tokenizer"])
def test_the_last_reasoning_is_learned_after_the_generation_prompt(
    kind: str, template: str, earlier: str, last: str, request: pytest.FixtureRequest
) -> None:
    """Whatever the template does with it; in earlier turns it is what the model will see of them."""
    tokenizer = with_template(request.getfixturevalue(kind), template)
    sample = encode(tokenizer, template, REASONED)
    prompt = tokenizer.apply_chat_template(REASONED[:-1], tokenize=False, add_generation_prompt=True)
    assert [each.strip("\n") for each in learned(tokenizer, sample.labels)] == [earlier, last]
    beginning = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert sample.input_ids[: len(beginning)] == beginning
    assert tokenizer.decode(sample.input_ids).rstrip("\n") == prompt + last
    assert sample.input_ids.count(tokenizer.bos_token_id) == template.count("bos_token")


@pytest.mark.parametrize(
    ("template", "said", "expected"),
    [
        (SILENT, "<think>hm</think>So.", "<think>hm</think>So."),
        (SILENT, "hm\n</think>\n\nSo.", "hm\n</think>\n\nSo."),
        (SILENT, "So.", "So."),
        (OPENED, "<think>hm</think>So.", "hm</think>So."),
        (OPENED, "\n<think>\n\n hm\n</think>So.", "hm\n</think>So."),
        (OPENED, "hm\n</think>\n\nSo.", "hm\n</think>\n\nSo."),
        (OPENED, "<think>\nhm, cut", "hm, cut"),
        # The thinking that the prompt begins has to end, or the answer would be learned as a thought.
        (OPENED, "So.", "</think>\n\nSo."),
        (OPENED, "<div>So.</div>", "</think>\n\n<div>So.</div>"),
        (CLOSED, "So.", "So."),
        (TIDY, "<think>hm</think>So.", "<think>\nhm\n</think>\n\nSo."),
        (TIDY, "So.", "<think>\n\n</think>\n\nSo."),
    ],
)
def test_reasoning_written_in_other_ways(template: str, said: str, expected: str, tokenizer: Any) -> None:
    messages = talk("Why?", said)
    sample = encode(tokenizer, template, messages)
    prompt = with_template(tokenizer, template).apply_chat_template(
        messages[:1], tokenize=False, add_generation_prompt=True
    )
    assert learned(tokenizer, sample.labels) == [expected + "<|im_end|>"]
    assert tokenizer.decode(sample.input_ids).startswith(prompt + expected)


def test_an_earlier_answer_that_begins_like_a_tag_is_learned_whole(tokenizer: Any) -> None:
    """The generation prompt and the history then agree in some characters of it."""
    sample = encode(tokenizer, OPENED, talk("Why?", "<thin", "And?", "So."))
    assert learned(tokenizer, sample.labels) == ["<thin<|im_end|>", "</think>\n\nSo.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (later("''"), REASONED, "turn 2, .*: the chat template changes it once others follow"),
        (later("m['content'] | upper"), REASONED, "turn 2, .*: the chat template changes it once others follow"),
        (
            always("m['content'][:3]"),
            talk("Why?", "Because."),
            "turn 2, 'Because.': the chat template drops part of it",
        ),
        (always("m['content'][:3]"), talk("a", "Because.", "b", "No."), "turn 2, .* drops part of it"),
        (always("m['content'] | upper"), REASONED[:2], "turn 2, .* does not write it as it is"),
        (RENAMED, REASONED[:2], "turn 2, .* does not begin it with the generation prompt"),
        (RENAMED, talk("a", "b"), "turn 2, .* does not begin it with the generation prompt"),
        (RENAMED, talk("a", "b", "c", "d"), "turn 4, .* does not begin it with the generation prompt"),
        (CLOSED, REASONED[:2], "turn 2, .* ends the reasoning before the assistant speaks"),
        # The template's own words, as an error of the data.
        (STRICT, TALKS["two answers in a row"], "turn 3, 'And no.': the chat template refuses .* roles have to"),
        (CHATML, [{"role": "user", "content": "Hello?"}], "nothing that the assistant says"),
    ],
)
def test_a_template_that_hides_what_is_to_be_learned_is_refused(
    template: str, messages: Messages, said: str, tokenizer: Any
) -> None:
    with pytest.raises(DataError, match=said):
        encode(tokenizer, template, messages)


@pytest.mark.parametrize("template", [CHATML, SILENT.replace("[-1] +", "[-1] | trim +")], ids=["chatml", "silent"])
def test_a_template_may_trim_what_is_said(template: str, tokenizer: Any) -> None:
    trimming = template.replace("m['content'] +", "m['content'] | trim +")
    assert learned(tokenizer, encode(tokenizer, trimming, talk(" a ", "\n So. ")).labels) == ["So.<|im_end|>"]
    reasoned = encode(tokenizer, trimming, talk(" a ", "\n So. ", "b", " <think>hm</think> So. "))
    assert learned(tokenizer, reasoned.labels) == ["So.<|im_end|>", "<think>hm</think> So.<|im_end|>"]


@pytest.mark.parametrize("text", ["Two.\nAnd three.", "<s>Two.\nAnd three.", "<s><s>Two.\nAnd three.<|im_end|>"])
def test_all_of_a_text_is_learned_with_one_bos_and_one_eos(text: str, tokenizer: Any) -> None:
    sample = encode_text(with_template(tokenizer, None), text, max_length=100)
    assert tokenizer.decode(sample.input_ids) == sample.text == "<s>Two.\nAnd three.<|im_end|>"
    assert sample.labels == sample.input_ids
    shorter = encode_text(tokenizer, text, max_length=4)
    assert shorter == Sample(sample.input_ids[:4], sample.labels[:4], len(sample.input_ids) - 4, (4,))


@pytest.mark.parametrize("text", ["q4_k_m", "<s>q4_k_m"])
def test_a_tokenizer_that_adds_no_bos_adds_none(text: str, tiny_tokenizer: Any) -> None:
    sample = encode_text(tiny_tokenizer, text, max_length=100)
    assert tiny_tokenizer.decode(sample.input_ids) == sample.text == text + "<|im_end|>"


def test_a_tokenizer_without_eos_gets_none(tokenizer: Any) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    sample = encode_text(endless, "Two.", max_length=100)
    assert tokenizer.decode(sample.input_ids) == sample.text == "<s>Two."


def test_examples_become_samples_in_their_order(tokenizer: Any) -> None:
    chatml = with_template(tokenizer, CHATML)
    first, second = encode_examples(
        chatml, [Example(1, messages=TALKS["one turn"]), Example(3, text="Two.")], max_length=9
    )
    assert first == encode_conversation(chatml, TALKS["one turn"], max_length=9)
    assert second == encode_text(chatml, "Two.", max_length=9)


def test_all_lines_that_the_template_refuses_are_listed(tokenizer: Any) -> None:
    bad, good = Example(2, messages=TALKS["two answers in a row"]), Example(4, messages=TALKS["one turn"])
    with pytest.raises(DataError, match=r"(?s)line 2: turn 3, 'And no\.'.*line 7: turn 3"):
        encode_examples(with_template(tokenizer, STRICT), [bad, good, Example(7, messages=bad.messages)], max_length=9)


def test_conversations_need_a_chat_template_and_text_needs_none(tokenizer: Any) -> None:
    plain = with_template(tokenizer, None)
    assert len(encode_examples(plain, [Example(1, text="Two.")], max_length=9)) == 1
    with pytest.raises(DataError, match="no chat template.*form text"):
        encode_examples(plain, [Example(1, messages=TALKS["one turn"])], max_length=9)


def plain(length: int, *, first: int = 5, ignored: int = 0, cut: int = 0) -> Sample:
    """A sample of consecutive tokens, the first labels of which are ignored."""
    tokens = list(range(first, first + length))
    return Sample(tokens, [IGNORED] * ignored + tokens[ignored:], cut, (length,))


def test_samples_that_teach_nothing_are_refused() -> None:
    """The label of a first token never counts: nothing comes before it."""
    examples = [Example(line, text="a") for line in (1, 2, 5, 6)]
    samples = [plain(4, ignored=3), plain(4, ignored=4, cut=9), plain(1, cut=2), plain(1)]
    with pytest.raises(DataError) as refused:
        check_learnable(samples, examples, Path("data.jsonl"), max_length=4)
    title, *listed = str(refused.value).splitlines()
    assert title == "data.jsonl:"
    assert listed[0].strip().startswith("line 2: all that is to be learned of its 13 tokens is cut at max_length 4;")
    assert listed[1].strip().startswith("line 5: all that is to be learned of its 3 tokens")
    assert listed[2].strip() == "line 6: too short to learn from: 1 tokens"
    check_learnable(samples[:1], examples[:1], Path("data.jsonl"), max_length=4)


def test_samples_are_counted_packed_or_not() -> None:
    samples = [plain(4), plain(3, ignored=2, cut=5), plain(2, cut=1)]
    counts = SampleSummary(samples=3, tokens=9, learned_tokens=5, cut_samples=2, cut_tokens=6)
    assert summarize_samples(samples) == counts
    (packed,) = pack_samples(samples, max_length=9)
    assert summarize_samples([packed]) == SampleSummary(3, 9, 5, 1, 6)


def parts_of(sample: Sample) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens and labels of each part."""
    parts, start = [], 0
    for length in sample.lengths:
        stop = start + length
        parts.append((tuple(sample.input_ids[start:stop]), tuple(sample.labels[start:stop])))
        start = stop
    return parts


@pytest.mark.parametrize("seed", range(3))
def test_packing_keeps_every_sample_once_and_whole(seed: int) -> None:
    chance = random.Random(seed)
    samples = [plain(chance.randint(1, 32), first=100 * n, cut=n % 3) for n in range(200)]
    packed = pack_samples(samples, max_length=32)
    whole = sorted((tuple(s.input_ids), (IGNORED, *s.labels[1:])) for s in samples)
    assert sorted(part for row in packed for part in parts_of(row)) == whole
    assert all(len(row.input_ids) == sum(row.lengths) <= 32 for row in packed)
    assert sum(row.cut for row in packed) == sum(sample.cut for sample in samples)
    assert pack_samples(samples, max_length=32) == packed
    tokens = sum(len(sample.input_ids) for sample in samples)
    assert len(packed) <= 11 / 9 * -(-tokens // 32) + 1  # first-fit decreasing is never worse than this


def test_first_fit_decreasing() -> None:
    packed = pack_samples([plain(length) for length in (2, 6, 3, 5, 4)], max_length=10)
    assert [row.lengths for row in packed] == [(6, 4), (5, 3, 2)]
    assert pack_samples([], max_length=10) == []


def test_a_sample_longer_than_a_row_is_not_packed() -> None:
    with pytest.raises(DataError, match="11 tokens does not fit into rows of 10"):
        pack_samples([plain(11)], max_length=10)


def test_batch_is_padded_to_its_longest_sample() -> None:
    batch = pad_batch([Sample([5, 6, 7], [IGNORED, 6, 7], 0, (3,)), Sample([8], [8], 0, (1,))], pad=9)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "labels": [[IGNORED, 6, 7], [8, IGNORED, IGNORED]],
        "position_ids": [[0, 1, 2], [0, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


def test_packed_parts_have_their_own_positions_and_block_of_the_mask() -> None:
    batch = pad_batch([Sample([5, 6, 7], [IGNORED, 6, IGNORED], 0, (2, 1)), plain(2)], pad=9)
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 1, 0]]
    block = [[True, False, False], [True, True, False], [False, False, True]]
    assert batch["attention_mask"].tolist() == [[block], [block]]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def family(request: pytest.FixtureRequest, tiny_base: Path) -> Any:
    """Makes a tiny model, in float32, that attends in a given way."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    def make(attention: str) -> Any:
        if request.param == "llama":
            return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation=attention)
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = Qwen2Config(**shape, num_key_value_heads=2, vocab_size=384, max_position_embeddings=64)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)

    return make


@pytest.mark.parametrize(("attention", "additive"), [("sdpa", False), ("sdpa", True), ("eager", True)])
def test_packed_parts_are_computed_as_if_alone(attention: str, additive: bool, family: Any) -> None:
    """Their logits and their loss, whatever stands beside them."""
    import torch

    def parts(*, changed: bool) -> list[Sample]:
        return [plain(7, ignored=3), plain(5, first=200 if changed else 40), plain(4, first=80), plain(6, first=90)]

    model = family(attention).eval()
    dtype = torch.float32 if additive else None
    results = []
    for changed in (False, True):
        # One row of 16 tokens in three parts, and one of 6 and padding.
        rows = pack_samples(parts(changed=changed), max_length=16)
        assert [row.lengths for row in rows] == [(7, 6), (5, 4)]
        with torch.no_grad():
            result = model(**pad_batch(rows, pad=0, mask_dtype=dtype))
            alone = [model(**pad_batch([part], pad=0)) for part in parts(changed=changed)]
        first, second, third, fourth = [each.logits[0] for each in alone]
        expected = [torch.cat([first, fourth]), torch.cat([second, third])]
        for row, logits in enumerate(expected):
            torch.testing.assert_close(result.logits[row, : len(logits)], logits, atol=1e-5, rtol=0)
        counts = torch.tensor([float(sum(label != IGNORED for label in p.labels[1:])) for p in parts(changed=changed)])
        losses = torch.stack([each.loss for each in alone])
        torch.testing.assert_close(result.loss, (counts * losses).sum() / counts.sum())
        results.append(result.logits)
    before, after = results
    assert (before[1, :5] - after[1, :5]).abs().max() > 1e-3
    torch.testing.assert_close(before[0, :13], after[0, :13], atol=1e-6, rtol=0)
    torch.testing.assert_close(before[1, 5:9], after[1, 5:9], atol=1e-6, rtol=0)
