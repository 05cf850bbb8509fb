"""Downloads from a Hub on the loopback interface: what comes, what survives, and what is said on failure."""

from __future__ import annotations

import hashlib
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_hub import FakeHub, Fault, requests_by_file
from hub_model import (
    FIRST,
    REPO,
    SCRIPTS,
    SECOND,
    SHARD,
    TOKEN,
    commit_of,
    contents,
    environment,
    index_of,
    model_files,
    noise,
    program,
    state,
)
from other_run import other_run

from lib import hub_transfer
from lib.console import LOGGER, configure_logging
from lib.hub import download_checkpoint
from lib.hub_folder import STATE_FOLDER, HubError
from lib.locks import LockedError

# What is fetched


def test_branch_is_resolved_and_only_usable_files_come(fake: FakeHub, output: Path) -> None:
    commit = download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert commit == commit_of(fake)
    assert contents(output) == model_files()
    assert state(output) == ["checkpoint.json"]
    assert requests_by_file(fake) == dict.fromkeys(model_files(), 1)
    fetched = [request.path for request in fake.requests if "/resolve/" in request.path]
    assert all(f"/resolve/{commit}/" in path for path in fetched)


def test_same_commit_gives_the_same_folder(fake: FakeHub, tmp_path: Path) -> None:
    records = []
    for name in ("one", "two"):
        download_checkpoint(repo_id=REPO, revision="main", output=tmp_path / name)
        records.append((tmp_path / name / STATE_FOLDER / "checkpoint.json").read_bytes())
    assert records[0] == records[1]
    assert str(tmp_path).encode() not in records[0]


