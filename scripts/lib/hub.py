"""
Fetch a base checkpoint from the Hugging Face Hub, straight into the folder where it stays.

In: a repository and a revision. Out: a folder with the weights (safetensors), the JSON files, the tokenizer
and the licence, every file at one commit and checked against the digest that the Hub has for it.

`huggingface_hub` resolves, lists, authenticates and raises; the bytes are read here from its session, because
its own downloads (2.4.0) cannot be continued by a second run: a partial file has a random name and is deleted
on failure, up to 5 GB for each shard under way. A file over HTTP is checked by its size alone, and one over
Xet passes a cache of chunks under HF_HOME, 10 GB unless built without; of a disk of 100 GB the base takes 65.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from lib.console import Progress, note, progress, say
from lib.errors import ModelmillError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

T = TypeVar("T")

# The only thing beside the checkpoint in its folder: partial files while it is incomplete, then one small
# record of commit, sizes and digests. Whoever lists the folder leaves this name out.
STATE_FOLDER = ".hub"
RECORD = "checkpoint.json"
KNOWN = ("size", "digest")
PARTIAL = ".part"

DEFAULT_ENDPOINT = "https://huggingface.co"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAFETENSORS = ".safetensors"
WANTED = ("*.json", "*.jinja", "license*", "licence*", "notice*")
TOKENIZER = (
    "tokenizer.model*",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "vocab.txt",
    "merges.txt",
)
# Nothing that runs code when it is loaded (pickle, Python, custom operators), whatever else it is called.
NEVER = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".h5", ".msgpack", ".py", ".sh", ".so", ".onnx", ".gguf")
PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
# Written into this folder by the workflow itself.
OURS = ("MANIFEST.json",)

# One stream rarely fills a fast line, and whatever is on its way when the power goes is kept anyway.
STREAMS = 4
CHUNK = 1 << 20
# Seconds between attempts. A wrong address or no network at all should show soon; a download that has run for
# hours outlives a router's restart. Bytes that arrive start the count anew.
FIRST_WAITS = (1.0, 2.0, 4.0)
LATER_WAITS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
# The Hub's rate limits run in windows of five minutes.
LONGEST_WAIT = 300.0
PASSING_STATUS = (408, 429, 500, 502, 503, 504)


class HubError(ModelmillError):
    """A checkpoint that cannot be had from the Hub, and what to do about it."""


class _Stopped(Exception):
    """Ends a stream because another one failed; never reaches the caller."""


@dataclass(frozen=True)
class Source:
    """What to fetch and from where. The token stays out of `repr`, so that no log can show it."""

    repo_id: str
    revision: str
    endpoint: str
    host: str
    token: str | None = field(repr=False)

    def advice(self) -> str:
        """What a user can do about a refusal."""
        if self.token is None:
            return "set HF_TOKEN to a token of an account that has access"
        return "HF_TOKEN is set, but the Hub does not accept it for this repository: check the account's access"


@dataclass(frozen=True)
class RemoteFile:
    """One file of the repository; `digest` is `sha256:…` or, for one outside LFS, git's `git:…`."""

    name: str
    size: int
    digest: str

    def hasher(self) -> hashlib._Hash:
        """A hash object that ends up at `digest` once it has seen the file's bytes."""
        if self.digest.startswith("sha256:"):
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def matches(self, hasher: hashlib._Hash) -> bool:
        """Whether `hasher`, fed with the bytes on the disk, has come out at `digest`."""
        return self.digest.partition(":")[2] == hasher.hexdigest()

    def known(self) -> dict[str, int | str]:
        """What the record of a folder says about the file."""
        return {"size": self.size, "digest": self.digest}


