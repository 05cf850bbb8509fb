"""Fold what was learned into the backbone: a heatmap model that loads without peft and bitsandbytes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.adapter_folder import WEIGHTS as ADAPTER_WEIGHTS
from lib.cli import run_script, script_parser
from lib.console import say
from lib.errors import ModelmillError
from lib.lora import Update, read_lora
from lib.manifest import describe_file, read_folder_manifest, write_folder_manifest
from lib.merge import Overflows, merged_blocks
from lib.merge_plan import MergedTensor, plan_merge
from lib.options import add_setting
from lib.outputs import finished_folder, scratch_beside
from lib.safetensors_file import STORED, StoredTensor, read_header, write_shard

BACKBONE = "backbone."


class HeatmapMergeError(ModelmillError):
    """A backbone and what was learned do not belong together."""


def merge_heatmap(
    *, base: Path, base_manifest: Path | None, adapter: Path, dtype: str, output: Path, threads: int
) -> dict[str, Any]:
    """
    Write the merged model.

    The update of each weight is that of lib.merge: the same bytes for the same inputs, on any machine.

    Args:
        base: folder of the backbone's checkpoint.
        base_manifest: its manifest, if not in that folder.
        adapter: what train_heatmap.py wrote.
        dtype: float32, float16 or bfloat16.
        output: folder of the result; it appears only when complete.

    Returns:
        The manifest of the result.

    Raises:
        ManifestError, HeatmapError, LoraError, MergeError: an input is damaged, or they do not fit each other.
    """
    import torch

    from lib.heatmap_folder import CONFIG, MERGED, TRAINED, read_heatmap_config, write_heatmap_config

    torch.set_num_threads(1)  # the threads are over blocks of rows
    learned = read_folder_manifest(adapter, artifact="adapter")
    held = read_folder_manifest(base, artifact="base", manifest=base_manifest)
    if learned["origin"]["base"]["digest"] != held["digest"]:
        raise HeatmapMergeError(f"{adapter} was trained on another backbone than {base}; train it again")
    config = read_heatmap_config(adapter)
    origin = {
        "base": {"digest": held["digest"], "origin": held["origin"]},
        "adapter": {"digest": learned["digest"], "origin": learned["origin"]},
        "merge": {"base_weights": "original", "dtype": dtype},
    }
    with scratch_beside(output) as scratch, finished_folder(output, inputs=[base, adapter]) as partial:
        tensors = _tensors(base, adapter, trained=adapter / TRAINED, scratch=scratch)
        overflows = Overflows(dtype)
        blocks: Iterator[torch.Tensor] = merged_blocks(
            tensors, dtype=getattr(torch, dtype), overflows=overflows, threads=threads
        )
        files = {MERGED: write_shard(partial / MERGED, tensors, dtype=STORED[dtype], blocks=blocks)}
        overflows.check()
        write_heatmap_config(partial, config)
        files[CONFIG] = describe_file(partial / CONFIG)
        manifest = write_folder_manifest(partial, artifact="merged", files=files, origin=origin)
    say(f"merged {sum(each.update != Update() for each in tensors)} updates into {len(tensors)} tensors in {output}")
    return manifest


def _tensors(base: Path, adapter: Path, *, trained: Path, scratch: Path) -> list[MergedTensor]:
    """All tensors of the result, each with what it is made of."""
    whole = [MergedTensor(each.name, each.shape, each, Update()) for each in read_header(trained)]
    if any(each.name.startswith(BACKBONE) for each in whole):
        return whole
    loaded = _load_backbone(base, scratch / "backbone.safetensors")
    updates = read_lora(adapter) if (adapter / ADAPTER_WEIGHTS).is_file() else {}
    # The head of a language model is what the config would be asked for.
    plan = plan_merge(loaded, updates, {"tie_word_embeddings": False}, where=adapter)
    return sorted(
        [*whole, *(replace(each, name=BACKBONE + each.name) for each in plan.tensors)], key=lambda each: each.name
    )


def _load_backbone(base: Path, scratch: Path) -> dict[str, StoredTensor]:
    """The backbone's weights under the names that transformers gives them in memory: published files have others."""
    from transformers import AutoModel

    from lib.backbone_names import pinned_name
    from lib.heatmap_folder import save_weights
    from lib.heatmap_model import without_pooler
    from lib.loading import explain_loading

    with explain_loading("weights", base):
        backbone = AutoModel.from_pretrained(base, dtype="auto", local_files_only=True, trust_remote_code=False)
    without_pooler(backbone)
    save_weights({pinned_name(name): tensor for name, tensor in backbone.state_dict().items()}, scratch)
    return {tensor.name: tensor for tensor in read_header(scratch)}


def _work(arguments: argparse.Namespace) -> None:
    merge_heatmap(
        base=arguments.base,
        base_manifest=arguments.base_manifest,
        adapter=arguments.adapter,
        dtype=arguments.dtype,
        output=arguments.output,
        threads=arguments.threads,
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the backbone's checkpoint")
    parser.add_argument("--base-manifest", type=Path, metavar="FILE", help="its manifest, if not in that folder")
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="what train_heatmap.py wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the merged model")
    add_setting(parser, "merge_heatmap", "dtype")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
