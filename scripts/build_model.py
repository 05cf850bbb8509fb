"""Take one adapter that is there already to a Modelfile, and if asked to Ollama, without editing config.yaml."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from summarize_build import summarize_build

from lib.adapter_request import LATEST, REQUESTS, choose_adapter, choose_name, request_model, requested_models
from lib.cli import UsageError, run_script, script_parser
from lib.config_file import read_config, read_project
from lib.console import say
from lib.decisions import merge_decisions
from lib.errors import ModelmillError
from lib.outputs import finished_file
from lib.quantize_path import QuantizePaths
from lib.set_option import parse_settings
from lib.targets import final_files

SNAKEFILE = Path(__file__).resolve().parents[1] / "Snakefile"
CONFIG = Path("config.yaml")  # which the Snakefile reads by itself


class BuildError(ModelmillError):
    """The workflow did not build the model."""


def build_model(
    *,
    adapter: Path,
    name: str,
    section: Mapping[str, Any],
    configs: Sequence[Path],
    register: bool,
    dry_run: bool,
    options: Sequence[str],
) -> None:
    """
    Have Snakemake build a model that no config names.

    Args:
        adapter: its adapter, as the user says it.
        name: of the model.
        section: its entry of `models`.
        configs: what is configured beside it.
        register: register it with Ollama as well.
        dry_run: show what would be done.
        options: handed on to Snakemake.

    Raises:
        ConfigError: listing every mistake of the section and the configs.
        BuildError: Snakemake ended with an error.
    """
    request = REQUESTS / f"{name}.yaml"
    project = read_project(configs, {"models": {name: section}})
    targets = final_files(replace(project, models={name: project.models[name]}, heatmaps={}))
    targets += [f"ollama/{name}.json"] if register else []
    _write_request(request, name, section)
    given = [*(path for path in configs if path != CONFIG), request]
    command = [sys.executable, "-m", "snakemake", "-s", os.path.relpath(SNAKEFILE), "--configfile", *map(str, given)]
    command += ["-j1", *(["--dry-run"] if dry_run else []), *options, "--", *targets]
    say(f"adapter   {adapter}")
    say(f"base      {_describe_base(section['base'])}")
    say(f"builds    {', '.join(targets)}")
    say(f"by        {shlex.join(['snakemake', *command[3:]])}")
    say(merge_decisions(project, QuantizePaths(project, targets))[name])
    _run(command)
    if not dry_run and Path(f"models/{name}.Modelfile").is_file():
        print(summarize_build(model=name, folder=Path()))


def _describe_base(base: Mapping[str, Any]) -> str:
    where = next(str(base[key]) for key in ("hub", "path", "gguf", "pypi") if base.get(key))
    return f"{where} at {base['revision']}" if base.get("revision") else where


def _write_request(path: Path, name: str, section: Mapping[str, Any]) -> None:
    """Write the model as a config of its own, with which any of its targets can be asked for later."""
    text = yaml.safe_dump({"models": {name: dict(section)}}, allow_unicode=True, sort_keys=False)
    with finished_file(path) as partial:
        partial.write_text(f"# Written by scripts/build_model.py, beside config.yaml.\n{text}", encoding="utf-8")


def _run(command: Sequence[str]) -> None:
    """
    Run Snakemake on this terminal, and wait for its end also when interrupted, since it has jobs to end.

    Raises:
        BuildError: it failed.
        KeyboardInterrupt: it was interrupted.
    """
    stopped = []
    process = subprocess.Popen(command)

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        if number == signal.SIGTERM:  # a terminal sends Ctrl-C to all of its programs itself
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    status = process.wait()
    if stopped:
        raise KeyboardInterrupt
    if status:
        raise BuildError(f"snakemake ended with status {status}")


def refuse_loss(name: str, adapter: Path, *, chosen: bool) -> None:
    """
    Args:
        chosen: the user said this name.

    Raises:
        UsageError: there is something of that name already that was not made from this adapter.
    """
    if not Path("adapters", name).exists():
        return
    before = requested_models().get(name)
    if before is None:
        raise UsageError(f"adapters/{name} is there already and not from this script; say another --name")
    if not chosen and Path(before["adapter"]["path"]).resolve() != adapter.resolve():
        raise UsageError(
            f"{name} was built from {before['adapter']['path']}; --name {name} builds it anew, another name beside it"
        )


def _work(arguments: argparse.Namespace) -> None:
    settings = parse_settings(arguments.set, section="model")
    if "adapter" in settings:
        raise UsageError("--set adapter: the adapter is what --adapter says, and nothing is trained")
    if settings.get("kind") == "heatmap":
        raise UsageError("--set kind: Modelfiles are made of language models; heatmap models stand in config.yaml")
    configs = [*(path for path in [CONFIG] if path.is_file()), *arguments.config]
    adapter = choose_adapter(arguments.adapter, latest_in=arguments.latest_in)
    name = choose_name(arguments.name, adapter=adapter)
    refuse_loss(name, adapter, chosen=arguments.name is not None)
    section = request_model(
        adapter=adapter,
        base=arguments.base,
        name=name,
        like=arguments.like,
        shape=arguments.shape,
        settings=settings,
        config=read_config(configs),
    )
    build_model(
        adapter=adapter,
        name=name,
        section=section,
        configs=configs,
        register=arguments.ollama,
        dry_run=arguments.dry_run,
        options=arguments.snakemake,
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument("--adapter", required=True, metavar="DIR", help=f"folder of the adapter, or {LATEST!r}")
    parser.add_argument(
        "--latest-in", type=Path, default=Path("outputs"), metavar="DIR", help=f"where {LATEST!r} looks"
    )
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="folder, .gguf file or owner/name[@revision] on the Hub; left out, what the adapter was trained on",
    )
    parser.add_argument("--shape", type=Path, metavar="FILE", help="config.json of a base that is not here yet")
    parser.add_argument("--name", help="of the model; left out, that of the adapter's folder")
    parser.add_argument("--like", metavar="MODEL", help="model of config.yaml whose settings, and base, are taken")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as in quantize.types=[q8_0]"
    )
    parser.add_argument("--ollama", action="store_true", help="register it with the server that OLLAMA_HOST names")
    parser.add_argument("-n", "--dry-run", action="store_true", help="show what would be done")
    parser.add_argument("--config", type=Path, nargs="+", default=[], metavar="FILE", help="put over config.yaml")
    parser.add_argument("snakemake", nargs="*", metavar="-- OPTION", help="handed on to snakemake")
    run_script(parser, _work)


if __name__ == "__main__":
    main()
