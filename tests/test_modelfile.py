"""Modelfiles, read back by the rules of Ollama's own parser."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lib.modelfile import ModelfileError, dropped, kept, named_weights, render_modelfile

STATEMENT = re.compile(
    r"(FROM|TEMPLATE|SYSTEM|LICENSE|PARAMETER \w+|MESSAGE \w+) "
    r'("""(?P<fenced>.*?)"""|"(?P<quoted>[^"]*)"|(?P<bare>[^"\n]*))\n',
    re.S,
)


def read(text: str) -> list[tuple[str, str]]:
    """
    Commands and values as Ollama understands them.

    A value is the rest of the line, or stands between quotes, single or triple, without escapes; characters
    that are not printable vanish, save for spaces, tabs and line ends.
    """
    found, end = [], 0
    while end < len(text):
        match = STATEMENT.match(text, end)
        assert match, f"no statement: {text[end:][:80]!r}"
        value = next(group for group in match.group("fenced", "quoted", "bare") if group is not None)
        found.append((match[1], "".join(each for each in value if each.isprintable() or each in "\t\n\r")))
        end = match.end()
    return found


def render(
    *,
    system: str | None = None,
    parameters: dict[str, Any] | None = None,
    stops: tuple[str, ...] = (),
    template: str | None = None,
    messages: tuple[dict[str, str], ...] = (),
    license_text: str | None = None,
) -> str:
    return render_modelfile(
        gguf_name="m.q4_k_m.gguf",
        template=template,
        system=system,
        messages=messages,
        parameters=parameters or {},
        stops=list(stops),
        license_text=license_text,
    )


def test_a_whole_modelfile() -> None:
    text = render(
        system="You answer briefly.",
        parameters={"temperature": 0.6, "num_ctx": 8192, "stop": ["END"]},
        stops=("<|im_end|>",),
        template='{{ if eq .Role "user" }}\n{{ end }}',
        messages=({"role": "user", "content": "Hi"}, {"role": "assistant", "content": 'Say "yes".'}),
        license_text="Apache License\nVersion 2.0",
    )
    assert text == (
        "FROM ./m.q4_k_m.gguf\n"
        'TEMPLATE """{{ if eq .Role "user" }}\n{{ end }}"""\n'
        "PARAMETER num_ctx 8192\n"
        "PARAMETER temperature 0.6\n"
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "END"\n'
        'SYSTEM "You answer briefly."\n'
        'MESSAGE user "Hi"\n'
        'MESSAGE assistant """Say "yes"."""\n'
        'LICENSE """Apache License\nVersion 2.0"""\n'
    )


def test_the_least() -> None:
    assert render() == "FROM ./m.q4_k_m.gguf\n"


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "",
        " spaces around ",
        "日本語で答えてください。",
        "full\u3000width",
        "no\u00a0break",
        "family 👩\u200d👩\u200d👧",
        'say "yes"',
        'say "yes", then stop.',
        '"quoted" first',
        '""two first',
        "two\nlines",
        "\nfrom the second line\n",
        "tab\tand\r\nreturn",
        "trailing backslash\\",
        "# no comment\nFROM nothing",
        "{{ .System }}",
        'ends with "',
        'a """ b',
        'a """" b',
        '"""',
        '"',
    ],
)
def test_a_text_arrives_as_it_is_or_is_refused(text: str) -> None:
    """Never changed in silence: the script tells of what `kept` changes."""
    for where in ("system", "stop"):
        settings = {"system": text} if where == "system" else {"parameters": {"stop": [text]}}
        try:
            rendered = render(**settings)
        except ModelfileError as error:
            assert f"ollama.{'system' if where == 'system' else 'parameters.stop'}" in str(error)
            assert '"' in text or (where == "stop" and not text.isprintable()), "refused without need"
            continue
        command = "SYSTEM" if where == "system" else "PARAMETER stop"
        assert read(rendered) == [("FROM", "./m.q4_k_m.gguf"), (command, kept(text))]
        assert kept(text) == text or where == "system"


@pytest.mark.parametrize(
    ("text", "left", "told"),
    [
        ("答えは\u3000短く。\n", "答えは 短く。\n", "U+3000"),
        ("no\u00a0break, thin\u2009space", "no break, thin space", "U+00A0, U+2009"),
        ("👩\u200d🔬\ufeff", "👩🔬", "U+200D, U+FEFF"),
        ("a\fb\x00c", "a bc", "U+0000, U+000C"),
        ("tab\tand\r\nlines", "tab\tand\r\nlines", ""),
    ],
)
def test_what_ollama_would_drop(text: str, left: str, told: str) -> None:
    assert (kept(text), dropped(text)) == (left, told)
    assert read(render(system=text))[1:] == [("SYSTEM", left)]
    assert read(render(messages=({"role": "user", "content": text},)))[1:] == [("MESSAGE user", left)]


@pytest.mark.parametrize("text", ['a """ b', 'ends with "', '"""', '"'])
def test_what_the_grammar_cannot_hold_is_refused(text: str) -> None:
    with pytest.raises(ModelfileError, match=r"ollama\.system: a Modelfile cannot hold"):
        render(system=text)


@pytest.mark.parametrize(
    ("value", "written"), [(True, "true"), (False, "false"), (0, "0"), (-1, "-1"), (0.95, "0.95"), (1e-5, "1e-05")]
)
def test_numbers_and_booleans(value: object, written: str) -> None:
    assert read(render(parameters={"use_mmap": value}))[1:] == [("PARAMETER use_mmap", written)]


def test_stops_are_told_once_those_of_the_weights_first() -> None:
    lines = read(render(parameters={"stop": ["END", "</s>", "END"]}, stops=("</s>", "<|eot|>", "</s>")))
    assert [value for command, value in lines if command == "PARAMETER stop"] == ["</s>", "<|eot|>", "END"]


def test_the_order_of_parameters_does_not_matter() -> None:
    assert render(parameters={"top_p": 1, "num_ctx": 2}) == render(parameters={"num_ctx": 2, "top_p": 1})


@pytest.mark.parametrize(
    ("parameters", "said"),
    [("[1]", "found list [1]"), ('{"heat": 1}', "unknown key 'heat'"), ('{"stop": "END"}', "stop: expected list")],
)
def test_wrong_parameters_on_the_command_line(parameters: str, said: str, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "scripts/render_modelfile.py"
    command = [sys.executable, script, "--gguf", "x.gguf", "--output", "x", "--parameters", parameters]
    command += ["--tokenizer", "x", "--report", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "--parameters" in done.stderr and said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (render(system="FROM x", template="FROM y"), "./m.q4_k_m.gguf"),
        ("# a remark\n\nfrom  llama3 \nSYSTEM x", "llama3"),
        ("PARAMETER temperature 1\n", None),
        ("FROM", None),
        ("", None),
    ],
)
def test_the_weights_that_a_modelfile_names(text: str, named: str | None) -> None:
    assert named_weights(text) == named