def download_checkpoint(*, repo_id: str, revision: str, output: Path) -> str:
    """
    Download a checkpoint from the Hugging Face Hub straight into `output`.

    Only files of the repository's top folder that the workflow uses are fetched; of the weights, the shards
    that `model.safetensors.index.json` names. An interrupted download continues where it stopped. A complete
    folder is recognised by its record and the files' sizes; with HF_HUB_OFFLINE=1, or for a full commit hash,
    that takes no network. HF_TOKEN and HF_ENDPOINT are read from the environment at the time of the call.

    Returns:
        The commit hash that `revision` stands for, and that every file is from.

    Raises:
        HubError: if the checkpoint cannot be fetched, does not fit on the disk, or is not safetensors.
    """
    source = _source(repo_id=repo_id, revision=revision)
    folder = _Folder(output)
    present = folder.complete_commit(source)
    if present == revision:
        return present
    if _offline():
        if present is None:
            raise HubError(
                f"{output}: no complete copy of {repo_id} at {revision}, and HF_HUB_OFFLINE forbids to fetch "
                "it: unset HF_HUB_OFFLINE, or set base.path to a checkpoint that is on this disk"
            )
        return present
    # huggingface_hub would otherwise fetch a list of coding agents and report what is installed here.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with _plain_errors(source=source, output=output), _quiet_library(), folder.claimed():
        return _download(source=source, folder=folder)


def _download(*, source: Source, folder: _Folder) -> str:
    commit, listing = _look_up(source)
    folder.begin(source=source, commit=commit)
    if INDEX in listing and not folder.holds(listing[INDEX]):
        _fetch(source=source, commit=commit, folder=folder, files=[listing[INDEX]])
    wanted = _choose(source=source, listing=listing, index=folder.path / INDEX)
    folder.drop_all_but(wanted)
    missing = [file for file in wanted if not folder.holds(file)]
    say(
        f"{source.repo_id} at {commit}: {len(wanted)} files, {_size(sum(file.size for file in wanted))}, "
        f"to fetch: {_size(folder.bytes_to_fetch(missing))}"
    )
    _require_space(folder=folder, files=missing)
    _fetch(source=source, commit=commit, folder=folder, files=missing)
    folder.finish()
    return commit


# What to fetch


def _source(*, repo_id: str, revision: str) -> Source:
    if not repo_id or not revision:
        raise HubError("base.hub needs a repository (owner/name), and base.revision a branch, tag or commit")
    endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    try:
        address = urlsplit(endpoint)
        host, port = address.hostname, address.port
    except ValueError:
        host, port = None, None
    if host is None or address.scheme not in ("http", "https"):
        raise HubError(f"HF_ENDPOINT is not an address such as {DEFAULT_ENDPOINT}")
    token = os.environ.get("HF_TOKEN", "").strip() or None
    # HTTP libraries quote a malformed header, and with it the token, in their error messages.
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise HubError("HF_TOKEN holds a blank or a character that no token has (its value is not shown here)")
    shown = host if port is None else f"{host}:{port}"
    return Source(repo_id=repo_id, revision=revision, endpoint=endpoint, host=shown, token=token)


def _offline() -> bool:
    """As huggingface_hub reads it, but now rather than at its import."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def _look_up(source: Source) -> tuple[str, dict[str, RemoteFile]]:
    """Resolve the revision; return the commit and the files of the repository's top folder at that commit."""
    from huggingface_hub import HfApi

    def ask() -> tuple[str | None, list[RepoSibling]]:
        found = HfApi(endpoint=source.endpoint).model_info(
            source.repo_id,
            revision=source.revision,
            files_metadata=True,
            timeout=_timeout(),
            token=source.token or False,
        )
        return found.sha, found.siblings or []

    try:
        commit, siblings = _patiently(ask, patience=_Patience(host=source.host, waits=FIRST_WAITS))
        files = [_remote_file(sibling) for sibling in siblings if _is_in_top_folder(sibling.rfilename)]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HubError(f"{source.host} does not answer as a Hub does: check HF_ENDPOINT and the proxy") from error
    if not commit or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise HubError(f"{source.host} gives no commit for {source.repo_id} at {source.revision}")
    return commit, {file.name: file for file in files}


