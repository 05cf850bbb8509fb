"""
The folder of a download from the Hub: which files are there and checked, which are partial, and what still fits.

Partial files are named after what they will contain, and a record says which file was checked against which
digest, so that a later run continues instead of fetching or hashing again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lib.console import note
from lib.errors import ModelmillError
from lib.jsonfile import read_json, write_json

# The only thing beside the checkpoint in its folder: partial files while it is incomplete, then one small
# record of commit, sizes and digests. Whoever lists the folder leaves this name out.
STATE_FOLDER = ".hub"
RECORD = "checkpoint.json"
KNOWN = ("size", "digest")
PARTIAL = ".part"


class HubError(ModelmillError):
    """A checkpoint that cannot be had from the Hub, and what to do about it."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of the repository at one commit; `digest` is `sha256:…` or, for one outside LFS, git's `git:…`."""

    name: str
    size: int
    digest: str
    url: str

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


class DownloadFolder:
    """The checkpoint's folder, and the record in it of which file has been checked against which digest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = path / STATE_FOLDER
        self._lock = threading.Lock()
        self._record = self._read()

    def _read(self) -> dict:
        try:
            record = read_json(self._state / RECORD)
            files = {name: {key: known[key] for key in KNOWN} for name, known in record["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # Without a record nothing is lost: files with the right size are hashed again.
            return {"files": {}}
        return {**record, "files": files}

    def _write(self) -> None:
        write_json(self._state / RECORD, self._record)

    def complete_commit(self, *, repo_id: str, revision: str) -> str | None:
        """The commit of which this folder holds every file, if `revision` of that repository stands for it."""
        repo, branch, commit = (self._record.get(key) for key in ("repo", "revision", "commit"))
        if repo != repo_id or revision not in (branch, commit):
            return None
        files = self._record["files"].items()
        whole = all(_size_on_disk(self.path / name) == known["size"] for name, known in files)
        return commit if whole and self._record.get("complete") else None

    def begin(self, *, repo_id: str, revision: str, commit: str) -> None:
        """Make the folder; from here on it counts as incomplete."""
        origin = {"repo": repo_id, "revision": revision, "commit": commit}
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
        with path.open("rb") as stream:
            right = file.matches(hashlib.file_digest(stream, file.hasher))
        if right:
            self.keep(file)
        return right

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

    def require_space(self, files: Collection[RemoteFile]) -> None:
        """
        Check that the rest of these files fits on the disk.

        Raises:
            HubError: with both sizes, if it does not.
        """
        if self.bytes_to_fetch(files) > shutil.disk_usage(self.path).free:
            raise self.lack_of_space(files)

    def lack_of_space(self, files: Collection[RemoteFile]) -> HubError:
        """The error that says how much of these files is missing and how much room there is."""
        needed = show_size(self.bytes_to_fetch([file for file in files if not self.holds(file)]))
        free = show_size(shutil.disk_usage(self.path).free)
        return HubError(f"{self.path}: {needed} are still to be fetched, but only {free} are free on this disk")


class PartialFile:
    """A file on its way: the bytes so far, their hash, and the move to the final name once they are right."""

    def __init__(self, *, file: RemoteFile, folder: DownloadFolder) -> None:
        self._file, self._folder, self._path = file, folder, folder.partial(file)
        self._stream = self._path.open("a+b")
        self.restart(keep=self._stream.tell() <= file.size)

    def restart(self, *, keep: bool = False) -> None:
        """Begin again, from the bytes that are there (`keep`) or from none."""
        if not keep:
            self._stream.truncate(0)
        self._stream.seek(0)
        self._hasher = hashlib.file_digest(self._stream, self._file.hasher)
        self.done = self._stream.tell()

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


def show_size(count: float) -> str:
    """A number of bytes for a reader, as in "65.5 GB"."""
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    return f"{count / unit:.1f} {name}"


def _size_on_disk(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
