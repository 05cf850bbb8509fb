"""Train a LoRA adapter on conversations, and write it in peft's format."""

from __future__ import annotations

import argparse
import dataclasses
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lib.adapter_folder import CONFIG, WEIGHTS, write_adapter
from lib.checkpoint import checkpoint_files
from lib.cli import run_script, script_parser, usable_cores
from lib.console import say
from lib.manifest import describe_file, describe_files, identify_folder, write_folder_manifest
from lib.options import add_settings, settings_from
from lib.outputs import finished_folder
from lib.train_settings import Train
from lib.training import fix_threads, train_lora
from lib.typed import build

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def train_adapter(*, base: Path, base_manifest: Path | None, settings: Train, output: Path) -> dict[str, Any]:
    """
    Train as `settings` say and write the adapter with its manifest.

    Args:
        base: folder of the base checkpoint.
        base_manifest: its manifest, if not in that folder.
        settings: of the run; `data` names the file of conversations.
        output: folder of the adapter; it appears only when complete.

    Returns:
        The adapter's manifest.

    Raises:
        DataError, TrainingError: see lib.dataset and lib.training.
    """
    fix_threads(settings.threads)
    data = Path(settings.data)
    origin = {
        "base": identify_folder(base, base_manifest, artifact="base", names=checkpoint_files, threads=usable_cores()),
        "data": {"name": data.name, **describe_file(data)},
        "settings": {key: value for key, value in dataclasses.asdict(settings).items() if key != "data"},
        "versions": {name: version(name).partition("+")[0] for name in PACKAGES},
    }
    with finished_folder(output, inputs=[base, data]) as partial, TemporaryDirectory() as scratch:
        model = train_lora(base=base, data=data, settings=settings, scratch=Path(scratch))
        write_adapter(model, partial, base_name=(origin["base"]["origin"] or {}).get("name", base.name))
        files = describe_files(partial, [CONFIG, WEIGHTS], threads=usable_cores())
        manifest = write_folder_manifest(partial, artifact="adapter", files=files, origin=origin)
    say(f"adapter written to {output}")
    return manifest


def _work(arguments: argparse.Namespace) -> None:
    settings = settings_from(arguments, "train")
    if settings["device"] == "auto":
        settings["device"] = "cuda" if arguments.gpus else "cpu"
    train_adapter(
        base=arguments.base,
        base_manifest=arguments.base_manifest,
        settings=build(Train, settings),
        output=arguments.output,
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="base checkpoint")
    parser.add_argument("--base-manifest", type=Path, metavar="FILE", help="its manifest, if not in that folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the adapter")
    parser.add_argument("--gpus", default="", metavar="GIB,GIB", help="memory of each planned GPU, for --device auto")
    add_settings(parser, "train")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
