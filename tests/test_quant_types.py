"""llama.cpp's types, held against the gguf package's own tables."""

from __future__ import annotations

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from lib.quant_types import (
    BITS_PER_WEIGHT,
    BUILDABLE_TYPES,
    IGNORE_IMATRIX,
    NEED_IMATRIX,
    QUANTIZED_TYPES,
    SOURCE_TYPES,
)


def pure_type(name: str) -> GGMLQuantizationType:
    """The tensor type that a file type is named after: q4_k for q4_k_m, iq3_xxs for iq3_xs."""
    named = {"iq3_xs": "IQ3_XXS", "iq3_m": "IQ3_S", "iq2_m": "IQ2_S"}
    short = name[:-2] if name[-4:] in ("_k_s", "_k_m", "_k_l") else name
    return GGMLQuantizationType[named.get(name, short.upper())]


@pytest.mark.parametrize("name", BITS_PER_WEIGHT)
def test_every_type_is_one_of_llama_cpp(name: str) -> None:
    member = "ALL_F32" if name == "f32" else f"MOSTLY_{name.upper()}"
    assert member in LlamaFileType.__members__


def test_no_type_of_llama_cpp_is_forgotten() -> None:
    """Left out on purpose: types for weights that were trained in them, which a merge does not have."""
    special = {"mxfp4_moe", "nvfp4", "q1_0"}
    listed = {member.removeprefix("MOSTLY_").lower() for member in LlamaFileType.__members__}
    assert listed - {"all_f32", "guessed"} - special == BITS_PER_WEIGHT.keys() - {"f32"}


@pytest.mark.parametrize("name", BITS_PER_WEIGHT)
def test_a_file_takes_what_its_tensors_take_or_somewhat_more(name: str) -> None:
    """The embedding and the output head are kept finer, so that a whole file is larger than its type alone."""
    values, size = GGML_QUANT_SIZES[pure_type(name)]
    bits = 8 * size / values
    assert 0.998 * bits <= BITS_PER_WEIGHT[name] <= 1.35 * bits


def test_the_groups() -> None:
    assert {*SOURCE_TYPES, *QUANTIZED_TYPES, "f32"} == BITS_PER_WEIGHT.keys()
    assert set(BUILDABLE_TYPES) == set(QUANTIZED_TYPES) - NEED_IMATRIX
    assert set(QUANTIZED_TYPES) > NEED_IMATRIX
    assert "q4_k_m" in BUILDABLE_TYPES
    assert not IGNORE_IMATRIX & NEED_IMATRIX and BITS_PER_WEIGHT.keys() > IGNORE_IMATRIX