def test_library_itself_reads_the_fake_hub_alike(
    fake: FakeHub, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub as the oracle: for the protocol spoken here, and for the bytes."""
    from huggingface_hub import snapshot_download

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    theirs = tmp_path / "theirs"
    download_checkpoint(repo_id=REPO, revision="main", output=output)
    snapshot_download(
        REPO,
        local_dir=theirs,
        cache_dir=tmp_path / "cache",
        endpoint=fake.endpoint,
        token=False,
        allow_patterns=list(model_files()),
    )
    shutil.rmtree(theirs / ".cache")
    assert contents(theirs) == contents(output)


def test_single_file_is_preferred_to_other_weights(fake: FakeHub, output: Path) -> None:
    files = {
        "config.json": b"{}",
        "model.safetensors": noise(5, 100),
        "model.fp32.safetensors": noise(6, 100),
    }
    fake.add("maker/single", files)
    download_checkpoint(repo_id="maker/single", revision="main", output=output)
    assert sorted(contents(output)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("weights", "advice"),
    [
        ({"pytorch_model.bin": b"pickle"}, "pickled"),
        ({"consolidated.00.pth": b"pickle"}, "pickled"),
        ({"model.gguf": b"GGUF"}, "base.gguf"),
        ({}, "base.hub"),
        ({"nested/model.safetensors": b"weights"}, "base.hub"),
    ],
)
def test_weights_in_other_formats_are_refused(
    fake: FakeHub, output: Path, weights: dict[str, bytes], advice: str
) -> None:
    fake.add("maker/other", {"config.json": b"{}", **weights})
    with pytest.raises(HubError, match=f"no weights in safetensors; .*{advice}"):
        download_checkpoint(repo_id="maker/other", revision="main", output=output)
    assert not requests_by_file(fake)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            index_of(FIRST, "model-00003.safetensors", "../secret.safetensors"),
            "../secret.safetensors, model-00003",
        ),
        (index_of("config.json"), "not there: config.json"),
        (b"[]", "no weight_map"),
        (b"{", "no weight_map"),
        (b'{"weight_map": {"layer.0": 1}}', "no weight_map"),
    ],
)
def test_wrong_index_stops_before_the_shards(fake: FakeHub, output: Path, index: bytes, message: str) -> None:
    fake.add(REPO, {**model_files(), "model.safetensors.index.json": index})
    with pytest.raises(HubError, match=message):
        download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert requests_by_file(fake) == {"model.safetensors.index.json": 1}


def test_new_commit_replaces_what_changed(fake: FakeHub, output: Path) -> None:
    download_checkpoint(repo_id=REPO, revision="main", output=output)
    (output / "MANIFEST.json").write_text("ours")
    files = model_files()
    del files[SECOND], files["vocab.txt"]
    files |= {"config.json": b"{}", "model.safetensors.index.json": index_of(FIRST)}
    commit = fake.add(REPO, files)
    fake.requests.clear()
    assert download_checkpoint(repo_id=REPO, revision="main", output=output) == commit
    assert contents(output) == {**files, "MANIFEST.json": b"ours"}
    assert sorted(requests_by_file(fake)) == ["config.json", "model.safetensors.index.json"]


def test_files_that_lie_there_already_are_checked_not_fetched(fake: FakeHub, output: Path) -> None:
    output.mkdir(parents=True)
    (output / FIRST).write_bytes(noise(1))
    (output / SECOND).write_bytes(noise(99))
    download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert contents(output) == model_files()
    assert not fake.fetched(FIRST)
    assert len(fake.fetched(SECOND)) == 1


# Interruptions


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_second_call_continues_a_shard_that_was_cut(fake: FakeHub, output: Path, reset: bool) -> None:
    fake.faults[SECOND] = Fault(after=2_500_000, times=1, reset=reset)
    with pytest.raises(HubError, match="cannot reach 127.0.0.1:"):
        download_without_patience(output)
    (partial,) = (output / STATE_FOLDER).glob(f"{SECOND}.*.part")
    kept = partial.stat().st_size
    # A reset may throw away what the client has not read yet, at worst all of it.
    assert kept < SHARD
    assert kept > 0 or reset
    assert not (output / SECOND).exists()

    fake.faults.clear()
    fake.requests.clear()
    download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert contents(output) == model_files()
    assert state(output) == ["checkpoint.json"]
    (request,) = fake.fetched(SECOND)
    assert request.headers.get("range") == (f"bytes={kept}-" if kept else None)


def download_without_patience(output: Path) -> None:
    """Download with one attempt per file, so that a cut ends the call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_transfer, "LATER_WAITS", ())
        download_checkpoint(repo_id=REPO, revision="main", output=output)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_ended_process_is_continued(fake: FakeHub, output: Path, tmp_path: Path, ending: signal.Signals) -> None:
    fake.hold[SECOND] = threading.Event()
    # An interrupt takes effect with the next bytes, or when the line has been silent for this many seconds.
    surroundings = environment(fake, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1")
    first = subprocess.Popen(program(output), env=surroundings, stderr=subprocess.DEVNULL)
    assert fake.holding.wait(30)
    wait_for_bytes(output / STATE_FOLDER, 1_000_000)
    first.send_signal(ending)
    assert first.wait(30) == -ending
    fake.hold.pop(SECOND).set()
    fake.requests.clear()
    download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert contents(output) == model_files()
    assert [request.headers.get("range", "")[:6] for request in fake.fetched(SECOND)] == ["bytes="]


def wait_for_bytes(folder: Path, size: int) -> None:
    """Until partial files hold `size` bytes on the disk."""
    limit = time.monotonic() + 30
    while sum(path.stat().st_size for path in folder.glob(f"{SECOND}*")) < size:
        if time.monotonic() > limit:
            pytest.fail("the download did not get going")
        time.sleep(0.02)


def test_passing_faults_pass_within_one_call(fake: FakeHub, output: Path) -> None:
    fake.status = [503, 429]
    fake.faults = {FIRST: Fault(after=1_200_000, times=1, reset=True), SECOND: Fault(after=0, times=2)}
    download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert contents(output) == model_files()


def test_server_without_ranges_starts_the_file_again(fake: FakeHub, output: Path) -> None:
    fake.ignore_ranges = True
    fake.faults[SECOND] = Fault(after=1_200_000, times=1)
    download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert contents(output) == model_files()


def test_partial_file_of_another_commit_is_not_continued(fake: FakeHub, output: Path) -> None:
    fake.faults[SECOND] = Fault(after=2_500_000, times=1)
    with pytest.raises(HubError):
        download_without_patience(output)
    assert list((output / STATE_FOLDER).glob(f"{SECOND}.*.part"))
    files = {**model_files(), SECOND: noise(7)}
    fake.add(REPO, files)
    fake.requests.clear()
    download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert contents(output) == files
    assert state(output) == ["checkpoint.json"]
    assert "range" not in fake.fetched(SECOND)[0].headers


@pytest.mark.parametrize("name", [SECOND, "tokenizer.json"])
def test_wrong_bytes_never_get_the_final_name(fake: FakeHub, output: Path, name: str) -> None:
    fake.corrupt = {name}
    with pytest.raises(HubError, match=f"{name}: .* but the Hub says (sha256|git):"):
        download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert not (output / name).exists()
    fake.corrupt = set()
    download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert contents(output) == model_files()


def test_second_process_on_the_same_folder_is_refused(fake: FakeHub, output: Path) -> None:
    with other_run(output), pytest.raises(LockedError, match="model is being written by another run"):
        download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert fake.requests == []
    download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


# Without a network


def test_offline_needs_a_complete_copy(fake: FakeHub, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="no complete copy .*HF_HUB_OFFLINE.*base.path"):
        download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert not output.exists()

    monkeypatch.delenv("HF_HUB_OFFLINE")
    commit = download_checkpoint(repo_id=REPO, revision="main", output=output)
    fake.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert download_checkpoint(repo_id=REPO, revision="main", output=output) == commit
    assert download_checkpoint(repo_id=REPO, revision=commit, output=output) == commit
    for repo_id, revision in ((REPO, "v2"), ("maker/other", "main")):
        with pytest.raises(HubError, match="no complete copy"):
            download_checkpoint(repo_id=repo_id, revision=revision, output=output)
    (output / FIRST).write_bytes(b"short")
    with pytest.raises(HubError, match="no complete copy"):
        download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert fake.requests == []


def test_offline_does_not_accept_an_unfinished_download(
    fake: FakeHub, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.faults[SECOND] = Fault(after=0, times=1)
    with pytest.raises(HubError):
        download_without_patience(output)
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    with pytest.raises(HubError, match="no complete copy"):
        download_checkpoint(repo_id=REPO, revision="main", output=output)


def test_complete_copy_of_a_commit_asks_nothing(fake: FakeHub, output: Path) -> None:
    commit = commit_of(fake)
    assert download_checkpoint(repo_id=REPO, revision=commit, output=output) == commit
    fake.requests.clear()
    assert download_checkpoint(repo_id=REPO, revision=commit, output=output) == commit
    assert fake.requests == []


# The token


def test_token_goes_to_the_hub_and_nowhere_else(
    fake: FakeHub,
    output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fake.private = fake.gated = {REPO}
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")
    handlers = list(LOGGER.handlers)
    configure_logging(log=tmp_path / "run.log")
    logging.getLogger("huggingface_hub").setLevel(logging.DEBUG)
    fake.faults[FIRST] = Fault(after=1000, times=1)
    download_checkpoint(repo_id=REPO, revision="main", output=output)
    fake.status = [401]
    with pytest.raises(HubError) as refused:
        download_checkpoint(repo_id=REPO, revision="main", output=output)
    LOGGER.handlers[:] = handlers

    sent = {request.storage: request.headers.get("authorization") for request in fake.requests}
    assert sent == {False: f"Bearer {TOKEN}", True: None}
    shown = capfd.readouterr()
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN not in shown.out + shown.err + str(refused.value)
    assert TOKEN.encode() not in files
    assert b"next attempt" in files


def test_token_file_of_the_library_is_not_read(fake: FakeHub, output: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_saved")
    subprocess.run(program(output), env=environment(fake, tmp_path), check=True, capture_output=True)
    assert all("authorization" not in request.headers for request in fake.requests)


@pytest.mark.parametrize("token", ["hf_a b", "hf_a\nb", "hf_ä"])
def test_malformed_token_is_not_shown(fake: FakeHub, output: Path, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match="HF_TOKEN holds") as refused:
        download_checkpoint(repo_id=REPO, revision="main", output=output)
    assert "hf_" not in str(refused.value)


def test_no_second_copy_anywhere(fake: FakeHub, tmp_path: Path) -> None:
    """The whole process sees only folders of this test; big files may be in the output alone, once."""
    output, home = tmp_path / "output", tmp_path / "home"
    home.mkdir()
    run = subprocess.run(program(output), env=environment(fake, home), capture_output=True, text=True, check=True)
    assert run.stdout.split() == [commit_of(fake)]
    assert "Traceback" not in run.stderr
    assert "\r" not in run.stderr
    digests = {hashlib.sha256(noise(seed)).hexdigest() for seed in (1, 2)}
    assert all(digest in run.stderr for digest in digests)
    big = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 10_000]
    assert sorted(big) == [output / FIRST, output / SECOND]
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_import_is_cheap() -> None:
    code = "import sys, lib.hub; sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SCRIPTS)}, check=True)
