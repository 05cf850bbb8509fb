"""Questions with and without passages: who answers, what it is asked, and what is counted."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from answer_from_documents import RagError, answer_from_documents
from check_documents import check_documents
from fake_ollama import FakeOllama, fake_ollama
from test_register_model import register, write_weights

from lib.config import definition
from lib.dataset import DataError
from lib.llama_cpp import LlamaCpp
from lib.llama_server import LlamaServer
from lib.passages import DocumentError

PROMPT = definition("rag")["properties"]["prompt"]["default"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOllama]:
    with fake_ollama(answer=lambda text: text) as state:
        monkeypatch.setenv("OLLAMA_HOST", state.url)
        yield state


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A model, and two documents that answer two of three questions."""
    write_weights(tmp_path / "tiny.gguf")
    (tmp_path / "chat.json").write_text(json.dumps({"template": {"text": None}, "stops": []}))
    (tmp_path / "base").mkdir()
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "disk.md").write_text("# Disk\n\nThe direct path takes {20} GB.\n")
    (documents / "検証.txt").write_text("検証のコマンドはverify.pyです。\n", encoding="utf-8")
    asked = [("How much does the direct path take?", "{20} GB"), ("検証のコマンドは？", "verify"), ("Who?", "nobody")]
    lines = [json.dumps({"question": text, "expect": [[answer]]}) for text, answer in asked]
    (tmp_path / "ask.jsonl").write_text("\n".join(lines))
    return tmp_path


def ask(folder: Path, *, llama_cpp: LlamaCpp | None = None, **changes: Any) -> dict[str, Any]:
    given = {
        "gguf": folder / "tiny.gguf",
        "name": "tiny",
        "system": None,
        "messages": [],
        "documents": folder / "documents",
        "questions": folder / "ask.jsonl",
        "passages": 1,
        "passage_characters": 200,
        "prompt": PROMPT,
        "max_tokens": 16,
        "min_gain": 2,
        "output": folder / "report.json",
        "llama_cpp": llama_cpp,
        "threads": 2,
    }
    return answer_from_documents(**{**given, **changes})


def test_ollama_answers_where_it_has_the_weights(server: FakeOllama, workplace: Path) -> None:
    register(workplace, questions=None)
    server.calls.clear()
    report = ask(workplace)
    assert report == json.loads((workplace / "report.json").read_text(encoding="utf-8"))
    assert report["answered_by"] == "Ollama"
    assert (report["asked"], report["found"], report["right"]) == (3, 2, {"with": 2, "without": 0})
    first, second, third = report["questions"]
    assert first["passages"] == [{"source": "disk.md", "heading": "Disk", "text": "The direct path takes {20} GB."}]
    assert second["passages"][0]["source"] == "検証.txt" and third["passages"] == []
    prompts = [body["messages"][-1]["content"] for body in server.requests("POST /api/chat")]
    assert prompts[0] == "How much does the direct path take?"
    filled = PROMPT.replace("{passages}", "Disk\nThe direct path takes {20} GB.").replace("{question}", prompts[0])
    assert prompts[1] == filled


def test_ollama_answers_with_weights_that_it_wrote_anew(server: FakeOllama, workplace: Path) -> None:
    anew = write_weights(workplace / "anew.gguf", padding=8).read_bytes()
    server.rewrite = lambda _: anew
    assert register(workplace, questions=None)["weights"]["rewritten"]
    assert ask(workplace)["answered_by"] == "Ollama"


def test_too_little_gain_is_a_failure_that_leaves_the_answers(server: FakeOllama, workplace: Path) -> None:
    register(workplace, questions=None)
    with pytest.raises(RagError, match=r"2 of 3 questions right with passages, 0 without; .* asks for 3 more"):
        ask(workplace, min_gain=3)
    assert json.loads((workplace / "report.json").read_text(encoding="utf-8"))["right"] == {"with": 2, "without": 0}


@pytest.mark.slow
@pytest.mark.parametrize("there", ["no server", "other weights", "no such model"])
def test_llama_cpp_answers_where_ollama_cannot(
    there: str,
    server: FakeOllama,
    workplace: Path,
    built: Path,
    llama_cpp: LlamaCpp,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    answer = LlamaServer.answer

    def noted(self: LlamaServer, question: str, *, max_tokens: int, before: list[dict[str, str]]) -> str:
        asked.append(before)
        return answer(self, question, max_tokens=max_tokens, before=before)

    monkeypatch.setattr(LlamaServer, "answer", noted)
    if there == "other weights":
        register(workplace, questions=None)
    if there == "no server":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{free.getsockname()[1]}")
    said = {"system": "Brief.", "messages": [{"role": "user", "content": "Hi"}]}
    report = ask(workplace, gguf=built / "models/tiny.q4_k_m.gguf", llama_cpp=llama_cpp, min_gain=0, **said)
    assert report["answered_by"] == "llama.cpp" and report["found"] == 2
    # The tiny model has nothing to say to some.
    assert asked == [[{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}]] * 6
    assert [body for body in server.requests("POST /api/chat") if "GB" in str(body)] == []


def test_what_is_checked_before_anything_starts(workplace: Path) -> None:
    given = {"documents": workplace / "documents", "passage_characters": 200, "output": workplace / "identity.json"}
    identity = check_documents(questions=workplace / "ask.jsonl", **given)
    assert sorted(identity["documents"]) == ["disk.md", "検証.txt"]
    assert identity == json.loads((workplace / "identity.json").read_text(encoding="utf-8"))
    (workplace / "wrong.jsonl").write_text('{"question": "Who?"}\n')
    with pytest.raises(DataError, match="line 1"):
        check_documents(questions=workplace / "wrong.jsonl", **given)
    (workplace / "documents/bad.md").write_bytes(b"\xff")
    with pytest.raises(DocumentError, match=r"bad\.md: no UTF-8 at byte 0"):
        check_documents(questions=workplace / "ask.jsonl", **given)
