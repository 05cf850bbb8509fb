"""
A Hugging Face Hub on the loopback interface: what a download needs of its protocol, and faults on demand.

It answers what huggingface_hub 2.4.0 asks: `/api/models/{repo}[/revision/{revision}]` (with `blobs`), the
tree, and `/{repo}/resolve/{revision}/{file}` with ranges. As on the real Hub, a file in LFS is a redirect to
another origin (here a second port), where no token may go; every other file comes straight from the Hub.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".gguf", ".onnx", ".model")


@dataclass(frozen=True)
class Request:
    """What a client has asked; `headers` in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    storage: bool

    @property
    def file(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


@dataclass
class Repository:
    """Commits (files by name) and the names that stand for them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """A file that breaks off after `after` bytes, the next `times` times; `reset`: by the network (RST)."""

    after: int
    times: int
    reset: bool = False


class FakeHub:
    """
    The server, as a context manager.

    Set between requests: `gated` and `private` (repositories), `token` (the one that opens them), `faults`
    (by file name), `corrupt` (names of files with wrong bytes), `ignore_ranges`, `status` (of the next
    answers), `page` (a body that is not a Hub's), `hold` (events by file name: the second half waits for it).
    `holding` is set once a file is held.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.token = "hf_right"
        self.faults: dict[str, Fault] = {}
        self.corrupt: set[str] = set()
        self.ignore_ranges = False
        self.status: list[int] = []
        self.page: bytes | None = None
        self.hold: dict[str, threading.Event] = {}
        self.holding = threading.Event()
        self._servers = [_Server(("127.0.0.1", 0), self, storage=storage) for storage in (False, True)]

    def add(self, repo_id: str, files: Mapping[str, bytes], *, names: tuple[str, ...] = ("main",)) -> str:
        """Commit `files` to a repository, let `names` stand for the commit, and return its hash."""
        repository = self.repositories.setdefault(repo_id, Repository())
        content = hashlib.sha1(repo_id.encode())
        for name in sorted(files):
            content.update(name.encode() + b"\0" + files[name])
        commit = content.hexdigest()
        repository.commits[commit] = dict(files)
        repository.references.update(dict.fromkeys(names, commit))
        return commit

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def storage(self) -> str:
        """Where the redirects of LFS files lead."""
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def fetched(self, file: str | None = None) -> list[Request]:
        """The GET requests for file content that reached its final address."""
        found = [one for one in self.requests if one.method == "GET" and "/api/" not in one.path]
        found = [one for one in found if one.storage or not one.file.endswith(LFS_SUFFIXES)]
        return [one for one in found if file is None or one.file == file]

    def stop(self) -> None:
        """Close the ports; whoever connects from now on is refused."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> FakeHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for event in self.hold.values():
            event.set()
        self.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], hub: FakeHub, *, storage: bool) -> None:
        super().__init__(address, _Handler)
        self.hub, self.storage = hub, storage

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is part of the tests."""


class _Refused(Exception):
    """An answer that is no content: status, the Hub's error code, the message."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Silence: `FakeHub.requests` is the log."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append(Request(self.command, path, headers, self.server.storage))
        try:
            if hub.status:
                raise _Refused(hub.status.pop(0), "", "out of order")
            if hub.page is not None:
                self._send(200, hub.page, {"Content-Type": "text/html"})
            elif self.server.storage:
                repo_id, commit, name = path.strip("/").rsplit("/", 2)
                self._send_file(name, hub.repositories[repo_id].commits[commit][name], {})
            elif path.startswith("/api/models/"):
                self._send_listing(path.removeprefix("/api/models/"))
            else:
                self._send_content(path)
        except _Refused as refusal:
            status, code, message = refusal.args
            extra = {"X-Error-Code": code} if code else {}
            body = json.dumps({"error": message}).encode()
            self._send(status, body, {"X-Error-Message": message, "Content-Type": "application/json", **extra})

    def _send_listing(self, path: str) -> None:
        separator = next((mark for mark in ("/revision/", "/tree/") if mark in path), "/revision/")
        repo_id, _, revision = path.partition(separator)
        repository, commit = self._find(repo_id, revision or "main")
        files = sorted(repository.commits[commit].items())
        if separator == "/tree/":
            body = [_tree_entry(name, content) for name, content in files]
        else:
            siblings = [_sibling(name, content) for name, content in files]
            body = {"id": repo_id, "sha": commit, "siblings": siblings, "private": False, "tags": []}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send_content(self, path: str) -> None:
        repo_id, found, rest = path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if not found:
            raise _Refused(404, "", "no such page")
        hub = self.server.hub
        repository, commit = self._find(repo_id, revision)
        if repo_id in hub.gated and not self._has_token():
            status = 403 if "Authorization" in self.headers else 401
            raise _Refused(status, "GatedRepo", f"Access to model {repo_id} is restricted.")
        if name not in repository.commits[commit]:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        content = repository.commits[commit][name]
        headers = {"X-Repo-Commit": commit}
        if not name.endswith(LFS_SUFFIXES):
            self._send_file(name, content, {**headers, "ETag": f'"{_git_id(content)}"'})
            return
        digest = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", {**headers, **linked, "Location": f"{hub.storage}/{repo_id}/{commit}/{name}"})

    def _find(self, repo_id: str, revision: str) -> tuple[Repository, str]:
        hub = self.server.hub
        if repo_id not in hub.repositories or (repo_id in hub.private and not self._has_token()):
            # The real Hub does not tell a stranger whether a repository exists.
            status = 404 if self._has_token() else 401
            raise _Refused(status, "RepoNotFound", "Invalid username or password." if status == 401 else "")
        repository = hub.repositories[repo_id]
        commit = repository.references.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.hub.token}"

    def _send_file(self, name: str, content: bytes, headers: Mapping[str, str]) -> None:
        hub = self.server.hub
        if name in hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = self.headers.get("Range")
        if asked is None or hub.ignore_ranges:
            self._send(200, content, headers, name=name)
            return
        start = int(asked.removeprefix("bytes=").partition("-")[0])
        if start >= len(content):
            raise _Refused(416, "", "Range Not Satisfiable")
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206, content[start:], {**headers, "Content-Range": span}, name=name)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], *, name: str = "") -> None:
        hub = self.server.hub
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = hub.faults.get(name)
        if fault is not None and fault.times > 0:
            fault.times -= 1
            self._break_off(body[: fault.after], reset=fault.reset)
            return
        if name in hub.hold:
            self.wfile.write(body[: len(body) // 2])
            hub.holding.set()
            hub.hold[name].wait()
            body = body[len(body) // 2 :]
        self.wfile.write(body)

    def _break_off(self, body: bytes, *, reset: bool) -> None:
        """Close after `body`: in good order, or as a network does that drops the connection (RST)."""
        self.wfile.write(body)
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _lfs(name: str, content: bytes, *, key: str) -> dict:
    if not name.endswith(LFS_SUFFIXES):
        return {}
    return {"lfs": {key: hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}}


def _sibling(name: str, content: bytes) -> dict:
    entry = {"rfilename": name, "size": len(content), "blobId": _git_id(content)}
    return {**entry, **_lfs(name, content, key="sha256")}


def _tree_entry(name: str, content: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(content), "oid": _git_id(content)}
    return {**entry, **_lfs(name, content, key="oid")}


def requests_by_file(hub: FakeHub) -> Counter[str]:
    """How often the content of each file has been asked for."""
    return Counter(request.file for request in hub.fetched())
