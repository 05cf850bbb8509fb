"""`make clean` removes what can be had again in a moment, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from conftest import ROOT

KEPT = ("bases/m/MANIFEST.json", "adapters/m/adapter_config.json", "models/m.q4_k_m.gguf", "reports/m.smoke.json",
        "work/m/checkpoints/state", "ollama/m.json", ".snakemake/metadata/x")  # fmt: skip
REMOVED = ("logs/m/train_adapter.log", "scripts/lib/__pycache__/x.pyc", ".pytest_cache/x", ".ruff_cache/x")


def make(folder: Path, target: str, *, answer: str = "") -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "Makefile", folder)
    for name in (*KEPT, *REMOVED, "tests/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return subprocess.run(["make", target], cwd=folder, input=answer, capture_output=True, text=True)


def there(folder: Path, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if (folder / name).exists()]


def test_clean_keeps_artifacts_and_checkpoints(tmp_path: Path) -> None:
    done = make(tmp_path, "clean")
    assert done.returncode == 0, done.stderr
    assert there(tmp_path, KEPT) == list(KEPT)
    assert there(tmp_path, REMOVED) == []


def test_clean_all_asks_first(tmp_path: Path) -> None:
    assert make(tmp_path, "clean-all", answer="n\n").returncode == 0
    assert there(tmp_path, KEPT) == list(KEPT)
    assert make(tmp_path, "clean-all", answer="y\n").returncode == 0
    assert there(tmp_path, KEPT) == []
