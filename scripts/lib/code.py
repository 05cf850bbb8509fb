"""The identity of a step's code: what changes when its behaviour may change, and only then."""

from __future__ import annotations

import ast
import hashlib
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from lib.jsonfile import read_json, write_json
from lib.toolchain import cache_folder

SCRIPTS = Path(__file__).resolve().parent.parent
# Of what is remembered of a file: to be raised when `_parse` says something else, as another Python may.
_FORM = f"2, Python {sys.version}"
# Modules that cannot change an artifact's bytes: they talk to the user, keep two runs apart, or carry option values,
# which a rule's params hold anyway. This one names what the others do.
_TALK = ("__init__", "cli", "code", "config", "console", "errors", "locks", "options", "typed", "usage")
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
    """What a file says to Python, and the names of what it imports, as files of ours would be called."""

    text: str
    imports: list[str]


def _closure(script: str) -> set[str]:
    found: set[str] = set()
    waiting = [script]
    while waiting:
        path = waiting.pop()
        if path not in found and path not in NEUTRAL:
            found.add(path)
            waiting.extend(name for name in _read(path).imports if (SCRIPTS / name).is_file())
    return found


@cache
def _read(path: str) -> _Source:
    """Parse a file, once for each content: all of them took a third of every start of Snakemake."""
    source = (SCRIPTS / path).read_bytes()
    kept = cache_folder() / "code" / f"{hashlib.sha256(_FORM.encode() + source).hexdigest()}.json"
    with suppress(OSError, ValueError, TypeError):
        return _Source(**read_json(kept))
    parsed = _parse(source)
    with suppress(OSError):  # a cache that cannot be written is none
        write_json(kept, asdict(parsed))
    return parsed


class _WithoutTypes(ast.NodeTransformer):
    """Leave out what is there for type checkers alone."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node


def _parse(source: bytes) -> _Source:
    """Unparsed text changes less between Python versions than a dump of the tree does."""
    tree = _WithoutTypes().visit(ast.parse(source))
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    files = sorted({name.replace(".", "/") + ".py" for name in names})
    return _Source(text=ast.unparse(tree), imports=files)
