"""Registering with a server that follows Ollama's protocol, and with Ollama itself where it is installed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ollama
import pytest
from conftest import ROOT
from fake_ollama import FakeOllama, fake_ollama
from gguf import GGUFWriter
from register_model import ChatReportError, register_model

from lib import ollama_server
from lib.manifest import describe_file, write_file_manifest
from lib.ollama_server import COPIES, OllamaError, OllamaServer, refuse_full_disk

SYSTEM = "あなたは\u3000翻訳者です。"  # a full-width space, which a Modelfile would lose


def write_weights(path: Path, *, description: str = "LoRA adapter sha256:00", padding: int = 0) -> Path:
    """A GGUF file that is whole, with its manifest; `padding` changes its bytes and nothing of what it says."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_description(description)
    writer.add_uint32("llama.block_count", 1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("output_norm.weight", np.full(8 + padding, 0.5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_file_manifest(path, facts=describe_file(path), origin={"llama_cpp": "abc", "type": "f32"})
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOllama]:
    with fake_ollama() as state:
        monkeypatch.setenv("OLLAMA_HOST", state.url)
        yield state


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    write_weights(tmp_path / "tiny.gguf")
    talk = {"template": {"text": "{{ .Prompt }}"}, "stops": ["<end>"]}
    (tmp_path / "chat.json").write_text(json.dumps(talk))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "LICENSE").write_text('Apache "2.0"""')
    questions = [{"question": q, "expect": [[answer]]} for q, answer in (("Is it 4?", "4"), ("Is it 5?", "nine"))]
    (tmp_path / "ask.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in questions))
    return tmp_path


def register(folder: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "gguf": folder / "tiny.gguf",
        "chat": folder / "chat.json",
        "tokenizer": folder / "base",
        "name": "tiny",
        "system": SYSTEM,
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
        "parameters": {"temperature": 0.5, "stop": ["END"]},
        "questions": folder / "ask.jsonl",
        "max_tokens": 16,
        "output": folder / "receipt.json",
    }
    return register_model(**{**given, **changes})


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_sent_and_what_the_receipt_says(server: FakeOllama, workplace: Path) -> None:
    receipt = register(workplace)
    sha256 = digest_of(workplace / "tiny.gguf")
    weights = f"tiny:w-{sha256[:12]}"
    assert [call for call, _ in server.calls] == [
        "GET /api/version",
        "POST /api/show",
        f"HEAD /api/blobs/sha256:{sha256}",
        f"POST /api/blobs/sha256:{sha256}",
        "POST /api/create",
        "POST /api/create",
        "POST /api/show",
        "POST /api/chat",
        "POST /api/chat",
    ]
    imported, made = server.requests("POST /api/create")
    assert imported == {"model": weights, "files": {"tiny.gguf": f"sha256:{sha256}"}, "stream": False}
    assert made == {
        "model": "tiny",
        "from": weights,
        "template": "{{ .Prompt }}",
        "system": SYSTEM,
        "parameters": {"temperature": 0.5, "stop": ["<end>", "END"]},
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
        "license": 'Apache "2.0"""',
        "stream": False,
    }
    assert receipt == json.loads((workplace / "receipt.json").read_text(encoding="utf-8"))
    assert receipt["weights"] == {"name": weights, "sha256": sha256, "layer": sha256, "rewritten": False}
    assert receipt["server"] == {"version": "0.33.0"}
    assert [each["answer"] for each in receipt["answers"]] == ["You said: Is it 4?", "You said: Is it 5?"]
    assert (receipt["asked"], receipt["right"], receipt["tokens_per_second"]) == (2, 1, 10.0)
    chat = server.requests("POST /api/chat")[0]
    assert chat["options"] == {"temperature": 0.0, "num_predict": 16} and chat["stream"] is False


def test_another_system_prompt_sends_no_weights(server: FakeOllama, workplace: Path) -> None:
    register(workplace)
    server.calls.clear()
    register(workplace, system="Be brief.", parameters={})
    assert server.requests("HEAD") == server.requests("POST /api/blobs") == []
    (made,) = server.requests("POST /api/create")
    assert made["system"] == "Be brief." and made["parameters"] == {"stop": ["<end>"]}


def test_a_file_that_the_server_has_is_not_sent(server: FakeOllama, workplace: Path) -> None:
    # By the official client, whose way of sending blobs the server has to take as well.
    sent = ollama.Client().create_blob(workplace / "tiny.gguf")
    assert sent == f"sha256:{digest_of(workplace / 'tiny.gguf')}"
    server.calls.clear()
    register(workplace)
    assert len(server.requests("HEAD")) == 1 and server.requests("POST /api/blobs") == []


@pytest.mark.parametrize(
    ("name", "weights"),
    [("tiny", "tiny:w-"), ("me/tiny:short", "me/tiny:w-"), ("host:5000/me/tiny", "host:5000/me/tiny:w-")],
)
def test_the_name_of_weights(name: str, weights: str, server: FakeOllama, workplace: Path) -> None:
    receipt = register(workplace, name=name)
    assert re.fullmatch(rf"{weights}[0-9a-f]{{12}}", receipt["weights"]["name"])


def test_without_questions_it_has_to_say_something(server: FakeOllama, workplace: Path) -> None:
    receipt = register(workplace, questions=None)
    assert receipt["right"] is None and receipt["asked"] == 1
    server.answer = lambda text: " "
    with pytest.raises(OllamaError, match="tiny is registered, but answers nothing"):
        register(workplace, questions=None)


def failure(workplace: Path, said: str, **changes: Any) -> str:
    """A registration that fails, and leaves no receipt, not even one of an earlier time."""
    (workplace / "receipt.json").write_text("{}")
    with pytest.raises(OllamaError, match=said) as caught:
        register(workplace, **changes)
    assert not (workplace / "receipt.json").exists()
    return str(caught.value)


def test_no_server(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("OLLAMA_HOST", address)
        failure(
            workplace, rf"no Ollama server answers at http://{address}; start one \(ollama serve\), or set OLLAMA_HO"
        )


def test_a_server_without_tls(server: FakeOllama, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", os.environ["OLLAMA_HOST"].replace("http://", "https://"))
    failure(workplace, r"no secured connection to https://.*SSL.*; does OLLAMA_HOST want http://\?")


def test_a_host_that_is_none(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "localhost:port")
    failure(workplace, "no address of a server can be made of OLLAMA_HOST='localhost:port'")


ENVIRONMENTS = {
    "a port that is none": ({"OLLAMA_HOST": "localhost:port"}, "OLLAMA_HOST='localhost:port'"),
    "half an address": ({"OLLAMA_HOST": "http://[::1"}, "no address of a server"),
    "another protocol": ({"OLLAMA_HOST": "ftp://localhost"}, "OLLAMA_HOST or OLLAMA_API_KEY is not of the right form"),
    "a proxy of a kind that is not there": ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "ALL_PROXY='socks5://127.0.0.1:9'"),
    "a key with a line break": ({"OLLAMA_API_KEY": "SECRET\n"}, "OLLAMA_API_KEY is not of the right form"),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments_that_are_wrong(name: str, server: FakeOllama, workplace: Path) -> None:
    """In a process of its own, since the official client looks at them when it is imported."""
    variables, said = ENVIRONMENTS[name]
    done = subprocess.run(command_line(workplace), capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "SECRET" not in done.stderr


def test_a_proxy_is_for_other_machines(server: FakeOllama, workplace: Path) -> None:
    proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(command_line(workplace), capture_output=True, text=True, env={**os.environ, **proxies})
    assert done.returncode == 0, done.stderr


def test_a_server_that_says_nothing(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_server, "LOOK_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{silent.getsockname()[1]}")
        failure(workplace, "did not tell its version in time")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"template": {"text": 1}, "stops": []}', '{"template": {"text": ""}}']
)
def test_a_chat_report_that_is_none_is_told_before_anything_is_sent(
    text: str, server: FakeOllama, workplace: Path
) -> None:
    (workplace / "chat.json").write_text(text)
    with pytest.raises(ChatReportError, match="chat.json is no report of render_modelfile.py"):
        register(workplace)
    assert server.calls == []


@pytest.mark.parametrize("version", ["0.5.4", "0.1.29-rc1", "0.4"])
def test_an_old_server(version: str, server: FakeOllama, workplace: Path) -> None:
    server.version = version
    failure(workplace, rf"is Ollama {version}; 0\.5\.5 or later is needed")


@pytest.mark.parametrize("version", ["0.5.5", "0.33.0-rc2", "1.0", "0.0.0"])
def test_a_server_that_is_not_old(version: str, server: FakeOllama, workplace: Path) -> None:
    server.version = version
    assert register(workplace)["server"] == {"version": version}


@pytest.mark.parametrize("answer", [(200, "<html>"), (200, {}), (404, None), (200, "[]")])
def test_another_server(answer: tuple[int, Any], server: FakeOllama, workplace: Path) -> None:
    server.failing["GET /api/version"] = answer
    failure(workplace, "tell its version")


FULL = {"error": "write /root/.ollama/models/blobs/sha256-1: no space left on device"}


@pytest.mark.parametrize(
    ("call", "answer", "said"),
    [
        ("POST /api/blobs", (500, FULL), "no space left on device.*; its disk is full: remove models"),
        ("POST /api/blobs", (413, "<html>too large</html>"), "could not take .*tiny.gguf: <html>too large"),
        ("HEAD", (500, None), "could not look for a file: "),
        ("POST /api/create", (200, FULL), "could not create tiny:w-.*no space left on device; its disk is full"),
        # As a server streams that was told not to.
        (
            "POST /api/create",
            (200, '{"status":"parsing GGUF"}\n{"error":"unsupported architecture"}\n'),
            "could not create tiny:w-[0-9a-f]+: unsupported architecture$",
        ),
        ("POST /api/create", (400, {"error": "invalid model name"}), "could not create tiny:w-.*: invalid model name$"),
        ("POST /api/create", (200, {"status": "parsing GGUF"}), "did not finish creating tiny:w-.*'parsing GGUF'"),
        (
            "POST /api/chat",
            (200, {"error": "model requires more system memory"}),
            "let tiny answer: model requires more",
        ),
        ("POST /api/chat", (500, {"error": "llama runner process has terminated"}), "llama runner process"),
        ("POST /api/chat", (200, {"done": True}), "does not answer as Ollama does when it has to let tiny answer"),
        ("POST /api/show", (500, {"error": "file does not exist"}), "could not show tiny:w-.*file does not exist"),
        ("POST /api/show", (200, {"modelfile": "FROM other", "model_info": {}}), "does not tell which weights tiny:w-"),
    ],
)
def test_refusals(call: str, answer: tuple[int, Any], said: str, server: FakeOllama, workplace: Path) -> None:
    server.failing[call] = answer
    failure(workplace, said)


def test_weights_that_are_another_models(server: FakeOllama, workplace: Path) -> None:
    other = write_weights(workplace / "other.gguf", description="LoRA adapter sha256:11").read_bytes()
    server.rewrite = lambda _: other
    said = failure(workplace, "tiny at http.* has other weights than .*tiny.gguf: sha256 ")
    assert digest_of(workplace / "tiny.gguf") in said and "they differ in general.description" in said


def test_weights_that_the_server_writes_anew(server: FakeOllama, workplace: Path) -> None:
    anew = write_weights(workplace / "anew.gguf", padding=8)
    server.rewrite = lambda _: anew.read_bytes()
    receipt = register(workplace)
    assert receipt["weights"]["rewritten"] and receipt["weights"]["layer"] == digest_of(anew)


Usage = namedtuple("Usage", "free")


@pytest.mark.parametrize("has_blob", [False, True])
def test_a_local_disk_that_is_too_small(has_blob: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models/not/there/yet"))
    need = (COPIES - has_blob) * 1000
    looked_at = []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: looked_at.append(place) or Usage(need - 1))
    with pytest.raises(OllamaError, match="OLLAMA_MODELS"):
        refuse_full_disk(1000, has_blob=has_blob)
    assert looked_at == [tmp_path]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(need))
    refuse_full_disk(1000, has_blob=has_blob)


def test_the_disk_is_looked_at_before_anything_is_sent(
    server: FakeOllama, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0))
    failure(workplace, "0.0 GB free")
    assert server.requests("POST /api/blobs") == server.requests("POST /api/create") == []


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("", True),
        ("localhost", True),
        ("0.0.0.0:1234", True),
        ("[::1]", True),
        ("https://example.com", False),
        ("10.0.0.7", False),
    ],
)
def test_whether_the_server_is_here(host: str, local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert OllamaServer().is_local is local


def command_line(workplace: Path, name: str = "tiny") -> list[str | Path]:
    names = {"gguf": "tiny.gguf", "chat": "chat.json", "tokenizer": "base", "output": "out/receipt.json"}
    command = [sys.executable, ROOT / "scripts/register_model.py", f"--name={name}", f"--system={SYSTEM}"]
    return [*command, *(f"--{option}={workplace / name}" for option, name in names.items())]


def test_the_command_line(server: FakeOllama, workplace: Path) -> None:
    command = command_line(workplace)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "talk to it: ollama run tiny" in done.stderr
    assert server.models["tiny:latest"]["system"] == SYSTEM
    server.failing["POST /api/create"] = (200, FULL)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "no space left" in done.stderr and "Traceback" not in done.stderr
    for name in ("bad name", "tiny\n", "host:5000/tiny"):
        done = subprocess.run(command_line(workplace, name), capture_output=True, text=True)
        assert done.returncode == 2 and "is not of the form" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ollama") is None, reason="no ollama on PATH")
def test_ollama_itself(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{probe.getsockname()[1]}")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    process = subprocess.Popen(
        ["ollama", "serve"], env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            try:
                OllamaServer().version()
                break
            except OllamaError:
                time.sleep(0.2)
        receipt = register_model(
            gguf=built / "models/tiny.q4_k_m.gguf",
            chat=built / "reports/tiny.chat.json",
            tokenizer=built / "bases/tiny" if (built / "bases/tiny/config.json").exists() else tmp_path,
            name="tiny",
            system=SYSTEM,
            messages=[],
            parameters={"temperature": 0.5},
            questions=built / "ask.jsonl",
            max_tokens=8,
            output=tmp_path / "receipt.json",
        )
        assert receipt["weights"]["layer"] == digest_of(built / "models/tiny.q4_k_m.gguf")
        assert ollama.Client().show("tiny").modelfile.count(SYSTEM) == 1
        # And the Modelfile as it is.
        made = subprocess.run(["ollama", "create", "again", "-f", built / "models/tiny.Modelfile"], capture_output=True)
        assert made.returncode == 0, made.stderr
    finally:
        process.terminate()
        process.wait()
