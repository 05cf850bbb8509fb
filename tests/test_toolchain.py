"""Which compiler is used, and what is said without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.toolchain import CompilerError, describe_compiler


def compiler(folder: Path, name: str, text: str) -> Path:
    """A program that answers --version, after words of its own, as a compiler does."""
    program = folder / name
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    return program


def test_compilers_of_several_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = compiler(
        tmp_path, "g++ of mine", 'for last; do :; done; [ "$last" = --version ] && echo "g++ 12.2"; echo more'
    )
    launcher = compiler(tmp_path, "ccache", 'exec "$@"')
    described = {}
    for chosen in (f"'{own}'", f"'{own}' -O2", f"{launcher} '{own}'"):
        monkeypatch.setenv("CXX", chosen)
        described[chosen] = describe_compiler()
    assert [*described.values()] == ["g++ 12.2", "g++ 12.2 -O2", f"g++ 12.2 {own}"]


@pytest.mark.parametrize("chosen", ["no-such-compiler", "env no-such-compiler", "false", "'unbalanced"])
def test_no_compiler_of_that_name(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", chosen)
    with pytest.raises(CompilerError, match=rf"no C\+\+ compiler \({chosen}\)"):
        describe_compiler()
