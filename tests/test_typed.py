"""Plain values into frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from lib.typed import build, plain


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Optional:
    size: int
    reason: str = "none given"
    sizes: tuple[int, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    maybe: Inner | None
    named: Mapping[str, Inner]
    free: Mapping[str, Any]


VALUES: dict[str, Any] = {
    "name": "a",
    "inner": {"sizes": [1, 2]},
    "maybe": None,
    "named": {"x": {"sizes": []}},
    "free": {"stop": ["a"]},
}


def test_nested_values() -> None:
    made = build(Outer, VALUES)
    assert made.name == "a"
    assert made.inner == Inner(sizes=(1, 2))
    assert made.maybe is None
    assert dict(made.named) == {"x": Inner(sizes=())}
    assert made.free["stop"] == ["a"]


def test_an_optional_that_is_there() -> None:
    assert build(Outer, {**VALUES, "maybe": {"sizes": [3]}}).maybe == Inner(sizes=(3,))


def test_mappings_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        build(Outer, VALUES).named["y"] = Inner(sizes=())


def test_unknown_keys_are_ignored_and_missing_ones_are_not() -> None:
    assert build(Inner, {"sizes": [1], "other": 2}) == Inner(sizes=(1,))
    with pytest.raises(KeyError, match="sizes"):
        build(Inner, {})


def test_a_field_with_a_default_may_be_left_out() -> None:
    assert build(Optional, {"size": 1}) == Optional(1, "none given", ())
    assert build(Optional, {"size": 1, "reason": "why", "sizes": [2]}) == Optional(1, "why", (2,))


def test_plain_is_the_way_back() -> None:
    """Null ones included, and as JSON can hold them."""
    assert plain(build(Outer, VALUES)) == VALUES
    assert plain(Optional(1, sizes=(2, 3))) == {"size": 1, "reason": "none given", "sizes": [2, 3]}
    assert type(plain(build(Outer, VALUES))["named"]) is dict
