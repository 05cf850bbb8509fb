"""
An Ollama server: registering models, and talking to them.

Blobs go by HEAD and POST with httpx, since the official client reads a file twice, shows nothing and sends what the
server has already; all else goes through that client, so that OLLAMA_HOST and OLLAMA_API_KEY mean what they mean to it.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ollama

from lib.console import progress
from lib.errors import ModelmillError, first_line
from lib.machine import model_store

OLDEST = (0, 5, 5)  # the first whose /api/create takes `files` and `from`
CONNECT_SECONDS = 10.0
PIECE_BYTES = 1 << 20
# Upload, the copy that llama-quantize writes, and the layer; some 79 GB were seen for 19.9.
COPIES = 4
FULL = ("no space left", "disk quota", "not enough disk")


class OllamaError(ModelmillError):
    """There is no server, it refuses, or it holds something else than was registered."""


@dataclass(frozen=True)
class Answer:
    """What a model said: the text, its reasoning if the server tells it apart, tokens, and seconds they took."""

    text: str
    reasoning: str
    tokens: int
    seconds: float


class OllamaServer:
    """The server that OLLAMA_HOST names, or else the one on this machine."""

    def __init__(self) -> None:
        try:
            self._client = ollama.Client(
                timeout=httpx.Timeout(None, connect=CONNECT_SECONDS), event_hooks={"response": [_raise_in_band]}
            )
        except ValueError as error:
            raise OllamaError(f"OLLAMA_HOST is {os.environ.get('OLLAMA_HOST')!r}: {error}") from error
        # The client keeps its connection to itself; blobs have to go to the same place with the same key.
        self._http: httpx.Client = self._client._client
        self.url = str(self._http.base_url).rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine."""
        host = self._http.base_url.host
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host == "localhost"
        return address.is_loopback or address.is_unspecified

    def version(self) -> str:
        """
        The server's version.

        Raises:
            OllamaError: no server answers, or it is older than OLDEST.
        """
        with self._told("tell its version"):
            version = str(self._http.get("/api/version").raise_for_status().json()["version"])
        numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
        # A build of one's own calls itself 0.0.0.
        if any(numbers) and numbers < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise OllamaError(f"the server at {self.url} is Ollama {version}; {oldest} or later is needed: update it")
        return version

    def has_blob(self, sha256: str) -> bool:
        """Whether the server holds a file with that digest."""
        with self._told("look for a file"):
            response = self._http.head(f"/api/blobs/sha256:{sha256}")
            if response.status_code == httpx.codes.NOT_FOUND:
                return False
            response.raise_for_status()
            return True

    def upload(self, path: Path, sha256: str) -> None:
        """Send a file, showing how far it is."""
        size = path.stat().st_size
        with self._told(f"take {path}"), progress(f"uploading {path.name}", total=size, unit="B") as bar:

            def pieces() -> Iterator[bytes]:
                with path.open("rb", buffering=0) as file:
                    while piece := file.read(PIECE_BYTES):
                        yield piece
                        bar.advance(len(piece))

            headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
            self._http.post(f"/api/blobs/sha256:{sha256}", content=pieces(), headers=headers).raise_for_status()

    def create(
        self,
        name: str,
        *,
        files: Mapping[str, str] | None = None,
        source: str | None = None,
        template: str | None = None,
        system: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        messages: Sequence[Mapping[str, str]] = (),
        license_text: str | None = None,
    ) -> None:
        """
        Register a model.

        Args:
            name: as in "demo" or "someone/demo:short".
            files: of uploaded weights, file name to digest as in "sha256:…".
            source: another model of the server's, whose weights are taken.
            template, system, parameters, messages, license_text: as in a Modelfile, of which nothing is dropped here.
        """
        with self._told(f"create {name}"):
            created = self._client.create(
                name,
                files=None if files is None else dict(files),
                from_=source,
                template=template,
                system=system,
                parameters=dict(parameters) if parameters else None,
                messages=[dict(message) for message in messages] or None,
                license=license_text,
                stream=False,
            )
        if created.status != "success":
            raise OllamaError(f"the server at {self.url} did not finish creating {name}: {created.status!r}")

    def weights_of(self, name: str) -> str | None:
        """The sha256 of the weights of a model; None if there is no such model."""
        try:
            with self._told(f"show {name}"):
                shown = self._client.show(name)
        except OllamaError as error:
            if _status(error) == httpx.codes.NOT_FOUND:
                return None
            raise
        # As in "FROM /root/.ollama/models/blobs/sha256-…".
        found = re.search(r"^FROM .*sha256[-:]([0-9a-f]{64})", shown.modelfile or "", re.MULTILINE)
        if found is None:
            raise OllamaError(f"the server at {self.url} does not tell which weights {name} has")
        return found[1]

    def metadata_of(self, name: str) -> Mapping[str, Any]:
        """What the GGUF of a model says of itself, lists left out."""
        with self._told(f"show {name}"):
            shown = self._client.show(name)
        return {key: value for key, value in (shown.modelinfo or {}).items() if not isinstance(value, list | None)}

    def answer(self, question: str, *, model: str, max_tokens: int) -> Answer:
        """A model's answer to one question, by greedy decoding."""
        options = {"temperature": 0.0, "num_predict": max_tokens}
        with self._told(f"let {model} answer"):
            given = self._client.chat(model, messages=[{"role": "user", "content": question}], options=options)
        return Answer(
            text=given.message.content or "",
            reasoning=given.message.thinking or "",
            tokens=given.eval_count or 0,
            seconds=(given.eval_duration or 0) / 1e9,
        )

    @contextmanager
    def _told(self, action: str) -> Iterator[None]:
        """Say what a failure means to the user."""
        try:
            yield
        except (ConnectionError, httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise OllamaError(
                f"no Ollama server answers at {self.url}; start one (ollama serve), or set OLLAMA_HOST to where it is"
            ) from error
        except httpx.TransportError as error:
            why = first_line(error)
            raise OllamaError(
                f"the server at {self.url} broke off when it had to {action} ({why}); its own log tells why, a full "
                "disk for one"
            ) from error
        except httpx.HTTPStatusError as error:
            raise self._refusal(action, error.response.text[:300] or str(error.response)) from error
        except ollama.ResponseError as error:
            raise self._refusal(action, str(error.error)) from error
        except (ValueError, KeyError, TypeError) as error:  # pydantic's are ValueErrors
            message = f"{self.url} does not answer as Ollama does when it has to {action}: {first_line(error)}"
            raise OllamaError(f"{message}; is OLLAMA_HOST right?") from error

    def _refusal(self, action: str, said: str) -> OllamaError:
        advice = "; its disk is full: remove models that you no longer use (ollama rm)" if _is_full(said) else ""
        return OllamaError(f"the server at {self.url} could not {action}: {said}{advice}")


def refuse_full_disk(size: int, *, has_blob: bool) -> None:
    """
    Hold what a local server takes while it creates a model from a file against the free disk.

    Raises:
        OllamaError: it does not fit.
    """
    store = model_store()
    need, free = (COPIES - has_blob) * size, shutil.disk_usage(store).free
    if free < need:
        raise OllamaError(
            f"registering {size / 1e9:.1f} GB of weights takes a server up to {need / 1e9:.1f} GB for a while, and "
            f"{store} has {free / 1e9:.1f} GB free; make room there, or have the server keep its models elsewhere "
            "(OLLAMA_MODELS, told to it and to this call)"
        )


def _raise_in_band(response: httpx.Response) -> None:
    """
    An error that comes with status 200, in the answer or in a line of it.

    Raises:
        ollama.ResponseError: with what it says.
    """
    if response.is_error or "json" not in response.headers.get("content-type", ""):
        return
    body = response.read().decode(errors="replace")
    for text in (body, *body.splitlines()):
        try:
            said = json.loads(text)
        except ValueError:
            continue
        if isinstance(said, dict) and said.get("error"):
            raise ollama.ResponseError(str(said["error"]), response.status_code)


def _status(error: OllamaError) -> int | None:
    cause = error.__cause__
    if isinstance(cause, httpx.HTTPStatusError):
        return cause.response.status_code
    return cause.status_code if isinstance(cause, ollama.ResponseError) else None


def _is_full(said: str) -> bool:
    return any(words in said.lower() for words in FULL)
