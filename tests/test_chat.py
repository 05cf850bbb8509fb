"""Conversations, read by transformers, by llama-server and by Go's text/template: the same tokens, or a refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from convert_gguf import convert_gguf
from real_tokenizers import R1_DISTILL_QWEN, write_tokenizer
from render_modelfile import write_modelfile
from test_chat_format import FAMILIES
from test_modelfile import read
from tiny_gguf import imported

from lib.chat_jinja import tokens_for_training
from lib.chat_parity import PROBES, ParityError, first_difference
from lib.llama_cpp import LlamaCpp
from lib.loading import BaseModelError
from lib.modelfile import ModelfileError

pytest_plugins = ["chat_templates"]
pytestmark = pytest.mark.slow


def rendered(
    gguf: Path, tokenizer: Path, llama_cpp: LlamaCpp, *, system: str | None = None
) -> tuple[dict[str, str], list[str], dict[str, dict]]:
    """A Modelfile's statements, its stops, and the report."""
    output, report = gguf.with_suffix(".Modelfile"), gguf.with_suffix(".chat.json")
    write_modelfile(
        gguf=gguf,
        tokenizer=tokenizer,
        system=system,
        messages=[],
        parameters={},
        output=output,
        report=report,
        llama_cpp=llama_cpp,
        threads=2,
    )
    statements = read(output.read_text(encoding="utf-8"))
    stops = [value for command, value in statements if command == "PARAMETER stop"]
    return dict(statements), stops, json.loads(report.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def r1(tmp_path_factory: pytest.TempPathFactory, llama_cpp: LlamaCpp) -> Path:
    """A folder with the F16 file of a small random Qwen2 that has the tokenizer of DeepSeek-R1-Distill-Qwen."""
    folder = tmp_path_factory.mktemp("r1")
    write_tokenizer(R1_DISTILL_QWEN, folder / "checkpoint")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=152_064, tie_word_embeddings=True)
    transformers.Qwen2ForCausalLM(config).to(torch.float16).save_pretrained(folder / "checkpoint")
    convert_gguf(
        checkpoint=folder / "checkpoint",
        manifest=None,
        artifact="base",
        name="r1",
        outtype="f16",
        output=folder / "r1.f16.gguf",
        llama_cpp=llama_cpp,
        threads=2,
    )
    return folder


def test_r1_distill_is_talked_to_as_it_was_trained(r1: Path, llama_cpp: LlamaCpp) -> None:
    statements, stops, report = rendered(r1 / "r1.f16.gguf", r1 / "checkpoint", llama_cpp, system="簡潔に。")
    user, assistant, end = "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"
    assert set(stops) == {user, assistant, end, "<｜begin▁of▁sentence｜>"}
    assert stops[0] == end
    assert f"{end}{user}" in statements["TEMPLATE"] and "begin▁of" not in statements["TEMPLATE"]
    assert statements["SYSTEM"] == "簡潔に。"
    assert report["template"] == {"text": statements["TEMPLATE"], "reason": None, "rendered_by_go": True}
    assert report["stops"] == stops
    assert all(each["tokens"] > 0 for each in report["conversations"].values())
    # The template cuts reasoning out of earlier answers; no TEMPLATE can.
    texts = report["beyond_template"]["reasoning in the text of an earlier answer"]
    assert texts["transformers"] == texts["llama.cpp"] and "<think>" not in texts["transformers"]
    assert "<think>" in texts["Ollama's TEMPLATE"]


def test_the_script_tells_of_what_it_changes_and_leaves_out(r1: Path) -> None:
    licence = r1 / "checkpoint/LICENSE"
    command = [sys.executable, ROOT / "scripts/render_modelfile.py", "--gguf", r1 / "r1.f16.gguf"]
    command += ["--tokenizer", r1 / "checkpoint", "--output", r1 / "x.Modelfile", "--report", r1 / "x.json"]
    command += ["--system", "答えは\u3000短く。", "--messages", '[{"role": "user", "content": "はい\u3000か"}]']
    for text, holds in (("MIT License\n\fas is\n", True), ('say """', False)):
        licence.write_text(text)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "ollama.system: Ollama drops U+3000 from a Modelfile" in done.stderr
        assert "ollama.messages: Ollama drops U+3000 from a Modelfile" in done.stderr
        assert ("the licence is left out: a Modelfile cannot hold" in done.stderr) != holds
        statements = read((r1 / "x.Modelfile").read_text(encoding="utf-8"))
        assert ("SYSTEM", "答えは 短く。") in statements and ("MESSAGE user", "はい か") in statements
        assert (("LICENSE", "MIT License\n as is") in statements) == holds
    licence.unlink()


