"""Train a LoRA adapter on conversations, and write it in peft's format."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lib.adapter_folder import CONFIG, WEIGHTS, write_adapter
from lib.base_model import count_weights
from lib.checkpoint import checkpoint_files
from lib.checkpoints import forget_run, run_folder
from lib.cli import UsageError, planned_cards, run_script, script_parser, usable_cores
from lib.code import code_digest
from lib.console import say
from lib.jsonfile import write_json
from lib.locks import only_writer
from lib.manifest import describe_file, describe_files, identify_folder, write_folder_manifest
from lib.options import add_settings, settings_from
from lib.outputs import finished_folder
from lib.train_method import MethodError, resolve_method
from lib.train_settings import Train
from lib.training import train_lora
from lib.training_run import Places, add_run_options, checkpoints_of, fix_threads
from lib.typed import build, plain

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
# Files that settings name: what they hold counts, not where they lie.
FILES = ("data", "eval_data")


def train_adapter(
    *,
    base: Path,
    base_manifest: Path | None,
    settings: Train,
    gpus: Sequence[float],
    checkpoints: Path,
    tensorboard: Path | None,
    history: Path | None,
    output: Path,
) -> dict[str, Any]:
    """
    Train as `settings` say and write the adapter with its manifest.

    Args:
        base: folder of the base checkpoint.
        base_manifest: its manifest, if not in that folder.
        settings: of the run, resolved; `data` names the file of training data.
        gpus: memory of each planned GPU in GiB.
        checkpoints: folder of checkpoints; those of this very run are gone on from, and removed at the end.
        tensorboard: folder of event files.
        history: JSON file of the run's figures.
        output: folder of the adapter; it appears only when complete.

    Returns:
        The adapter's manifest.

    Raises:
        DataError, TrainingError and others: see lib.training.
    """
    fix_threads(settings.threads)
    files = [Path(path) for path in (getattr(settings, name) for name in FILES) if path]
    origin = _origin(base, base_manifest, settings)
    run = run_folder(checkpoints, {**origin, "code": code_digest("train_adapter.py")})
    with finished_folder(output, inputs=[base, *files]) as partial, only_writer(run):
        places = Places(base=base, run=run, tensorboard=tensorboard)
        trained = train_lora(places=places, settings=settings, gpus=gpus)
        write_adapter(trained.model, partial, base_name=(origin["base"]["origin"] or {}).get("name", base.name))
        written = describe_files(partial, [CONFIG, WEIGHTS], threads=usable_cores())
        origin |= {"four_bit": trained.four_bit} if trained.four_bit else {}
        manifest = write_folder_manifest(partial, artifact="adapter", files=written, origin=origin)
    if history:
        write_json(history, {**trained.history, "adapter_digest": manifest["digest"]})
    forget_run(run)
    say(f"adapter written to {output}")
    return manifest


def _origin(base: Path, base_manifest: Path | None, settings: Train) -> dict[str, Any]:
    """What decides about the adapter, without any path."""
    origin = {
        "base": identify_folder(base, base_manifest, artifact="base", names=checkpoint_files, threads=usable_cores()),
        "settings": {key: value for key, value in plain(settings).items() if key not in FILES},
        "versions": {name: version(name).partition("+")[0] for name in PACKAGES},
    }
    origin["settings"]["offload"].pop("offload_folder")
    for name in FILES:
        if path := getattr(settings, name):
            origin[name] = {"name": Path(path).name, **describe_file(Path(path))}
    return origin


def _work(arguments: argparse.Namespace) -> None:
    settings, gpus = settings_from(arguments, "train"), planned_cards(arguments.gpus)
    try:
        resolve_method(settings, parameters=count_weights(arguments.base), gpus=gpus)
    except MethodError as error:
        raise UsageError(str(error)) from error
    if arguments.method_reason:
        settings["method_reason"] = arguments.method_reason
    say(f"method {settings['method']}, {settings['precision']}: {settings['method_reason']}")
    train_adapter(
        base=arguments.base,
        base_manifest=arguments.base_manifest,
        settings=build(Train, settings),
        gpus=gpus,
        checkpoints=checkpoints_of(arguments),
        tensorboard=arguments.tensorboard,
        history=arguments.history,
        output=arguments.output,
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="base checkpoint")
    parser.add_argument("--base-manifest", type=Path, metavar="FILE", help="its manifest, if not in that folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the adapter")
    parser.add_argument("--method-reason", metavar="TEXT", help="why this method, for the log and the manifest")
    add_run_options(parser)
    add_settings(parser, "train")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
