"""Pins: exact, the same wherever they stand, and enough for what our scripts import."""

from __future__ import annotations

import ast
import functools
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
ENVIRONMENTS = sorted(path.name for path in (ROOT / "envs").glob("*.yaml"))
LISTS = ["requirements.txt", "requirements-dev.txt", "requirements-slurm.txt", "requirements-lock.txt"]


def lines_of(name: str) -> list[str]:
    """The requirements that a file lists, one a line."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".txt"):
        return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    parts = yaml.safe_load(text)["dependencies"]
    (packages,) = (part["pip"] for part in parts if isinstance(part, dict))
    return packages


def pins_of(name: str) -> dict[str, str]:
    requirements = [Requirement(line) for line in lines_of(name)]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in requirements}


def test_the_environments_are_there() -> None:
    assert {"train.yaml", "llama_cpp.yaml"} <= set(ENVIRONMENTS)


@pytest.mark.parametrize("name", [*LISTS, *(f"envs/{each}" for each in ENVIRONMENTS)])
def test_every_pin_is_exact_and_fits_any_index(name: str) -> None:
    """No local version and no hash: a machine with a GPU takes another build of torch than one without."""
    lines = lines_of(name)
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.]*", line), line
        assert Version(line.partition("==")[2]).local is None
    assert len({canonicalize_name(line.partition("==")[0]) for line in lines}) == len(lines), "a name twice"


@pytest.mark.parametrize("name", LISTS[:-1])
def test_the_lock_agrees(name: str) -> None:
    lock = pins_of("requirements-lock.txt")
    assert {package: lock.get(package) for package in pins_of(name)} == pins_of(name)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments_agree(name: str) -> None:
    pinned = pins_of("requirements.txt")
    found = pins_of(f"envs/{name}")
    assert {package: pinned.get(package) for package in found} == found


@pytest.mark.parametrize("name", [*LISTS[:-1], *(f"envs/{each}" for each in ENVIRONMENTS)])
def test_lists_are_sorted(name: str) -> None:
    """So that two lists can be compared by eye."""
    names = [line.partition("==")[0].lower() for line in lines_of(name)]
    assert names == sorted(names)


installed = functools.cache(packages_distributions)


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, at its top or later, as full names."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_checkers = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def packages_of(script: Path) -> set[str]:
    """The distributions that a script imports, itself or through our library."""
    known = installed()
    waiting, seen, found = [script], set(), set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for module in imports_of(path):
            own = SCRIPTS / (module.replace(".", "/") + ".py")
            top = module.partition(".")[0]
            if own.is_file():
                waiting += [own] if own not in seen else []
            elif top not in sys.stdlib_module_names and top != "lib" and not (SCRIPTS / f"{top}.py").is_file():
                found |= {canonicalize_name(each) for each in known[top]}
    return found


def test_whatever_is_imported_is_pinned() -> None:
    imported = set().union(*(packages_of(path) for path in [*SCRIPTS.glob("*.py"), *SCRIPTS.glob("lib/*.py")]))
    assert {"torch", "pyyaml", "safetensors"} <= imported
    assert imported - pins_of("requirements.txt").keys() == set()


RULES = [
    (script, environment)
    for path in sorted((ROOT / "rules").glob("*.smk"))
    for body in re.split(r"^ *rule\b", path.read_text(encoding="utf-8"), flags=re.M)[1:]
    for script in re.findall(r'script=script\("([a-z_]+\.py)"\)', body)
    for environment in re.findall(r'conda:\s+"\.\./(envs/[a-z_]+\.yaml)"', body)
]


@pytest.mark.parametrize(("script", "environment"), RULES, ids=lambda value: Path(value).stem)
def test_a_rules_environment_holds_what_its_script_imports(script: str, environment: str) -> None:
    assert packages_of(SCRIPTS / script) - pins_of(environment).keys() == set()


def test_every_script_of_a_rule_is_covered() -> None:
    used = {
        name
        for path in (ROOT / "rules").glob("*.smk")
        for name in re.findall(r'script\("([a-z_]+\.py)"\)', path.read_text())
    }
    assert used
    assert used == {script for script, _ in RULES}
