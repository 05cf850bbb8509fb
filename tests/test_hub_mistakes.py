"""What is said when a Hub refuses, is out of order or out of reach, and when the disk is full."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from fake_hub import FakeHub
from hub_model import FIRST, REPO, TOKEN, contents, model_files

from lib.hub import download_checkpoint
from lib.hub_folder import HubError, PartialFile

# Refusals


@pytest.mark.parametrize(("token", "advice"), [(None, "set HF_TOKEN to a token"), ("hf_wrong", "HF_TOKEN is set, but")])
@pytest.mark.parametrize("barrier", ["gated", "private"])
def test_closed_repository(
    fake: FakeHub, output: Path, monkeypatch: pytest.MonkeyPatch, barrier: str, token: str | None, advice: str
) -> None:
    getattr(fake, barrier).add(REPO)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=f"{barrier}.*{advice}") as refused:
        download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert "\n" not in str(refused.value)
    assert "hf_wrong" not in str(refused.value)


def test_absent_repository_and_revision(fake: FakeHub, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match="maker/none .*does not exist or is private.*base.hub"):
        download_checkpoint(repo_id="maker/none", revision="main", output=output)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="maker/none .*does not exist: check base.hub"):
        download_checkpoint(repo_id="maker/none", revision="main", output=output)
    with pytest.raises(HubError, match=f"{REPO} .*no revision 'v9'.*base.revision"):
        download_checkpoint(repo_id=REPO, revision="v9", output=output)


@pytest.mark.parametrize(
    ("repo_id", "revision", "message"),
    [
        ("a/b/c", "main", "'a/b/c' is not the name of a repository"),
        ("", "main", "base.hub needs"),
        (REPO, "", "base.revision"),
    ],
)
def test_wrong_names(fake: FakeHub, output: Path, repo_id: str, revision: str, message: str) -> None:
    with pytest.raises(HubError, match=message):
        download_checkpoint(repo_id=repo_id, revision=revision, output=output)
    assert fake.requests == []


def test_no_network_is_one_plain_line(fake: FakeHub, output: Path) -> None:
    fake.stop()
    host = fake.endpoint.removeprefix("http://")
    with pytest.raises(HubError, match=f"cannot reach {host} .*base.path.*HF_HUB_OFFLINE=1") as refused:
        download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("status", "message"), [(500, "answers HTTP status 500"), (429, "limits the rate"), (418, "status 418")]
)
def test_hub_out_of_order(fake: FakeHub, output: Path, status: int, message: str) -> None:
    fake.status = [status] * 3
    with pytest.raises(HubError, match=message):
        download_checkpoint(repo_id=REPO, revision="main", output=output)


@pytest.mark.parametrize("page", [b"<html>please log in</html>", b"[]", b'{"error": 1}', b'{"id": "a/b"}'])
def test_something_that_is_not_a_hub(fake: FakeHub, output: Path, page: bytes) -> None:
    fake.page = page
    with pytest.raises(HubError, match="does not answer as a Hub does|gives no commit"):
        download_checkpoint(repo_id=REPO, revision="main", output=output)


@pytest.mark.parametrize("endpoint", ["huggingface.co", "ftp://host", "http://[bad", "http://host:port"])
def test_wrong_endpoint(fake: FakeHub, output: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(HubError, match="HF_ENDPOINT is not an address"):
        download_checkpoint(repo_id=REPO, revision="main", output=output)


# The disk


def test_too_small_a_disk_is_seen_before_the_shards(
    fake: FakeHub, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 2_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(HubError, match=r"6\.0 MB are still to be fetched, but only 2\.5 MB are free"):
        download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert not fake.fetched(FIRST)


def test_disk_that_fills_up_meanwhile(fake: FakeHub, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = PartialFile.write

    def full(self: PartialFile, block: bytes) -> None:
        if self.done > 1_500_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, block)

    monkeypatch.setattr(PartialFile, "write", full)
    with pytest.raises(HubError, match="MB are still to be fetched, but only .* are free on this disk"):
        download_checkpoint(repo_id=REPO, revision="main", output=output)
    monkeypatch.setattr(PartialFile, "write", write)
    download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert contents(output) == model_files()


def test_output_that_cannot_be_a_folder(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HubError, match=r"file/\.hub: Not a directory"):
        download_checkpoint(repo_id=REPO, revision="main", output=tmp_path / "file")