def test_bos_stands_at_the_beginning_alone(r1: Path) -> None:
    bos = 151646
    for tokens in tokens_for_training(r1 / "checkpoint", [*PROBES.values()]):
        assert tokens is not None and tokens[0] == bos and tokens.count(bos) == 1


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "R1-Distill"])
def test_every_family_is_talked_to_as_it_was_trained(
    family: str, published: dict[str, str], make_gguf: Callable[..., Path], llama_cpp: LlamaCpp
) -> None:
    gguf = make_gguf(template=published[FAMILIES[family]])
    statements, stops, report = rendered(gguf, imported(gguf), llama_cpp)
    assert report["template"] == {"text": statements["TEMPLATE"], "reason": None, "rendered_by_go": True}
    assert report["stops"] == stops
    assert statements["TEMPLATE"] and stops
    assert report["served_with_the_date_of_the_day"] == (family == "Llama 3")
    refused = {name for name, each in report["conversations"].items() if each.get("refused")}
    assert refused == ({name for name in PROBES if "system" in name} if family == "Gemma" else set())


def test_a_template_that_no_go_can_write_is_left_out(make_gguf: Callable[..., Path], llama_cpp: LlamaCpp) -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] | upper + '<|im_end|>' }}{% endfor %}"
    gguf = make_gguf(template=template)
    statements, stops, report = rendered(gguf, imported(gguf), llama_cpp)
    assert "TEMPLATE" not in statements
    assert report["template"]["reason"] == "it leaves out, repeats or moves the texts of a conversation"
    assert stops[0] == "<|im_end|>"


def test_a_tokenizer_with_another_template_is_refused(make_gguf: Callable[..., Path], llama_cpp: LlamaCpp) -> None:
    gguf = make_gguf()
    checkpoint = imported(gguf)
    other = "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(other)
    with pytest.raises(ParityError, match="not served as it is trained with") as caught:
        rendered(gguf, checkpoint, llama_cpp)
    assert "one turn: at token" in str(caught.value)
    assert not gguf.with_suffix(".Modelfile").exists()


def test_a_tokenizer_without_a_template_is_refused(make_gguf: Callable[..., Path], llama_cpp: LlamaCpp) -> None:
    gguf = make_gguf()
    checkpoint = imported(gguf)
    (checkpoint / "chat_template.jinja").unlink()
    config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BaseModelError, match="cannot load its tokenizer .*chat_template is not set"):
        rendered(gguf, checkpoint, llama_cpp)


def test_a_system_prompt_that_the_template_trims(
    published: dict[str, str], make_gguf: Callable[..., Path], llama_cpp: LlamaCpp
) -> None:
    gguf = make_gguf(template=published[FAMILIES["Llama 3"]])
    statements, _, report = rendered(gguf, imported(gguf), llama_cpp, system="Be brief.\n")
    assert "TEMPLATE" not in statements
    assert "of the system prompt it writes more" in report["template"]["reason"]


def test_a_system_prompt_that_the_template_refuses(
    published: dict[str, str], make_gguf: Callable[..., Path], llama_cpp: LlamaCpp
) -> None:
    gguf = make_gguf(template=published[FAMILIES["Gemma"]])
    with pytest.raises(ModelfileError, match=r"ollama\.system: the model's chat template refuses a system message"):
        rendered(gguf, imported(gguf), llama_cpp, system="Be brief.")


def test_the_first_difference() -> None:
    assert first_difference("x", {"a": [1, 2], "b": [1, 2]}) is None
    found = first_difference("x", {"a": [1, 2], "b": [1, 3]})
    assert found and (found.place, found.tokens) == (1, {"a": 2, "b": 3})
    found = first_difference("x", {"a": [1, 2], "b": [1]})
    assert found and (found.place, found.tokens) == (1, {"a": 2, "b": None})
