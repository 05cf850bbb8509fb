"""Talking to a GGUF file through llama.cpp's own server, on loopback, for as long as a block lasts."""

from __future__ import annotations

import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx

from lib.console import note
from lib.errors import ModelmillError

START_SECONDS = 600.0  # loading a 20 GB file from a slow disk takes minutes
ANSWER_SECONDS = 600.0


class ServerError(ModelmillError):
    """llama-server did not start, or gave no answer."""


class ServerRefusal(ServerError):
    """llama-server says that it cannot do what it was asked for."""


class LlamaServer:
    """A running llama-server that holds one model."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=ANSWER_SECONDS, trust_env=False)

    def answer(self, question: str, *, max_tokens: int, before: Sequence[Mapping[str, str]] = ()) -> str:
        """
        The model's answer to one question, by greedy decoding through its own chat template.

        Args:
            max_tokens: of the answer.
            before: what was said before it, a system message too.
        """
        messages = [*map(dict, before), {"role": "user", "content": question}]
        body = {"messages": messages, "temperature": 0.0, "max_tokens": max_tokens, "cache_prompt": False}
        return self._post("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def tokenize(self, text: str, *, parse_special: bool, add_special: bool = False) -> list[int]:
        """Token ids of a text; with `add_special` those that the vocabulary puts around any text, as BOS, too."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return self._post("/tokenize", body)["tokens"]

    def render(self, conversation: Sequence[Mapping[str, str]]) -> str:
        """
        A conversation by the chat template inside the file, without a BOS that the vocabulary puts before any text.

        Raises:
            ServerRefusal: the template refuses it.
        """
        return self._post("/apply-template", {"messages": [dict(message) for message in conversation]})["prompt"]

    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        try:
            return self._client.get("/health").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            response = self._client.post(path, json=body)
        except httpx.TransportError as error:
            raise ServerError(f"llama-server gave no answer: {error}") from error
        if response.is_error:
            raise ServerRefusal(f"llama-server refused {path}: {response.text[:300]}")
        return response.json()


@contextmanager
def serving(
    gguf: Path, *, program: Path, threads: int, context: int = 2048, answering: bool = True
) -> Iterator[LlamaServer]:
    """
    Run llama-server on a free port of loopback.

    Args:
        gguf: the model.
        program: llama-server.
        threads: of the computation.
        context: tokens of prompt and answer.
        answering: whether it is asked for answers; else weights are only mapped.

    Raises:
        ServerError: it ended or was not ready in time; the message ends with its last lines.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(program), "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port), "--jinja"]
    command += ["--threads", str(threads), "--ctx-size", str(context), "--parallel", "1", "--no-webui", "--offline"]
    command += [] if answering else ["--no-warmup", "--no-repack", "--n-gpu-layers", "0"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    last: deque[str] = deque(maxlen=8)
    Thread(target=_drain, args=(process, last), daemon=True).start()
    try:
        server = LlamaServer(f"http://127.0.0.1:{port}")
        _wait_until_ready(server, process, last)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _drain(process: subprocess.Popen[str], last: deque[str]) -> None:
    for line in process.stdout or ():
        last.append(line.rstrip())
        note(line.rstrip())


def _wait_until_ready(server: LlamaServer, process: subprocess.Popen[str], last: deque[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not server.is_ready():
        if process.poll() is not None:
            raise ServerError("\n".join([f"llama-server ended with status {process.returncode}:", *last]))
        if time.monotonic() > deadline:
            raise ServerError("\n".join([f"llama-server was not ready after {START_SECONDS:.0f} s:", *last]))
        time.sleep(0.1)
