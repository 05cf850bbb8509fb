"""llama.cpp's file types, as targets name them: lower case of what `llama-quantize` lists."""

from __future__ import annotations

# Bits per weight of a whole file, for estimates before it exists; llama-quantize's own list for an 8B.
BITS_PER_WEIGHT = {
    "f32": 32.0,
    "f16": 16.0,
    "bf16": 16.0,
    "q8_0": 8.5,
    "q6_k": 6.56,
    "q5_k_m": 5.70,
    "q5_k_s": 5.57,
    "q5_1": 6.0,
    "q5_0": 5.57,
    "q4_k_m": 4.89,
    "q4_k_s": 4.67,
    "q4_1": 5.13,
    "q4_0": 4.66,
    "q3_k_l": 4.30,
    "q3_k_m": 4.00,
    "q3_k_s": 3.64,
    "q2_k": 3.16,
    "q2_k_s": 2.96,
    "iq4_nl": 4.68,
    "iq4_xs": 4.46,
    "iq3_m": 3.76,
    "iq3_s": 3.66,
    "iq3_xs": 3.50,
    "iq3_xxs": 3.25,
    "iq2_m": 2.93,
    "iq2_s": 2.74,
    "iq2_xs": 2.59,
    "iq2_xxs": 2.38,
    "iq1_m": 2.16,
    "iq1_s": 2.01,
    "tq2_0": 2.06,
    "tq1_0": 1.69,
}
SOURCE_TYPES = ("f16", "bf16")  # written by the converter from a checkpoint, not by the quantizer
QUANTIZED_TYPES = tuple(name for name in BITS_PER_WEIGHT if name not in (*SOURCE_TYPES, "f32"))
# llama-quantize refuses these without an importance matrix, file types as well as types of tensors.
NEED_IMATRIX = frozenset({"iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "q2_k_s"})
# Of types of tensors too: ggml's functions for them leave a matrix unused.
IGNORE_IMATRIX = frozenset({"f32", "f16", "bf16", "q8_0", "tq2_0", "tq1_0"})
BUILDABLE_TYPES = tuple(name for name in QUANTIZED_TYPES if name not in NEED_IMATRIX)


def source_type(dtype: str) -> str:
    """The 16-bit GGUF type that quantized files are made from, by the type of the merge."""
    return {"float16": "f16", "bfloat16": "bf16", "float32": "f16"}[dtype]
