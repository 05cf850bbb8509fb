"""A model on a Hub on the loopback interface, and how its downloads are looked at."""

from __future__ import annotations

import functools
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub

from lib import hub_transfer
from lib.hub_folder import STATE_FOLDER

SCRIPTS = Path(__file__).parents[1] / "scripts"
REPO = "maker/model-ja"
SHARD = 3_000_000
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TOKEN = "hf_right"


@functools.cache
def noise(seed: int, size: int = SHARD) -> bytes:
    """Bytes that look like weights, more than one block of a download."""
    return random.Random(seed).randbytes(size)


def index_of(*shards: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"layer.{n}": name for n, name in enumerate(shards)}}).encode()


def model_files() -> dict[str, bytes]:
    """What the workflow uses of a repository."""
    return {
        "LICENSE": b"do what you like\n",
        "chat_template.jinja": b"{{ messages }}",
        "config.json": b'{"hidden_size": 8}\n',
        "merges.txt": b"a b\n",
        FIRST: noise(1),
        SECOND: noise(2),
        "model.safetensors.index.json": index_of(FIRST, SECOND),
        "tokenizer.json": b"{}",
        "tokenizer.model": noise(3, 1000),
        "vocab.txt": "語\n".encode(),
    }


def other_files() -> dict[str, bytes]:
    """What the same repository also holds, as real ones do."""
    return {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "MANIFEST.json": b"{}",
        "README.md": b"# model\n",
        "consolidated.safetensors": noise(4, 5000),
        "eval.png": b"\x89PNG",
        "license.bin": b"pickle",
        "license.py": b"import os",
        "model-q4_k_m.gguf": b"GGUF",
        "model.onnx": b"onnx",
        "modeling_custom.py": b"import os",
        "original/config.json": b"{}",
        "original/consolidated.00.pth": b"pickle",
        "pytorch_model-00001-of-00001.bin": b"pickle",
        "pytorch_model.bin.index.json.py": b"import os",
        "training_args.bin": b"pickle",
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but those of our own record."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: content for name, content in found.items() if not name.startswith(f"{STATE_FOLDER}/")}


def state(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / STATE_FOLDER).iterdir())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with one model, and an environment that knows no other."""
    from huggingface_hub.utils import close_session

    for name in (
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    # The library reads these once, at its import, which another test may have caused.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(hub_transfer, "FIRST_WAITS", (0.0, 0.0))
    monkeypatch.setattr(hub_transfer, "LATER_WAITS", (0.0, 0.0))
    close_session()
    with FakeHub() as server:
        server.add(REPO, {**model_files(), **other_files()}, names=("main", "v1"))
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server
    close_session()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "bases" / "model"


def commit_of(fake: FakeHub, name: str = "main") -> str:
    return fake.repositories[REPO].references[name]


def environment(fake: FakeHub, home: Path, **more: str) -> dict[str, str]:
    """For a process of its own, whose home is a folder of the test."""
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SCRIPTS), "HF_ENDPOINT": fake.endpoint}
    return {**kept, "HOME": str(home), "HF_HOME": str(home / "hf"), "TMPDIR": str(home), **more}


def program(output: Path) -> list[str]:
    """What a script does: log to stderr, download, print the commit."""
    code = (
        "import sys; from pathlib import Path; from lib.console import configure_logging;"
        "from lib.hub import download_checkpoint; configure_logging(log=None);"
        f"print(download_checkpoint(repo_id={REPO!r}, revision='main', output=Path(sys.argv[1])))"
    )
    return [sys.executable, "-c", code, str(output)]
