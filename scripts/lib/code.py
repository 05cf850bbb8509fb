"""The identity of a step's code: what changes when its behaviour may change, and only then."""

from __future__ import annotations

import ast
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent
# Modules that cannot change an artifact's bytes: they talk to the user, keep two runs apart, or carry option values,
# which a rule's params hold anyway.
_TALK = ("__init__", "cli", "config", "console", "errors", "locks", "options", "typed", "usage")
NEUTRAL = frozenset(f"lib/{name}.py" for name in _TALK)


def code_digest(script: str) -> str:
    """
    Digest of a script and every module of ours that it imports, directly or not.

    Comments, docstrings and layout do not count, nor do the modules in NEUTRAL: a corrected
    docstring must not retrain a 32B.

    Args:
        script: name of the script in scripts/, as in "merge_adapter.py".

    Returns:
        16 hex digits.
    """
    digest = hashlib.sha256()
    for path in sorted(_closure(script)):
        digest.update(f"{path}\0{_read(path).text}\0".encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Source:
    """What a file says to Python, and which of our files it imports."""

    text: str
    imports: tuple[str, ...]


def _closure(script: str) -> set[str]:
    found: set[str] = set()
    waiting = [script]
    while waiting:
        path = waiting.pop()
        if path not in found and path not in NEUTRAL:
            found.add(path)
            waiting.extend(_read(path).imports)
    return found


@cache
def _read(path: str) -> _Source:
    """Parse a file once; unparsed text changes less between Python versions than a dump of the tree does."""
    tree = ast.parse((SCRIPTS / path).read_text(encoding="utf-8"))
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    candidates = (name.replace(".", "/") + ".py" for name in names)
    ours = tuple(candidate for candidate in candidates if (SCRIPTS / candidate).is_file())
    return _Source(text=ast.unparse(tree), imports=ours)