def _remote_file(sibling: RepoSibling) -> RemoteFile:
    if sibling.lfs is not None:
        return RemoteFile(sibling.rfilename, int(sibling.lfs.size), f"sha256:{sibling.lfs.sha256}")
    if sibling.blob_id is None:
        raise TypeError(f"no digest for {sibling.rfilename}")
    return RemoteFile(sibling.rfilename, int(sibling.size), f"git:{sibling.blob_id}")


def _is_in_top_folder(name: str) -> bool:
    """Other folders hold other formats or earlier states; and no name from outside may lead elsewhere."""
    return not name.startswith(".") and not any(character in name for character in "/\\\0:")


def _choose(*, source: Source, listing: Mapping[str, RemoteFile], index: Path) -> list[RemoteFile]:
    """
    The files that the workflow uses, the small ones first.

    Raises:
        HubError: if there are no weights in safetensors, or the index names files that are not there.
    """
    weights = _weights(source=source, listing=listing, index=index)
    if not weights:
        raise HubError(f"{source.repo_id} at {source.revision}: no weights in safetensors; {_other_format(listing)}")
    small = {
        name
        for name in listing
        if any(fnmatchcase(name.lower(), pattern) for pattern in (*WANTED, *TOKENIZER))
        and not name.lower().endswith((SAFETENSORS, *NEVER))
        and name not in OURS
    }
    return [listing[name] for name in (*sorted(small), *sorted(weights))]


def _weights(*, source: Source, listing: Mapping[str, RemoteFile], index: Path) -> set[str]:
    """The shards of the index, else the single file, else all safetensors; never the same weights twice."""
    if INDEX in listing:
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HubError(f"{source.repo_id}: {INDEX} holds no weight_map from tensors to files") from error
        absent = sorted(str(name) for name in named if name not in listing or not str(name).endswith(SAFETENSORS))
        if absent:
            raise HubError(f"{source.repo_id}: {INDEX} names files that are not there: {', '.join(absent)}")
        return named
    if SINGLE in listing:
        return {SINGLE}
    return {name for name in listing if name.endswith(SAFETENSORS)}


def _other_format(names: Collection[str]) -> str:
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    if pickled:
        return (
            f"only pickled ones ({pickled[0]} …), which may run code when loaded and are never fetched: "
            "look for a revision or another repository with safetensors, or convert them elsewhere and set "
            "base.path"
        )
    if any(name.endswith(".gguf") for name in names):
        return "only GGUF: fetch the file yourself and set base.gguf"
    return "check base.hub and base.revision"


# The folder


