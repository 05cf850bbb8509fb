"""Types of single tensors: their options, their names, and patterns that say nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from lib.config import definition, mistakes_in
from lib.tensor_types import (
    TensorTypeError,
    TensorTypes,
    pattern_problems,
    pure_problem,
    quantizer_options,
    refuse_unmatched,
)

RULES = definition("quantize")
NAMES = ["token_embd.weight", "output.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight", "blk.1.ffn_down.weight"]


def types(**changes: Any) -> TensorTypes:
    plain = {"pure": False, "leave_output_tensor": False, "output_tensor_type": None, "token_embedding_type": None}
    return TensorTypes(**{**plain, "tensor_type": {}, **changes})


def test_options_are_those_of_llama_quantize() -> None:
    assert quantizer_options(types()) == []
    assert quantizer_options(types(pure=True, leave_output_tensor=True)) == ["--pure", "--leave-output-tensor"]
    assert quantizer_options(types(output_tensor_type="q6_k", token_embedding_type="f16")) == [
        *("--output-tensor-type", "q6_k"),
        *("--token-embedding-type", "f16"),
    ]


def test_patterns_keep_their_order() -> None:
    """The first one that matches counts, so this order is not that of the alphabet."""
    chosen = {r"blk\.1\.attn": "q8_0", "attn": "q4_0"}
    assert quantizer_options(types(tensor_type=chosen)) == [
        *("--tensor-type", r"blk\.1\.attn=q8_0"),
        *("--tensor-type", "attn=q4_0"),
    ]
    assert quantizer_options(types(tensor_type=dict(reversed(chosen.items()))))[1] == "attn=q4_0"


def test_every_tensor_type_of_llama_cpp_can_be_named() -> None:
    """Left out: integers, types of activations alone, and those for weights that were trained in them."""
    special = {"i8", "i16", "i32", "i64", "f64", "q8_1", "q8_k", "mxfp4", "nvfp4", "q1_0", "q2_0"}
    every = {member.lower() for member in GGMLQuantizationType.__members__} - special
    assert set(RULES["properties"]["tensor_type"]["additionalProperties"]["enum"]) == every
    for key in ("output_tensor_type", "token_embedding_type"):
        # llama.cpp stops over these without a matrix (ggml_quantize_requires_imatrix), and has none for these tensors.
        assert set(RULES["properties"][key]["enum"]) == every - {"iq2_xxs", "iq2_xs", "iq1_s"} | {None}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"output_tensor_type": "Q8_0"}, "output_tensor_type: 'Q8_0' is none of f32, f16"),
        ({"token_embedding_type": "q6k"}, "did you mean 'q6_k'?"),
        ({"token_embedding_type": "iq2_xs"}, "'iq2_xs' is none of"),
        ({"tensor_type": {"attn_v": "q4_k_m"}}, "tensor_type.attn_v: 'q4_k_m' is none of"),
        ({"tensor_type": {"attn_v": "q4_k_m"}}, "did you mean 'q4_k'?"),
        ({"tensor_type": {"attn_v": None}}, "tensor_type.attn_v: None is none of"),
        ({"tensor_type": {"": "q8_0"}}, "tensor_type: is an empty text"),
        ({"pure": "yes"}, "pure: expected boolean, found string 'yes'"),
        ({"output_tensor_typ": "q8_0"}, "unknown key 'output_tensor_typ'; did you mean 'output_tensor_type'?"),
    ],
)
def test_types_that_there_are_not(setting: dict[str, Any], said: str) -> None:
    (line,) = mistakes_in(setting, RULES)
    assert said in line


@pytest.mark.parametrize(
    ("chosen", "missing"),
    [
        ({}, "token_embedding_type and output_tensor_type"),
        ({"leave_output_tensor": True}, "token_embedding_type"),
        ({"token_embedding_type": "q8_0"}, "output_tensor_type"),
        ({"token_embedding_type": "q8_0", "output_tensor_type": "q8_0"}, None),
        ({"token_embedding_type": "q8_0", "leave_output_tensor": True}, None),
    ],
)
def test_pure_types_that_need_a_matrix_for_every_tensor(chosen: dict[str, Any], missing: str | None) -> None:
    said = missing and f"iq2_xs cannot hold tensors of which no importance matrix knows; set {missing}"
    assert pure_problem(types(pure=True, **chosen), "iq2_xs") == said
    assert pure_problem(types(**chosen), "iq2_xs") is None
    assert pure_problem(types(pure=True, **chosen), "q4_k_m") is None


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("attn_(q|k", "'attn_(q|k' is no valid regular expression: missing )"),
        ("attn=q", "'attn=q' holds a =, at which llama-quantize ends the pattern"),
        (r"blk\.\D", r"'blk\\.\\D' has capital letters, which llama-quantize reads as 'blk\\.\\d'"),
    ],
)
def test_patterns_that_cannot_be_followed(pattern: str, said: str) -> None:
    (line,) = pattern_problems(["attn_q", pattern, r"blk\.(0|1)\.ffn_.*"])
    assert line.startswith(said)


def test_patterns_are_looked_for_anywhere_in_a_name() -> None:
    refuse_unmatched(["attn_q", r"^output", r"blk\.[1-9]\.", "weight$"], names=NAMES, source="x.gguf")


def test_patterns_that_match_nothing_are_named() -> None:
    with pytest.raises(TensorTypeError) as refused:
        refuse_unmatched(["attn_q", "q_proj", r"blk\.7\."], names=NAMES, source="x.gguf")
    first, *listed = str(refused.value).splitlines()
    assert first.startswith(r"quantize.tensor_type: no tensor of x.gguf matches 'q_proj', 'blk\\.7\\.'; ")
    assert "attn_q" not in first
    assert [line.strip() for line in listed] == ["blk.0.attn_q.weight", "output.weight", "token_embd.weight"]
    assert not any(re.search("q_proj", name) for name in NAMES)
