"""
The bytes of a download from the Hub: several streams at once, each continued where it broke off.

A failure that may pass is waited for, here and when a model is looked up; one that will not is raised as
huggingface_hub or its HTTP library has it, and worded in lib.hub.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from lib.console import Progress, note, progress, say
from lib.errors import first_line
from lib.hub_folder import DownloadFolder, HubError, PartialFile, RemoteFile, show_size

T = TypeVar("T")

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


def fetch_files(*, files: list[RemoteFile], folder: DownloadFolder, host: str, token: str | None) -> None:
    """
    Fetch files side by side; a failure or an interrupt ends them all and keeps what has arrived.

    Args:
        files: what to fetch; one with a partial file in `folder` is continued.
        folder: where they go.
        host: what messages call the server.
        token: for the Hub; storage that it redirects to does not get it.

    Raises:
        HubError: wrong bytes, too few or too many, or a full disk; what the HTTP library raises otherwise.
    """
    total = folder.bytes_to_fetch(files)
    with progress("download", total=total, unit="B") as bar, ThreadPoolExecutor(STREAMS) as pool:
        transfer = _Transfer(folder=folder, host=host, token=token, bar=bar)
        running = [pool.submit(transfer.fetch, file) for file in files]
        try:
            for finished in as_completed(running):
                finished.result()
        except BaseException as error:
            transfer.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise folder.lack_of_space(files) from error
            raise


def ask_patiently(action: Callable[[], T], *, host: str) -> T:
    """Ask something over the network, again if need be."""
    from huggingface_hub.utils import httpx

    patience = _Patience(host=host, waits=FIRST_WAITS)
    while True:
        try:
            return action()
        except httpx.HTTPError as error:
            patience.wait_after(error)


def reason(error: Exception) -> str:
    """Why a request failed, in one line; of the Hub's answers the status alone, since their texts hold addresses."""
    from huggingface_hub.utils import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return f"HTTP status {error.response.status_code}"
    return first_line(error)


def timeout() -> float:
    """Seconds without a byte; HF_HUB_DOWNLOAD_TIMEOUT sets it, 10 by default."""
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


class _Stopped(Exception):
    """Ends a stream because another one failed; never reaches the caller."""


class _Transfer:
    """What the streams of one download share."""

    def __init__(self, *, folder: DownloadFolder, host: str, token: str | None, bar: Progress) -> None:
        from huggingface_hub.utils import build_hf_headers

        self._folder, self._host, self._bar = folder, host, bar
        # Compressed, a range of the file would not be a range of the answer.
        self._headers = {**build_hf_headers(token=token or False), "Accept-Encoding": "identity"}
        self._lock = threading.Lock()
        self.stop = threading.Event()

    def fetch(self, file: RemoteFile) -> None:
        """Fetch one file, or the rest of it, and give it its final name."""
        from huggingface_hub.utils import httpx

        partial = PartialFile(file=file, folder=self._folder)
        patience = _Patience(host=self._host, waits=LATER_WAITS, stop=self.stop)
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
                        raise HubError(f"{file.name}: {self._host} sends {before} of {file.size} bytes")
            partial.settle()
        finally:
            partial.close()
        (say if file.name.endswith(".safetensors") else note)(f"{file.name}: {show_size(file.size)}, {file.digest}")

    def _stream(self, *, file: RemoteFile, partial: PartialFile) -> None:
        from huggingface_hub.utils import get_session, hf_raise_for_status

        wanted = {"Range": f"bytes={partial.done}-"} if partial.done else {}
        headers = {**self._headers, **wanted}
        with get_session().stream("GET", file.url, headers=headers, timeout=timeout()) as response:
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
        say(f"{self._host}: {reason(error)}; next attempt in {pause:.0f} s")
        if self._stop.wait(pause):
            raise _Stopped


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
