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

from lib.console import progress
from lib.errors import ModelmillError, first_line
from lib.machine import model_store

OLDEST = (0, 5, 5)  # the first whose /api/create takes `files` and `from`
CONNECT_SECONDS = 10.0
LOOK_SECONDS = 30.0  # what a server may take to say what it has
WRITE_SECONDS = 120.0  # or to take in a piece of a file
PIECE_BYTES = 1 << 20
# Upload, the copy that llama-quantize writes, and the layer; some 79 GB were seen for 19.9.
COPIES = 4
# What says where a server is, and how it is reached.
ADDRESSES = ("OLLAMA_HOST", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
SHORT = 12  # hex digits of a digest in the name that weights have
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
            # Not above: it makes a client when it is imported, of whatever the environment says.
            import ollama

            local = _is_local(httpx.URL(str(ollama.Client(trust_env=False)._client.base_url)))
            limits = httpx.Timeout(None, connect=CONNECT_SECONDS, write=WRITE_SECONDS)
            hooks = {"response": [_raise_in_band]}
            # A proxy is for other machines.
            self._client = ollama.Client(timeout=limits, event_hooks=hooks, trust_env=not local)
        except (ValueError, httpx.InvalidURL, ImportError) as error:
            told = ", ".join(f"{name}={value!r}" for name in ADDRESSES if (value := os.environ.get(name)))
            raise OllamaError(f"no address of a server can be made of {told or 'the environment'}: {error}") from None
        # The client keeps its connection to itself; blobs have to go to the same place with the same key.
        self._http: httpx.Client = self._client._client
        self.url = str(self._http.base_url).rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine."""
        return _is_local(self._http.base_url)

    def version(self) -> str:
        """
        The server's version.

        Raises:
            OllamaError: no server answers, or it is older than OLDEST.
        """
        with self._told("tell its version"):
            version = str(self._http.get("/api/version", timeout=LOOK_SECONDS).raise_for_status().json()["version"])
        numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
        # A build of one's own calls itself 0.0.0.
        if any(numbers) and numbers < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise OllamaError(f"the server at {self.url} is Ollama {version}; {oldest} or later is needed: update it")
        return version

    def has_blob(self, sha256: str) -> bool:
        """Whether the server holds a file with that digest."""
        with self._told("look for a file"):
            response = self._http.head(f"/api/blobs/sha256:{sha256}", timeout=LOOK_SECONDS)
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

    def answer(self, question: str, *, model: str, max_tokens: int, context: int | None = None) -> Answer:
        """A model's answer to one question, by greedy decoding; `context` is in tokens, the model's own if None."""
        options = {"temperature": 0.0, "num_predict": max_tokens, **({"num_ctx": context} if context else {})}
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
        import ollama

        try:
            yield
        except (ConnectionError, httpx.ConnectError, httpx.ConnectTimeout) as error:
            if "SSL" in str(error):
                raise OllamaError(
                    f"no secured connection to {self.url} ({first_line(error)}); does OLLAMA_HOST want http://?"
                ) from error
            proxied = "" if self.is_local else " (a proxy of the environment is used for it, if there is one)"
            raise OllamaError(
                f"no Ollama server answers at {self.url}{proxied}; start one (ollama serve), or set OLLAMA_HOST to "
                "where it is"
            ) from error
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            # Its text may hold a header, and so the key.
            raise OllamaError(
                f"{self.url} cannot be asked to {action}: OLLAMA_HOST or OLLAMA_API_KEY is not of the right form"
            ) from error
        except httpx.TimeoutException as error:
            raise OllamaError(f"the server at {self.url} did not {action} in time; is it busy?") from error
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


def weights_name(name: str, sha256: str) -> str:
    """What weights are registered as, once for all models of that name, whatever their tags."""
    stem = name.rpartition(":")[0] if ":" in name.rpartition("/")[2] else name
    return f"{stem}:w-{sha256[:SHORT]}"


def _is_local(url: httpx.URL) -> bool:
    try:
        address = ipaddress.ip_address(url.host)
    except ValueError:
        return url.host == "localhost"
    return address.is_loopback or address.is_unspecified


def _raise_in_band(response: httpx.Response) -> None:
    """
    An error that comes with status 200, in the answer or in a line of it.

    Raises:
        ollama.ResponseError: with what it says.
    """
    import ollama

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
    return getattr(cause, "status_code", None)


def _is_full(said: str) -> bool:
    return any(words in said.lower() for words in FULL)
