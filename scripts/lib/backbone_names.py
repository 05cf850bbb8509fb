"""Names of a backbone's parts: those of the pinned transformers, whatever the installed one calls them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# DINOv2 in transformers before 5.20, and every ViT's published checkpoint.
OLDER = (
    (r"\battention\.attention\.query\b", "attention.q_proj"),
    (r"\battention\.attention\.key\b", "attention.k_proj"),
    (r"\battention\.attention\.value\b", "attention.v_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
)
# What users call the attention's layers, after the papers and older versions.
ALIASES = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def pinned_name(name: str) -> str:
    """A tensor's or module's name, as the pinned transformers has it."""
    for older, pinned in OLDER:
        name = re.sub(older, pinned, name)
    return name


def known_targets(targets: Sequence[str], modules: Iterable[str]) -> list[str]:
    """
    `target_modules` as the installed transformers calls them: query and q_proj mean the same layer.

    Args:
        targets: as configured.
        modules: names of the model's linear layers.
    """
    last = {name.rpartition(".")[2] for name in modules}
    reverse = {pinned: alias for alias, pinned in ALIASES.items()}
    found = []
    for target in targets:
        other = ALIASES.get(target) or reverse.get(target)
        found.append(other if target not in last and other in last else target)
    return found
