"""Fold a LoRA adapter into its base checkpoint, tensor by tensor, into sharded safetensors."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

from lib import safetensors_file as safetensors
from lib.adapter_folder import CONFIG, WEIGHTS
from lib.checkpoint import INDEX, checkpoint_files, weight_files
from lib.cli import run_script, script_parser
from lib.console import progress, say
from lib.four_bit import read_four_bit
from lib.jsonfile import dump_json, read_json
from lib.lora import read_lora, read_targets
from lib.manifest import describe_file, identify_folder, write_folder_manifest
from lib.merge import MergeError, Overflows, in_order, merged_blocks
from lib.merge_plan import MergedTensor, hold_in_four_bits, plan_merge
from lib.options import add_settings
from lib.outputs import finished_folder

# Shards that are written at once.
MOST_WRITERS = 4
STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


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
    if device == "cuda" and not torch.cuda.is_available():
        raise MergeError("merge.device is cuda, but torch finds no GPU that it can use; set it to cpu")
    updates = read_lora(adapter) if adapter else {}
    config = read_json(base / "config.json")
    counted = {"is_target": read_targets(adapter)} if adapter else {}
    plan = plan_merge(safetensors.read_tensors(base), updates, config, where=adapter or base, **counted)
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
    inputs = [base, adapter] if adapter else [base]
    with finished_folder(output, inputs=inputs) as partial:
        shards = safetensors.plan_shards(plan.tensors, dtype=STORED[dtype], max_shard_bytes=max_shard_size * 10**6)
        files = _write_shards(partial, shards, dtype=dtype, device=device, threads=threads)
        files |= _copy_side_files(base, partial, config={**config, **plan.config}, dtype=dtype)
        manifest = write_folder_manifest(partial, artifact="merged", files=files, origin=origin)
    say(f"merged {len(updates)} updates into {len(plan.tensors)} tensors in {output}")
    return manifest


def _write_shards(
    folder: Path, shards: list[list[MergedTensor]], *, dtype: str, device: str, threads: int
) -> dict[str, dict[str, Any]]:
    """Several shards at once, since a digest is computed by one thread; each has its share of the others."""
    import torch

    stored, names = STORED[dtype], safetensors.shard_names(len(shards))
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


def _copy_side_files(base: Path, folder: Path, *, config: dict[str, Any], dtype: str) -> dict[str, dict[str, Any]]:
    """Copy tokenizer and licence byte for byte; in the config the dtype changes, and what the merge changed."""
    sides = set(checkpoint_files(base)) - set(weight_files(base)) - {INDEX}
    for name in sorted(sides):
        shutil.copyfile(base / name, folder / name)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config.update(dict.fromkeys(keys, dtype))
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {name: describe_file(folder / name) for name in sorted(sides)}


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
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="base checkpoint")
    parser.add_argument("--base-manifest", type=Path, metavar="FILE", help="its manifest, if not in that folder")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="adapter in peft's format; without it, the base as it is"
    )
    parser.add_argument("--adapter-manifest", type=Path, metavar="FILE", help="its manifest, if not in that folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the merged checkpoint")
    add_settings(parser, "merge")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
