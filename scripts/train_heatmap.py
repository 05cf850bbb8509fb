"""Train a heatmap model on clips: decoder and head, and its backbone or a LoRA adapter of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lib.adapter_folder import CONFIG as ADAPTER_CONFIG
from lib.adapter_folder import WEIGHTS as ADAPTER_WEIGHTS
from lib.adapter_folder import write_adapter
from lib.backbone_names import pinned_name
from lib.checkpoint import checkpoint_files
from lib.checkpoints import forget_run, run_folder
from lib.cli import UsageError, planned_cards, run_script, script_parser, usable_cores
from lib.clips import identify_clips, read_clips
from lib.code import code_digest
from lib.console import say
from lib.heatmap_settings import ClipUse, Heatmap, TrainHeatmap
from lib.jsonfile import read_json, write_json
from lib.locks import only_writer
from lib.manifest import describe_files, identify_folder, write_folder_manifest
from lib.options import add_settings, settings_from
from lib.outputs import finished_folder
from lib.train_method import MethodError, resolve_heatmap_method
from lib.training_run import Places, add_run_options, checkpoints_of, fix_threads
from lib.typed import build, plain

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "pillow")


def train_heatmap(
    *,
    base: Path,
    base_manifest: Path | None,
    clips: Path,
    clips_identity: dict[str, Any] | None,
    heatmap: Heatmap,
    use: ClipUse,
    train: TrainHeatmap,
    gpus: Sequence[float],
    checkpoints: Path,
    tensorboard: Path | None,
    history: Path | None,
    output: Path,
) -> dict[str, Any]:
    """
    Train as the settings say, and write what was learned with its manifest.

    Args:
        base: folder of the backbone's checkpoint.
        base_manifest: its manifest, if not in that folder.
        clips: folder of games in TrackNet's layout.
        clips_identity: of `identify_clips`; left out, every frame is read for it.
        gpus: memory of each planned GPU in GiB.
        checkpoints: folder of checkpoints; those of this very run are gone on from, and removed at the end.
        tensorboard: folder of event files.
        history: JSON file of the run's figures.
        output: folder of what was learned; it appears only when complete.

    Returns:
        The manifest of the output.

    Raises:
        ClipError, TrainingError and others: see lib.heatmap_training.
    """
    fix_threads(train.threads)
    from lib.heatmap_build import trained_weights
    from lib.heatmap_folder import CONFIG, TRAINED, save_weights, write_heatmap_config
    from lib.heatmap_training import train_heatmap_model

    found = read_clips(clips)
    origin = {
        "base": identify_folder(base, base_manifest, artifact="base", names=checkpoint_files, threads=usable_cores()),
        "clips": clips_identity or identify_clips(clips, found, threads=usable_cores()),
        "settings": {**plain(heatmap), **plain(use), **plain(train)},
        "versions": {name: version(name).partition("+")[0] for name in PACKAGES},
    }
    # Neither changes a byte of what is learned.
    origin["settings"]["offload"].pop("offload_folder")
    origin["settings"].pop("dataloader_num_workers")
    run = run_folder(checkpoints, {**origin, "code": code_digest("train_heatmap.py")})
    with finished_folder(output, inputs=[base, clips]) as partial, only_writer(run):
        places = Places(base=base, run=run, tensorboard=tensorboard)
        trained = train_heatmap_model(places=places, clips=found, heatmap=heatmap, use=use, train=train, gpus=gpus)
        write_heatmap_config(partial, trained.built.config)
        save_weights(trained_weights(trained.built), partial / TRAINED)
        names = [CONFIG, TRAINED]
        if trained.built.adapter is not None:
            base_name = (origin["base"]["origin"] or {}).get("name", base.name)
            write_adapter(trained.built.adapter, partial, base_name=base_name, rename=pinned_name)
            names += [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
        files = describe_files(partial, names, threads=usable_cores())
        manifest = write_folder_manifest(partial, artifact="adapter", files=files, origin=origin)
    if history:
        write_json(history, {**trained.history, "adapter_digest": manifest["digest"]})
    forget_run(run)
    say(f"trained weights written to {output}")
    return manifest


def _work(arguments: argparse.Namespace) -> None:
    gpus = planned_cards(arguments.gpus)
    train = settings_from(arguments, "train_heatmap")
    try:
        resolve_heatmap_method(train, gpus=gpus)
    except MethodError as error:
        raise UsageError(str(error)) from error
    train_heatmap(
        base=arguments.base,
        base_manifest=arguments.base_manifest,
        clips=arguments.clips,
        clips_identity=read_json(arguments.clips_identity) if arguments.clips_identity else None,
        heatmap=build(Heatmap, settings_from(arguments, "heatmap")),
        use=build(ClipUse, settings_from(arguments, "clips")),
        train=build(TrainHeatmap, train),
        gpus=gpus,
        checkpoints=checkpoints_of(arguments),
        tensorboard=arguments.tensorboard,
        history=arguments.history,
        output=arguments.output,
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the backbone's checkpoint")
    parser.add_argument("--base-manifest", type=Path, metavar="FILE", help="its manifest, if not in that folder")
    parser.add_argument("--clips", type=Path, required=True, metavar="DIR", help="games in TrackNet's layout")
    parser.add_argument("--clips-identity", type=Path, metavar="FILE", help="what check_clips.py wrote of them")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of what is learned")
    add_run_options(parser)
    for section in ("heatmap", "train_heatmap"):
        add_settings(parser, section)
    add_settings(parser, "clips", without=("path", "synthetic"))
    run_script(parser, _work)


if __name__ == "__main__":
    main()
