"""What a merge is made from: the base's tensors with the adapter's updates, and where both come from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.adapter_folder import CONFIG, WEIGHTS
from lib.checkpoint import checkpoint_files
from lib.console import say
from lib.four_bit import import_bitsandbytes, read_four_bit
from lib.jsonfile import read_json
from lib.lora import read_lora, read_targets
from lib.manifest import identify_folder
from lib.merge_plan import MergedTensor, hold_in_four_bits, plan_merge
from lib.provenance import BASE_WEIGHTS
from lib.safetensors_file import read_tensors


@dataclass(frozen=True)
class MergeInputs:
    """
    Attributes:
        tensors: of the merged checkpoint, in order.
        updates: how many of the adapter's there are.
        config: config.json of the merged checkpoint, but for its dtype.
        origin: of the merged checkpoint, for its manifest.
    """

    tensors: Sequence[MergedTensor]
    updates: int
    config: dict[str, Any]
    origin: dict[str, Any]


def add_merge_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that name base and adapter."""
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="base checkpoint")
    parser.add_argument("--base-manifest", type=Path, metavar="FILE", help="its manifest, if not in that folder")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="adapter in peft's format; without it, the base as it is"
    )
    parser.add_argument("--adapter-manifest", type=Path, metavar="FILE", help="its manifest, if not in that folder")


def read_merge(
    *,
    base: Path,
    base_manifest: Path | None,
    adapter: Path | None,
    adapter_manifest: Path | None,
    dtype: str,
    base_weights: str,
    threads: int,
) -> MergeInputs:
    """
    Hold an adapter against its base, and identify both.

    Args:
        base, adapter: folders of a checkpoint and of a LoRA in peft's format; without one, the base as it is.
        base_manifest, adapter_manifest: their manifests, where these are not in the folders themselves.
        dtype: float16, bfloat16 or float32, of the merged checkpoint.
        base_weights: what is merged into: original, or nf4, what the base was in a 4-bit training.
        threads: that hash, where there is no manifest.

    Raises:
        CheckpointError, LoraError, FourBitError, ManifestError: see lib.checkpoint, lib.lora, lib.four_bit,
            lib.manifest.
    """
    updates = read_lora(adapter) if adapter else {}
    config = read_json(base / "config.json")
    counted = {"is_target": read_targets(adapter)} if adapter else {}
    plan = plan_merge(read_tensors(base), updates, config, where=adapter or base, **counted)
    origin: dict[str, Any] = {
        "base": identify_folder(base, base_manifest, artifact="base", names=checkpoint_files, threads=threads),
        "adapter": identify_folder(
            adapter, adapter_manifest, artifact="adapter", names=lambda _: [CONFIG, WEIGHTS], threads=threads
        )
        if adapter
        else None,
        "merge": {"base_weights": base_weights, "dtype": dtype},
    }
    if base_weights == "nf4":
        plan = hold_in_four_bits(plan, read_four_bit(origin["adapter"]), where=base)
        import_bitsandbytes()
    if adapter:
        say(f"merging {len(updates)} updates onto {BASE_WEIGHTS[base_weights]}, by blocks of rows")
    return MergeInputs(plan.tensors, len(updates), {**config, **plan.config}, origin)
