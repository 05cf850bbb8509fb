"""What is installed, as it is found here, and as it would be found where something is amiss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from lib import software
from lib.config import schema
from lib.llama_cpp import LlamaCpp
from lib.software import architecture_of, this_software
from lib.spec import LlamaCpp as ChosenLlamaCpp

PINNED = schema()["properties"]["llama_cpp"]["properties"]
CHOSEN = ChosenLlamaCpp(
    **{name: PINNED[name]["default"] for name in ("version", "sha256", "commit")}, path=None, cmake_flags=()
)


@pytest.fixture
def pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(software, "REQUIREMENTS", tmp_path / "requirements.txt")
    return tmp_path / "requirements.txt"


@pytest.mark.slow
def test_here_everything_works(llama_cpp: LlamaCpp) -> None:
    """The tests themselves train in 4 bits and convert, so that this has to be found."""
    found = this_software(CHOSEN)
    assert found.compiler.works and found.llama_cpp.works and found.bitsandbytes.works and found.packages.works
    assert found.llama_cpp.text.startswith(f"{llama_cpp.commit}, built; converts ")
    assert found.architectures is not None
    assert {"Qwen2ForCausalLM", "LlamaForCausalLM"} < found.architectures
    assert not {"ViTModel", "CLIPVisionModel"} & found.architectures
    assert found.packages.text == "all 29 as in requirements.txt"


def test_an_llama_cpp_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMILL_CACHE", str(tmp_path))
    finding, architectures = software._look_at_llama_cpp(CHOSEN)
    assert finding.works and "not built yet" in finding.text and architectures is None
    finding, _ = software._look_at_llama_cpp(replace(CHOSEN, path=str(tmp_path)))
    assert not finding.works and "has no convert_hf_to_gguf.py" in finding.text


def test_a_converter_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "convert_hf_to_gguf.py").write_text("import a_module_that_is_missing\n")
    broken = LlamaCpp(source=tmp_path, programs=tmp_path, commit="0c1e")
    monkeypatch.setattr(software, "find_llama_cpp", lambda **_: broken)
    finding, architectures = software._look_at_llama_cpp(CHOSEN)
    assert not finding.works and architectures is None
    assert finding.text.endswith("ModuleNotFoundError: No module named 'a_module_that_is_missing'")


@pytest.mark.parametrize(
    "lines", ["raise ImportError('libcudart.so.13: not found')", "import os; os.kill(os.getpid(), 11)"]
)
def test_a_bitsandbytes_that_does_not_work(lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bitsandbytes.py").write_text(lines)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = software._run_bitsandbytes()
    assert not finding.works and "does not work here: " in finding.text
    assert finding.text.endswith(("libcudart.so.13: not found", "it printed nothing"))


def test_packages_of_other_versions_and_missing_ones(pins: Path) -> None:
    pins.write_text("# pinned\nnumpy==0.1\npytest-of-nobody==1.0\n")
    finding = software._compare_packages()
    assert not finding.works and finding.text.endswith("pytest-of-nobody missing")
    pins.write_text("numpy==0.1\n")
    finding = software._compare_packages()
    assert finding.works and finding.text.startswith("not as in requirements.txt: numpy ")


def test_the_architecture_of_a_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    assert architecture_of(tiny_base) == "LlamaForCausalLM"
    assert architecture_of(tmp_path) is None
    assert software.REQUIREMENTS == ROOT / "requirements.txt"
