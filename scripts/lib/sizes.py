"""How large a model's file of a type is, and the keys and values of a context, from its shape alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib.quant_types import BITS_PER_WEIGHT

if TYPE_CHECKING:
    from lib.spec import Shape

GIB = 1 << 30
CUDA_BYTES = 0.6e9  # a CUDA context with its libraries, on each card
CONTEXT = 4096  # Ollama's own num_ctx


def file_bytes(shape: Shape, quant: str) -> float:
    """Size of the weights in a type, in bytes, by the usual mixture of types."""
    bits = BITS_PER_WEIGHT[quant]
    # Types with blocks of 256 weights: rows that do not fill them fall back, Q4_K to Q5_0, Q6_K to Q8_0, small
    # ones to IQ4_NL.
    if shape.hidden_size % 256 and ("k" in quant or quant.startswith(("iq", "tq"))) and quant != "iq4_nl":
        bits = min(8.5, max(5.5, 1.35 * bits))
    return shape.parameters * bits / 8


def cache_bytes(shape: Shape, tokens: int) -> int:
    """Keys and values of a context in 16 bits, as llama.cpp and Ollama keep them."""
    head = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    return 2 * 2 * tokens * shape.num_hidden_layers * shape.num_key_value_heads * head