class _Folder:
    """The checkpoint's folder, and the record in it of which file has been checked against which digest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = path / STATE_FOLDER
        self._lock = threading.Lock()
        self._record = self._read()

    def _read(self) -> dict:
        try:
            record = json.loads((self._state / RECORD).read_text(encoding="utf-8"))
            files = {name: {key: known[key] for key in KNOWN} for name, known in record["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Without a record nothing is lost: files with the right size are hashed again.
            return {"files": {}}
        return {**record, "files": files}

    def _write(self) -> None:
        fresh = self._state / f"{RECORD}.new"
        fresh.write_text(json.dumps(self._record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        fresh.replace(self._state / RECORD)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep a second process away from the partial files; a file system without locks goes without."""
        self._state.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._state, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise HubError(f"{self.path}: another process is downloading into this folder") from error
            except OSError as error:
                note(f"{self.path} cannot be locked ({error.strerror})")
            yield
        finally:
            os.close(handle)

    def complete_commit(self, source: Source) -> str | None:
        """The commit of which this folder holds every file, if that is what `source` asks for."""
        repo, revision, commit = (self._record.get(key) for key in ("repo", "revision", "commit"))
        if repo != source.repo_id or source.revision not in (revision, commit):
            return None
        files = self._record["files"].items()
        whole = all(_size_on_disk(self.path / name) == known["size"] for name, known in files)
        return commit if whole and self._record.get("complete") else None

    def begin(self, *, source: Source, commit: str) -> None:
        """From here on the folder counts as incomplete."""
        origin = {"repo": source.repo_id, "revision": source.revision, "commit": commit}
        self._record = {**origin, "complete": False, "files": self._record["files"]}
        self._write()

    def finish(self) -> None:
        """Every file is here: offline runs may rely on it."""
        self._record["complete"] = True
        self._write()

    def holds(self, file: RemoteFile) -> bool:
        """Whether the file is here with the right bytes; one that nobody has checked yet is read once."""
        path = self.path / file.name
        if _size_on_disk(path) != file.size:
            return False
        known = self._record["files"].get(file.name)
        if known is not None:
            return known == file.known()
        note(f"{path}: checking a file that is here already")
        hasher = file.hasher()
        with path.open("rb") as stream:
            while block := stream.read(CHUNK):
                hasher.update(block)
        if file.matches(hasher):
            self.keep(file)
        return file.matches(hasher)

    def keep(self, file: RemoteFile) -> None:
        """Write down that the file has been checked; called from several threads."""
        with self._lock:
            self._record["files"][file.name] = file.known()
            self._write()

    def drop_all_but(self, wanted: Collection[RemoteFile]) -> None:
        """Remove what an earlier commit left here: its room is needed. What is not ours stays."""
        current = {file.name: file.known() for file in wanted}
        files = self._record["files"]
        for name in [name for name, known in files.items() if current.get(name) != known]:
            (self.path / name).unlink(missing_ok=True)
            del files[name]
        self._write()
        partial = {self.partial(file) for file in wanted}
        for path in set(self._state.glob(f"*{PARTIAL}")) - partial:
            path.unlink()

    def partial(self, file: RemoteFile) -> Path:
        """Named after the content too, so that bytes of another commit are never continued."""
        return self._state / f"{file.name}.{file.digest.partition(':')[2][:16]}{PARTIAL}"

    def bytes_to_fetch(self, files: Collection[RemoteFile]) -> int:
        """What these files still take on the disk and over the line, partial files counted as here."""
        return sum(max(0, file.size - (_size_on_disk(self.partial(file)) or 0)) for file in files)


class _Partial:
    """A file on its way: the bytes so far, their hash, and the move to the final name once they are right."""

    def __init__(self, *, file: RemoteFile, folder: _Folder) -> None:
        self._file, self._folder, self._path = file, folder, folder.partial(file)
        self._stream = self._path.open("a+b")
        self.restart(keep=self._stream.tell() <= file.size)

    def restart(self, *, keep: bool = False) -> None:
        """Begin again, from the bytes that are there (`keep`) or from none."""
        self._hasher = self._file.hasher()
        self.done = 0
        if not keep:
            self._stream.truncate(0)
        self._stream.seek(0)
        while block := self._stream.read(CHUNK):
            self._hasher.update(block)
            self.done += len(block)

    def write(self, block: bytes) -> None:
        """Add the next bytes; raises HubError when there are more than the file has."""
        if self.done + len(block) > self._file.size:
            self.discard()
            raise HubError(f"{self._file.name}: the server sent more than the {self._file.size} bytes it announced")
        self._stream.write(block)
        self._hasher.update(block)
        self.done += len(block)

    def discard(self) -> None:
        """Leave nothing to continue: the bytes are wrong, and nobody knows which."""
        self._path.unlink(missing_ok=True)

    def settle(self) -> None:
        """
        Give the file its final name, once it is the right one.

        The record is written before the name changes: whatever comes in between, no file of ours is unknown.
        """
        if not self._file.matches(self._hasher):
            self.discard()
            raise HubError(
                f"{self._file.name}: {self._file.size} bytes arrived with the digest "
                f"{self._hasher.hexdigest()}, but the Hub says {self._file.digest}: they are deleted, and "
                "the same command fetches them anew"
            )
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._folder.keep(self._file)
        self._path.replace(self._folder.path / self._file.name)

    def close(self) -> None:
        """Leave the bytes for a later run."""
        self._stream.close()


