"""llama-server for as long as a block lasts: its tokens, its answers, and that nothing of it stays behind."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
import tiny_gguf

from lib import llama_server
from lib.llama_cpp import LlamaCpp
from lib.llama_server import LlamaServer, ServerError, serving

pytestmark = pytest.mark.slow

MODEL = "models/tiny.base.q4_k_m.gguf"
PLAIN = ["What builds the model?", "モデルは何で作りますか？", "a  b\n c", "🦙"]
# Where a text or what follows a special token begins with a space, llama.cpp adds another, transformers does not.
TEXTS = [*PLAIN, " q4_k_m", "Snakemake <|im_end|> です。"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """Every process that is started, with its command."""
    processes: list[subprocess.Popen[str]] = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            processes.append(self)

    monkeypatch.setattr(llama_server.subprocess, "Popen", Recorded)
    return processes


def port_of(process: subprocess.Popen[str]) -> int:
    return int(process.args[process.args.index("--port") + 1])


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def is_alive(pid: int) -> bool:
    """Whether the system knows the process, be it only as one that nobody waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def server(built: Path, llama_cpp: LlamaCpp) -> LlamaServer:
    with serving(built / MODEL, program=llama_cpp.tool("llama-server"), threads=1) as running:
        yield running


@pytest.mark.parametrize("parse_special", [False, True])
def test_tokens_are_those_of_llama_tokenize(
    parse_special: bool, server: LlamaServer, built: Path, llama_cpp: LlamaCpp
) -> None:
    options = ["--no-bos", *([] if parse_special else ["--no-parse-special"])]
    tool = llama_cpp.tool("llama-tokenize")
    expected = [tiny_gguf.run_tokenizer(tool, built / MODEL, text, *options) for text in TEXTS]
    assert [server.tokenize(text, parse_special=parse_special) for text in TEXTS] == expected


def test_tokens_are_those_of_the_checkpoints_tokenizer(server: LlamaServer, tiny_base: Path) -> None:
    tokenizer = tiny_gguf.load_tokenizer(tiny_base)
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in PLAIN]
    assert [server.tokenize(text, parse_special=True) for text in PLAIN] == expected


def test_an_answer_does_not_depend_on_what_was_asked_before(server: LlamaServer) -> None:
    first = [server.answer(text, max_tokens=12) for text in TEXTS]
    again = [server.answer(text, max_tokens=12) for text in reversed(TEXTS)]
    assert first == again[::-1]
    assert len(set(first)) > 1


def test_an_answer_is_not_longer_than_asked_for(server: LlamaServer) -> None:
    short, long = (server.answer(TEXTS[0], max_tokens=count) for count in (2, 12))
    assert long.startswith(short) and len(short) < len(long)


def test_another_process_gives_the_same_answer_and_is_gone_after_the_block(
    server: LlamaServer, built: Path, llama_cpp: LlamaCpp, started: list[subprocess.Popen[str]]
) -> None:
    with serving(built / MODEL, program=llama_cpp.tool("llama-server"), threads=1) as second:
        (process,) = started
        assert second.is_ready() and listens(port_of(process)) and is_alive(process.pid)
        assert second.answer(TEXTS[0], max_tokens=12) == server.answer(TEXTS[0], max_tokens=12)
    assert not is_alive(process.pid) and not listens(port_of(process)) and not second.is_ready()
    with pytest.raises(ServerError, match="^llama-server gave no answer: "):
        second.tokenize("x", parse_special=False)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_it_is_gone_when_the_block_raises(
    error: type[BaseException], built: Path, llama_cpp: LlamaCpp, started: list[subprocess.Popen[str]]
) -> None:
    with pytest.raises(error), serving(built / MODEL, program=llama_cpp.tool("llama-server"), threads=1):
        assert is_alive(started[0].pid)
        raise error
    assert not is_alive(started[0].pid) and not listens(port_of(started[0]))


def test_a_prompt_that_does_not_fit_is_refused_with_the_servers_words(server: LlamaServer) -> None:
    with pytest.raises(ServerError, match=r"(?s)^llama-server refused /v1/chat/completions: .*context size"):
        server.answer("a b " * 3000, max_tokens=2)


@pytest.mark.parametrize("size", [0, 5, 4096, -1])
def test_a_damaged_file_is_an_error_with_the_servers_last_lines(
    size: int, built: Path, llama_cpp: LlamaCpp, started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes((built / MODEL).read_bytes()[:size])
    with (
        pytest.raises(ServerError) as failed,
        serving(damaged, program=llama_cpp.tool("llama-server"), threads=1),
    ):
        pytest.fail("a damaged model was served")
    first, *last = str(failed.value).splitlines()
    assert first == f"llama-server ended with status {started[0].returncode}:"
    assert started[0].returncode != 0 and not is_alive(started[0].pid)
    assert any("error loading model" in line or "failed to load model" in line for line in last), last
