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

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lib.checkpoint import INDEX, WEIGHTS, CheckpointError, is_side_file, weight_map
from lib.cli import describe_os_error
from lib.console import say
from lib.hub_folder import DownloadFolder, HubError, RemoteFile, show_size
from lib.hub_transfer import ask_patiently, fetch_files, reason, timeout
from lib.locks import only_writer

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

DEFAULT_ENDPOINT = "https://huggingface.co"
SAFETENSORS = ".safetensors"


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
        LockedError: another run is downloading into this folder.
    """
    source = _source(repo_id=repo_id, revision=revision)
    folder = DownloadFolder(output)
    present = folder.complete_commit(repo_id=repo_id, revision=revision)
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
    with _plain_errors(source=source, output=output), _quiet_library(), only_writer(output):
        return _download(source=source, folder=folder)


def _download(*, source: Source, folder: DownloadFolder) -> str:
    commit, listing = _look_up(source)
    access = {"folder": folder, "host": source.host, "token": source.token}
    folder.begin(repo_id=source.repo_id, revision=source.revision, commit=commit)
    if INDEX in listing and not folder.holds(listing[INDEX]):
        fetch_files(files=[listing[INDEX]], **access)
    wanted = _choose(source=source, listing=listing, folder=folder.path)
    folder.drop_all_but(wanted)
    missing = [file for file in wanted if not folder.holds(file)]
    say(
        f"{source.repo_id} at {commit}: {len(wanted)} files, {show_size(sum(file.size for file in wanted))}, "
        f"to fetch: {show_size(folder.bytes_to_fetch(missing))}"
    )
    folder.require_space(missing)
    fetch_files(files=missing, **access)
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
            timeout=timeout(),
            token=source.token or False,
        )
        return found.sha, found.siblings or []

    try:
        commit, siblings = ask_patiently(ask, host=source.host)
        if not commit or not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise HubError(f"{source.host} gives no commit for {source.repo_id} at {source.revision}")
        inside = (sibling for sibling in siblings if _is_in_top_folder(sibling.rfilename))
        files = [_remote_file(sibling, source=source, commit=commit) for sibling in inside]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HubError(f"{source.host} does not answer as a Hub does: check HF_ENDPOINT and the proxy") from error
    return commit, {file.name: file for file in files}


def _remote_file(sibling: RepoSibling, *, source: Source, commit: str) -> RemoteFile:
    from huggingface_hub import hf_hub_url

    name = sibling.rfilename
    url = hf_hub_url(source.repo_id, name, revision=commit, endpoint=source.endpoint)
    if sibling.lfs is not None:
        return RemoteFile(name=name, size=int(sibling.lfs.size), digest=f"sha256:{sibling.lfs.sha256}", url=url)
    if sibling.blob_id is None:
        raise TypeError(f"no digest for {name}")
    return RemoteFile(name=name, size=int(sibling.size), digest=f"git:{sibling.blob_id}", url=url)


def _is_in_top_folder(name: str) -> bool:
    """Other folders hold other formats or earlier states; and no name from outside may lead elsewhere."""
    return not name.startswith(".") and not any(character in name for character in "/\\\0:")


def _choose(*, source: Source, listing: Mapping[str, RemoteFile], folder: Path) -> list[RemoteFile]:
    """
    The files that the workflow uses, the small ones first.

    Raises:
        HubError: if there are no weights in safetensors, or the index names files that are not there.
    """
    weights = _weights(source=source, listing=listing, folder=folder)
    if not weights:
        raise HubError(f"{source.repo_id} at {source.revision}: no weights in safetensors; {_other_format(listing)}")
    small = sorted(name for name in listing if is_side_file(name))
    return [listing[name] for name in (*small, *sorted(weights))]


def _weights(*, source: Source, listing: Mapping[str, RemoteFile], folder: Path) -> set[str]:
    """The shards of the index, else the single file, else all safetensors; never the same weights twice."""
    if INDEX in listing:
        try:
            named = set(weight_map(folder).values())
        except CheckpointError as error:
            raise HubError(f"{source.repo_id}: {INDEX} holds no weight_map from tensors to files") from error
        absent = sorted(name for name in named if name not in listing or not name.endswith(SAFETENSORS))
        if absent:
            raise HubError(f"{source.repo_id}: {INDEX} names files that are not there: {', '.join(absent)}")
        return named
    if WEIGHTS in listing:
        return {WEIGHTS}
    return {name for name in listing if name.endswith(SAFETENSORS)}


def _other_format(names: Collection[str]) -> str:
    pickled = sorted(name for name in names if name.lower().endswith((".bin", ".pth", ".pt", ".ckpt", ".pkl")))
    if pickled:
        return (
            f"only pickled ones ({pickled[0]} …), which may run code when loaded and are never fetched: "
            "look for a revision or another repository with safetensors, or convert them elsewhere and set "
            "base.path"
        )
    if any(name.endswith(".gguf") for name in names):
        return "only GGUF: fetch the file yourself and set base.gguf"
    return "check base.hub and base.revision"


# Refusals


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
            f"cannot reach {source.host} ({reason(error)}): check the network connection and HF_ENDPOINT, "
            "then run the same command again, which continues where it stopped; without a network, set "
            "base.path to a checkpoint on this disk, or HF_HUB_OFFLINE=1 to use one that was fetched before"
        ) from error
    except HFValidationError as error:
        raise HubError(f"base.hub: {source.repo_id!r} is not the name of a repository (owner/name)") from error
    except OSError as error:
        error.filename = error.filename or str(output)
        raise HubError(describe_os_error(error)) from error


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