def _size_on_disk(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _size(count: float) -> str:
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    return f"{count / unit:.1f} {name}"


def _require_space(*, folder: _Folder, files: Collection[RemoteFile]) -> None:
    needed = folder.bytes_to_fetch(files)
    if needed > shutil.disk_usage(folder.path).free:
        raise _no_space(folder=folder, files=files)


def _no_space(*, folder: _Folder, files: Collection[RemoteFile]) -> HubError:
    needed = _size(folder.bytes_to_fetch([file for file in files if not folder.holds(file)]))
    free = _size(shutil.disk_usage(folder.path).free)
    return HubError(f"{folder.path}: {needed} are still to be fetched, but only {free} are free on this disk")


# The transfer


def _fetch(*, source: Source, commit: str, folder: _Folder, files: list[RemoteFile]) -> None:
    """Fetch files side by side; a failure or an interrupt ends them all and keeps what has arrived."""
    total = folder.bytes_to_fetch(files)
    with progress("download", total=total, unit="B") as bar, ThreadPoolExecutor(STREAMS) as pool:
        transfer = _Transfer(source=source, commit=commit, folder=folder, bar=bar)
        running = [pool.submit(transfer.fetch, file) for file in files]
        try:
            for finished in as_completed(running):
                finished.result()
        except BaseException as error:
            transfer.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_space(folder=folder, files=files) from error
            raise


class _Transfer:
    """What the streams of one download share."""

    def __init__(self, *, source: Source, commit: str, folder: _Folder, bar: Progress) -> None:
        from huggingface_hub.utils import build_hf_headers

        self._source, self._commit, self._folder, self._bar = source, commit, folder, bar
        # Compressed, a range of the file would not be a range of the answer.
        self._headers = {**build_hf_headers(token=source.token or False), "Accept-Encoding": "identity"}
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def fetch(self, file: RemoteFile) -> None:
        """Fetch one file, or the rest of it, and give it its final name."""
        from huggingface_hub.utils import httpx

        partial = _Partial(file=file, folder=self._folder)
        patience = _Patience(host=self._source.host, waits=LATER_WAITS, stop=self.stop)
        try:
            while partial.done < file.size:
                before = partial.done
                try:
                    self._stream(file=file, partial=partial)
                except httpx.HTTPError as error:
                    if partial.done > before:
                        patience.renew()
                    patience.wait_after(error)
                else:
                    if partial.done == before:
                        raise HubError(f"{file.name}: {self._source.host} sends {before} of {file.size} bytes")
            partial.settle()
        finally:
            partial.close()
        (say if file.name.endswith(SAFETENSORS) else note)(f"{file.name}: {_size(file.size)}, {file.digest}")

    def _stream(self, *, file: RemoteFile, partial: _Partial) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import get_session, hf_raise_for_status

        url = hf_hub_url(self._source.repo_id, file.name, revision=self._commit, endpoint=self._source.endpoint)
        wanted = {"Range": f"bytes={partial.done}-"} if partial.done else {}
        headers = {**self._headers, **wanted}
        with get_session().stream("GET", url, headers=headers, timeout=_timeout()) as response:
            hf_raise_for_status(response)
            if partial.done and response.status_code != 206:
                self._advance(-partial.done, remark=file.name)
                partial.restart()
            for block in response.iter_bytes(CHUNK):
                if self.stop.is_set():
                    raise _Stopped
                partial.write(block)
                self._advance(len(block), remark=file.name)

    def _advance(self, amount: int, *, remark: str) -> None:
        with self._lock:
            self._bar.advance(amount, remark=remark)


class _Patience:
    """
    How often and how long to wait for a failure to pass.

    huggingface_hub repeats requests too, but not its look-up of a model, not after a reset connection, and
    with sleeps of up to five minutes that the failure of another stream cannot end.
    """

    def __init__(self, *, host: str, waits: tuple[float, ...], stop: threading.Event | None = None) -> None:
        self._host, self._all, self._stop = host, waits, stop or threading.Event()
        self.renew()

    def renew(self) -> None:
        """Something has worked: the next failure is the first one."""
        self._waits = iter(self._all)

    def wait_after(self, error: Exception) -> None:
        """Wait, or raise `error` if it will not pass or has lasted too long."""
        pause = next(self._waits, None) if _may_pass(error) else None
        if pause is None:
            raise error
        pause = max(pause, _pause_asked_for(error))
        say(f"{self._host}: {_reason(error)}; next attempt in {pause:.0f} s")
        if self._stop.wait(pause):
            raise _Stopped


def _patiently(action: Callable[[], T], *, patience: _Patience) -> T:
    """Do something over the network, again if need be."""
    from huggingface_hub.utils import httpx

    while True:
        try:
            return action()
        except httpx.HTTPError as error:
            patience.wait_after(error)


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.utils import HfHubHTTPError, httpx

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING_STATUS
    lasting = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
    return isinstance(error, httpx.TransportError) and not isinstance(error, lasting)


def _pause_asked_for(error: Exception) -> float:
    """Seconds that the server asks a client to wait, 0 if it does not say."""
    from huggingface_hub.utils import HfHubHTTPError, parse_ratelimit_headers

    if not isinstance(error, HfHubHTTPError):
        return 0.0
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    seconds = int(headers["retry-after"]) if headers.get("retry-after", "").isdecimal() else 0
    if limit is not None and limit.remaining == 0:
        # The Hub counts whole seconds down; at 0 the window may have some milliseconds left.
        seconds = limit.reset_in_seconds + 1
    return min(float(seconds), LONGEST_WAIT)


def _timeout() -> float:
    """Seconds without a byte; HF_HUB_DOWNLOAD_TIMEOUT sets it, 10 by default."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


# The library's voice


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Its warnings repeat, in other words and with addresses of signed downloads, what is said here."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _plain_errors(*, source: Source, output: Path) -> Iterator[None]:
    """Turn what the libraries raise into one line; their own messages hold addresses of signed downloads."""
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError, httpx

    try:
        yield
    except HfHubHTTPError as error:
        raise HubError(_refusal(error, source=source)) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise HubError(
            f"cannot reach {source.host} ({_reason(error)}): check the network connection and HF_ENDPOINT, "
            "then run the same command again, which continues where it stopped; without a network, set "
            "base.path to a checkpoint on this disk, or HF_HUB_OFFLINE=1 to use one that was fetched before"
        ) from error
    except HFValidationError as error:
        raise HubError(f"base.hub: {source.repo_id!r} is not the name of a repository (owner/name)") from error
    except OSError as error:
        raise HubError(f"{output}: {error.strerror or error}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub.utils import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return f"HTTP status {error.response.status_code}"
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__


def _refusal(error: Exception, *, source: Source) -> str:
    """What the Hub's answer means. `error` is an HfHubHTTPError."""
    from huggingface_hub.utils import EntryNotFoundError, GatedRepoError, RevisionNotFoundError

    status, repo = error.response.status_code, f"{source.repo_id} at {source.host}"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its terms on its page, then {source.advice()}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {source.revision!r}: check base.revision (branch, tag or commit)"
    if isinstance(error, EntryNotFoundError):
        return f"{repo}: a file in its list is not there: the repository is damaged, try another revision"
    if status in (401, 403):
        return f"{repo} does not exist or is private (HTTP status {status}): check base.hub; {source.advice()}"
    if status == 404:
        return f"{repo} does not exist: check base.hub; if it is private, {source.advice()}"
    if status == 429:
        return f"{source.host} limits the rate of requests: wait some minutes and run the same command again"
    return f"{source.host} answers HTTP status {status} for {source.repo_id}: run the same command again later"
