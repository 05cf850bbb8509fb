"""Names of a backbone's parts, by whichever transformers they were written."""

from __future__ import annotations

from pathlib import Path

import pytest
from heatmap_runs import write_base
from safetensors.torch import load_file
from transformers import AutoModel

from lib.backbone_names import known_targets, pinned_name

PINNED = ["layers.0.attention.q_proj", "layers.0.attention.k_proj", "layers.0.attention.v_proj", "layers.0.mlp.fc1"]
OLDER = ["encoder.layer.0.attention.attention.query", "encoder.layer.0.attention.attention.value"]


def test_what_an_older_transformers_calls_dinov2s_parts(tmp_path: Path) -> None:
    """Published files still have the older names, so that transformers itself is the oracle."""
    published = load_file(write_base(tmp_path / "base", "dinov2") / "model.safetensors")
    assert "encoder.layer.0.attention.attention.query.weight" in published
    in_memory = set(AutoModel.from_pretrained(tmp_path / "base").state_dict())
    assert {pinned_name(name) for name in published} == in_memory


def test_names_of_the_pinned_version_stay() -> None:
    assert [pinned_name(name) for name in PINNED] == PINNED


@pytest.mark.parametrize(
    ("asked", "modules", "found"),
    [
        (["query", "value"], PINNED, ["q_proj", "v_proj"]),
        (["q_proj", "v_proj"], PINNED, ["q_proj", "v_proj"]),
        (["q_proj", "v_proj"], OLDER, ["query", "value"]),
        (["query"], OLDER, ["query"]),
        (["fc1", "valeu"], PINNED, ["fc1", "valeu"]),  # an unknown one stays, to be told
    ],
)
def test_targets_by_any_name(asked: list[str], modules: list[str], found: list[str]) -> None:
    assert known_targets(asked, modules) == found
