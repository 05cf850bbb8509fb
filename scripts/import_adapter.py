"""Take a LoRA adapter in peft's format that is there already, once it fits the base."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from lib.adapter_folder import CONFIG, WEIGHTS, write_config
from lib.adapter_search import AdapterError, adapter_problem
from lib.checkpoint import checkpoint_files
from lib.cli import run_script, script_parser
from lib.console import say
from lib.jsonfile import read_json
from lib.lora import read_lora, read_targets
from lib.manifest import ManifestError, describe_files, identify_folder, read_folder_manifest, write_folder_manifest
from lib.merge_plan import plan_merge
from lib.outputs import finished_folder
from lib.safetensors_file import read_tensors


def import_adapter(
    *, base: Path, base_manifest: Path | None, adapter: Path, output: Path, threads: int
) -> dict[str, Any]:
    """
    Check an adapter against the base by the headers of both, and copy it.

    The weights keep their bytes; the config is rewritten, so that the same adapter is the same bytes.

    Args:
        base: folder of the base checkpoint.
        base_manifest: its manifest, if not in that folder.
        adapter: folder of the adapter.
        output: folder of the copy; it appears only when complete.
        threads: for hashing.

    Returns:
        The copy's manifest.

    Raises:
        AdapterError: it is incomplete, or was written anew meanwhile.
        LoraError: it cannot be merged, or does not fit the base; everything that stands in the way is listed.
        CheckpointError, ManifestError: see lib.safetensors_file and lib.manifest.
    """
    if problem := adapter_problem(adapter):
        raise AdapterError(f"{adapter} is no complete adapter: {problem}")
    before = _state(adapter)
    updates = read_lora(adapter)
    config = read_json(base / "config.json")
    plan_merge(read_tensors(base), updates, config, where=adapter, is_target=read_targets(adapter))
    identity = identify_folder(base, base_manifest, artifact="base", names=checkpoint_files, threads=threads)
    base_name = (identity["origin"] or {}).get("name", base.resolve().name)
    with finished_folder(output, inputs=[base, adapter]) as partial:
        shutil.copyfile(adapter / WEIGHTS, partial / WEIGHTS)
        trained_on = _copy_config(adapter, partial, base_name=base_name)
        if _state(adapter) != before:
            raise AdapterError(f"{adapter} was written anew while it was copied; run this again once it is complete")
        files = describe_files(partial, [CONFIG, WEIGHTS], threads=threads)
        origin = {"kind": "path", "name": adapter.resolve().name, "base": identity}
        origin |= _known_training(adapter, weights=files[WEIGHTS])
        manifest = write_folder_manifest(partial, artifact="adapter", files=files, origin=origin)
    say(f"adapter {adapter}, trained on {trained_on}: its {len(updates)} pairs fit {base_name}")
    say(f"adapter copied to {output}")
    return manifest


def _state(adapter: Path) -> list[tuple[int, int]]:
    """What tells whether a file was written again."""
    facts = [(adapter / name).stat() for name in (CONFIG, WEIGHTS)]
    return [(each.st_size, each.st_mtime_ns) for each in facts]


def _copy_config(adapter: Path, folder: Path, *, base_name: str) -> str:
    """Write the canonical form of an adapter's config, and return what that says the adapter was trained on."""
    config = read_json(adapter / CONFIG)
    try:
        write_config(config, folder, base_name=base_name)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{adapter / CONFIG} is damaged: {error}") from error
    return str(config.get("base_model_name_or_path") or "an unnamed base")


def _known_training(adapter: Path, *, weights: dict[str, Any]) -> dict[str, Any]:
    """The data and how the base was held in training, where these very weights were trained by modelmill."""
    try:
        manifest = read_folder_manifest(adapter, artifact="adapter")
    except ManifestError:
        return {}
    if manifest["files"].get(WEIGHTS) != weights:
        return {}
    origin = manifest["origin"] or {}
    return {key: origin[key] for key in ("data", "four_bit") if origin.get(key)}


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="base checkpoint")
    parser.add_argument("--base-manifest", type=Path, metavar="FILE", help="its manifest, if not in that folder")
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="adapter in peft's format")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the copy")

    def work(arguments: argparse.Namespace) -> None:
        import_adapter(
            base=arguments.base,
            base_manifest=arguments.base_manifest,
            adapter=arguments.adapter,
            output=arguments.output,
            threads=arguments.threads,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
