"""Finding and building llama.cpp, as far as that needs no build."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lib import llama_cpp
from lib.llama_cpp import LlamaCppError, provide_llama_cpp, use_llama_cpp

PINNED = {"version": "0.3.36", "sha256": "0" * 64, "commit": "0c1e57098b", "cmake_flags": (), "threads": 1}


def own_build(folder: Path) -> Path:
    """A git checkout that looks like llama.cpp, with a program in build/bin."""
    (folder / "build/bin").mkdir(parents=True)
    (folder / "build/bin/llama-quantize").touch()
    (folder / "convert_hf_to_gguf.py").touch()
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "convert_hf_to_gguf.py"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    return folder


def test_own_build_is_taken_with_its_commit(tmp_path: Path) -> None:
    own = use_llama_cpp(own_build(tmp_path))
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert head.startswith(own.commit) and len(own.commit) == 10
    with pytest.raises(LlamaCppError, match="has no llama-server"):
        own.tool("llama-server")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("convert_hf_to_gguf.py", "has no convert_hf_to_gguf.py"),
        (".git/HEAD", "is no git checkout"),
        ("build/bin/llama-quantize", "has no llama-quantize"),
    ],
)
def test_own_build_that_is_not_whole(missing: str, message: str, tmp_path: Path) -> None:
    own_build(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(LlamaCppError, match=message):
        use_llama_cpp(tmp_path)


def test_another_source_flag_compiler_or_cpu_is_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMILL_CACHE", str(tmp_path))
    monkeypatch.setattr(llama_cpp, "_unpack_source", lambda *, home, **_: (home / "source").mkdir())
    monkeypatch.setattr(llama_cpp, "_build", lambda **_: None)
    homes = {provide_llama_cpp(**PINNED).source}
    homes.add(provide_llama_cpp(**PINNED | {"sha256": "1" * 64}).source)
    homes.add(provide_llama_cpp(**PINNED | {"cmake_flags": ("-DGGML_CUDA=ON",)}).source)
    with monkeypatch.context() as other:
        other.setattr(llama_cpp, "cpu_features", lambda: ["avx9"])
        homes.add(provide_llama_cpp(**PINNED).source)
    with monkeypatch.context() as other:
        other.setattr(llama_cpp, "describe_compiler", lambda: "another compiler")
        homes.add(provide_llama_cpp(**PINNED).source)
    assert len(homes) == 5
    assert provide_llama_cpp(**PINNED).source in homes


def test_flags_of_the_users_shell_do_not_reach_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "-march=x86-64-v3")
    monkeypatch.setenv("CXXFLAGS", "-Ofast")
    commands = []
    monkeypatch.setattr(
        llama_cpp, "run_program", lambda command, environment, follow=None: commands.append((command, environment))
    )
    llama_cpp._build(home=tmp_path, flags=llama_cpp.CMAKE_FLAGS, tools=("llama-quantize",), threads=3)
    assert all(environment["CFLAGS"] == environment["CXXFLAGS"] == "" for _, environment in commands)
    assert "-DCMAKE_C_FLAGS=-ffp-contract=off" in commands[0][0]
    assert commands[1][0][-4:] == ["--parallel", "3", "--target", "llama-quantize"]
    assert (tmp_path / "llama-quantize.built").exists()
