"""Fold a LoRA adapter into its base checkpoint, tensor by tensor, into sharded safetensors."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

from lib import safetensors_file as safetensors
from lib.checkpoint import INDEX, copy_side_files
from lib.cli import run_script, script_parser
from lib.console import progress, say
from lib.in_order import in_order
from lib.jsonfile import dump_json
from lib.manifest import describe_file, write_folder_manifest
from lib.merge import Overflows, demand_device, merged_blocks
from lib.merge_inputs import add_merge_inputs, read_merge
from lib.merge_plan import MergedTensor
from lib.options import add_settings
from lib.outputs import finished_folder

# Shards that are written at once.
MOST_WRITERS = 4


def merge_adapter(
    *,
    base: Path,
    base_manifest: Path | None,
    adapter: Path | None,
    adapter_manifest: Path | None,
    dtype: str,
    base_weights: str = "original",
    device: str = "cpu",
    max_shard_size: int,
    output: Path,
    threads: int,
) -> dict[str, Any]:
    """
    Write the merged checkpoint; without an adapter, the base in `dtype`.

    Args:
        base, adapter: folders of a checkpoint and of a LoRA in peft's format.
        base_manifest, adapter_manifest: their manifests, where these are not in the folders themselves.
        dtype: float16, bfloat16 or float32.
        base_weights: what is merged into: original, or nf4, what the base was in a 4-bit training.
        device: cpu or cuda; the result does not depend on it.
        max_shard_size: in MB (10^6 bytes).
        output: folder of the result; it appears only when complete.
        threads: of the arithmetic; the result does not depend on it.

    Returns:
        The manifest of the result.

    Raises:
        CheckpointError, LoraError, FourBitError, MergeError: see lib.checkpoint, lib.lora, lib.four_bit, lib.merge.
    """
    import torch

    torch.set_num_threads(1)  # the threads are over blocks of rows
    demand_device(device)
    merge = read_merge(
        base=base,
        base_manifest=base_manifest,
        adapter=adapter,
        adapter_manifest=adapter_manifest,
        dtype=dtype,
        base_weights=base_weights,
        threads=threads,
    )
    inputs = [base, adapter] if adapter else [base]
    most = max_shard_size * 10**6
    with finished_folder(output, inputs=inputs) as partial:
        shards = safetensors.plan_shards(merge.tensors, dtype=safetensors.STORED[dtype], max_shard_bytes=most)
        files = _write_shards(partial, shards, dtype=dtype, device=device, threads=threads)
        sides = copy_side_files(base, partial, config=merge.config, dtype=dtype)
        files |= {name: describe_file(partial / name) for name in sides}
        manifest = write_folder_manifest(partial, artifact="merged", files=files, origin=merge.origin)
    say(f"merged {merge.updates} updates into {len(merge.tensors)} tensors in {output}")
    return manifest


def _write_shards(
    folder: Path, shards: list[list[MergedTensor]], *, dtype: str, device: str, threads: int
) -> dict[str, dict[str, Any]]:
    """Several shards at once, since a digest is computed by one thread; each has its share of the others."""
    import torch

    stored, names = safetensors.STORED[dtype], safetensors.shard_names(len(shards))
    writers = max(1, min(MOST_WRITERS, threads // 2, len(shards)))
    total = sum(tensor.values for shard in shards for tensor in shard) * safetensors.BYTES_PER_VALUE[stored]
    overflows, stopped = Overflows(dtype), Event()
    with progress("merging", total=total, unit="B") as bar:

        def blocks(shard: list[MergedTensor]) -> Iterator[torch.Tensor]:
            for block in merged_blocks(
                shard, dtype=getattr(torch, dtype), overflows=overflows, threads=threads // writers, device=device
            ):
                if stopped.is_set():
                    raise InterruptedError("nobody waits for this shard any more")
                yield block
                bar.advance(block.numel() * block.element_size())

        def write(job: tuple[str, list[MergedTensor]]) -> dict[str, Any]:
            name, shard = job
            return safetensors.write_shard(folder / name, shard, dtype=stored, blocks=blocks(shard))

        written = in_order(zip(names, shards, strict=True), write, threads=writers, stopped=stopped)
        files = dict(zip(names, written, strict=True))
    overflows.check()
    if len(shards) > 1:
        (folder / INDEX).write_text(dump_json(safetensors.index_of(shards, dtype=stored)))
        files[INDEX] = describe_file(folder / INDEX)
    return files


def _work(arguments: argparse.Namespace) -> None:
    merge_adapter(
        base=arguments.base,
        base_manifest=arguments.base_manifest,
        adapter=arguments.adapter,
        adapter_manifest=arguments.adapter_manifest,
        dtype=arguments.dtype,
        base_weights=arguments.base_weights,
        device=arguments.device,
        max_shard_size=arguments.max_shard_size,
        output=arguments.output,
        threads=arguments.threads,
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    add_merge_inputs(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the merged checkpoint")
    add_settings(parser, "merge")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
