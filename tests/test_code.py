"""The digest of a step's code: what changes it, and what does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lib import code

FILES = {
    "train.py": '"""Train."""\nfrom lib.model import fit\n\n\ndef main():\n    """Run."""\n    fit(1)\n',
    "merge.py": "import json\n\nfrom lib import numbers\n\nnumbers.add(json.loads('1'), 2)\n",
    "lib/__init__.py": "",
    "lib/model.py": "def fit(n):\n    from lib.numbers import add\n\n    return add(n, 1)\n",
    "lib/numbers.py": "def add(a, b):\n    return a + b\n",
    "lib/console.py": "def say(text):\n    print(text)\n",
    "lib/unused.py": "VALUE = 1\n",
}


def forget() -> None:
    """The module remembers what it has parsed; a test changes files under it."""
    code._read.cache_clear()


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(code, "SCRIPTS", tmp_path)
    monkeypatch.setenv("MODELMILL_CACHE", str(tmp_path / "cache"))
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    forget()
    yield tmp_path
    forget()


def digests() -> dict[str, str]:
    forget()
    return {script: code.code_digest(script) for script in ("train.py", "merge.py")}


def changed_by(tree: Path, name: str, text: str) -> set[str]:
    """The scripts whose digest another text of a file changes."""
    before = digests()
    (tree / name).write_text(text)
    after = digests()
    return {script for script in before if before[script] != after[script]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lib/numbers.py", "# adds\ndef add(a, b):\n    return a + b  # at once\n"),
        ("lib/numbers.py", '"""Numbers."""\n\n\ndef add(a, b):\n    """Add."""\n    return a + b\n'),
        ("lib/numbers.py", "\n\ndef add(\n    a,\n    b,\n):\n\n    return (a + b)\n"),
        ("train.py", FILES["train.py"].replace("Train.", "Train an adapter.").replace("Run.", "Go.")),
        ("train.py", FILES["train.py"].replace('    """Run."""\n', "")),
        ("lib/console.py", "def say(text):\n    raise SystemExit\n"),
        ("lib/__init__.py", "VALUE = 2\n"),
        ("lib/unused.py", "VALUE = 2\n"),
    ],
)
def test_what_changes_nothing(tree: Path, name: str, text: str) -> None:
    assert (tree / name).read_text() != text
    assert changed_by(tree, name, text) == set()


@pytest.mark.parametrize(
    ("name", "text", "scripts"),
    [
        ("lib/numbers.py", "def add(a, b):\n    return b + a\n", {"train.py", "merge.py"}),
        ("lib/numbers.py", "def add(a, b):\n    return a + b\n\n\nX = '''text'''\n", {"train.py", "merge.py"}),
        ("lib/model.py", FILES["lib/model.py"].replace("1", "2"), {"train.py"}),
        ("train.py", FILES["train.py"].replace("fit(1)", "fit(2)"), {"train.py"}),
        ("merge.py", FILES["merge.py"].replace("'1'", "'2'"), {"merge.py"}),
        ("merge.py", FILES["merge.py"] + "import lib.unused\n", {"merge.py"}),
    ],
)
def test_what_changes_which_scripts(tree: Path, name: str, text: str, scripts: set[str]) -> None:
    assert changed_by(tree, name, text) == scripts


def test_an_edit_that_is_taken_back(tree: Path) -> None:
    before = digests()
    assert changed_by(tree, "lib/numbers.py", "def add(a, b):\n    return a - b\n")
    (tree / "lib/numbers.py").write_text(FILES["lib/numbers.py"])
    assert digests() == before


def test_moving_code_between_modules_counts(tree: Path) -> None:
    """The same statements under another name may run in another order."""
    (tree / "lib/other.py").write_text(FILES["lib/numbers.py"])
    assert changed_by(tree, "merge.py", FILES["merge.py"].replace("numbers", "other")) == {"merge.py"}


def test_what_is_imported_for_type_checkers_does_not_count(tree: Path) -> None:
    typed = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lib.unused import VALUE\n" + FILES["merge.py"]
    )
    assert changed_by(tree, "merge.py", typed) == {"merge.py"}
    assert changed_by(tree, "lib/unused.py", "VALUE = 2\n") == set()
    assert changed_by(tree, "merge.py", typed.replace("VALUE", "VALUE as V")) == set()
    assert changed_by(tree, "merge.py", typed.replace("if TYPE", "if not TYPE")) == {"merge.py"}


def test_modules_may_import_each_other(tree: Path) -> None:
    (tree / "lib/numbers.py").write_text("import lib.model\n" + FILES["lib/numbers.py"])
    assert len(set(digests().values())) == 2


def test_the_place_of_the_scripts_does_not_count(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests()
    monkeypatch.setattr(code, "SCRIPTS", tree.rename(tree.with_name("moved")))
    assert digests() == before


def kept(tree: Path) -> list[Path]:
    return list((tree / "cache").glob("code/*.json"))


def test_what_is_remembered_is_not_parsed_again(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests()
    assert kept(tree)
    monkeypatch.setattr(code, "_parse", None)
    assert digests() == before


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"text": ""}'])
def test_a_damaged_memory_is_none(content: str, tree: Path) -> None:
    before = digests()
    for path in kept(tree):
        path.write_text(content)
    assert digests() == before


def test_no_memory_is_needed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests()
    monkeypatch.setenv("MODELMILL_CACHE", str(tree / "train.py"))
    assert digests() == before


def test_another_python_parses_itself(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests()
    count = len(kept(tree))
    monkeypatch.setattr(code, "_FORM", "another")
    digests()
    assert len(kept(tree)) == 2 * count


def test_form(tree: Path) -> None:
    assert all(len(digest) == 16 and set(digest) <= set("0123456789abcdef") for digest in digests().values())


def test_neutral_modules_exist() -> None:
    """A module that was renamed would silently count again, or another of its name would not."""
    assert [name for name in code.NEUTRAL if not (code.SCRIPTS / name).is_file()] == []


def test_our_imports_are_all_absolute() -> None:
    """Relative ones are not followed."""
    import ast

    relative = [
        f"{path.name}:{node.lineno}"
        for path in [*code.SCRIPTS.glob("*.py"), *code.SCRIPTS.glob("lib/*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []
