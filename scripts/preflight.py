"""Tell whether the models of config.yaml can be built on this machine, step by step, before anything starts."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lib.cli import FAILED, UsageError, run_script, script_parser
from lib.config import suggest
from lib.config_file import read_project
from lib.jsonfile import write_json
from lib.machine import Machine, model_store, this_machine
from lib.options import json_mapping
from lib.preflight import Preflight, Row, planned_machine, preflight
from lib.software import Software, this_software
from lib.toolchain import cache_folder

RED, GREEN, PLAIN = "\033[31m", "\033[32m", "\033[0m"


def describe_machine(machine: Machine) -> Iterator[str]:
    """What there is, line by line."""
    cards = [
        f"{card.name}, {(card.memory - card.used) / 1e9:.1f} of {card.memory / 1e9:.1f} GB free"
        for card in machine.cards
    ]
    yield f"  GPU       {cards[0] if cards else 'none'}"
    yield from (f"            {card}" for card in cards[1:])
    yield f"  RAM       {machine.available / 1e9:.1f} of {machine.ram / 1e9:.1f} GB available"
    yield f"  swap      {machine.swap / 1e9:.1f} GB"
    yield from (f"  disk      {free / 1e9:.1f} GB free in {place}" for place, free in machine.disk.items())
    if machine.cores is not None:
        yield f"  cores     {machine.cores}"


def describe_software(software: Software) -> Iterator[str]:
    """What is installed, in lines of at most 80 columns."""
    findings = {
        "compiler": software.compiler,
        "llama.cpp": software.llama_cpp,
        "4-bit": software.bitsandbytes,
        "packages": software.packages,
    }
    findings["4-bit"] = replace(findings["4-bit"], text=f"bitsandbytes {software.bitsandbytes.text}")
    for name, finding in findings.items():
        yield from textwrap.wrap(f"{name:<9} {finding.text}", 80, initial_indent="  ", subsequent_indent=" " * 12)


def describe(found: Preflight, *, colour: bool) -> Iterator[str]:
    """A model's plan, in lines of at most 80 columns."""
    yield f"{found.model}: weights in memory"
    yield "  " + "   ".join(f"{kind} {_size(size)}" for kind, size in found.formats.items())
    yield ""
    width = max(len(row.step) for row in found.rows)
    yield f"{'step':<{width}} {'GPU':<11} {'RAM':>8} {'disk':>9} {'time':>8}"
    for row in found.rows:
        yield _line(row, width, colour=colour)
        yield from (f"    {lack}" for lack in row.lacks)
        yield from (f"    → {each}" for each in row.advice)
    peak = max(entry.peak for entry in found.ledger)
    yield f"disk is that of all files by then; the plan takes {peak / 1e9:.1f} GB at its fullest"


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _line(row: Row, width: int, *, colour: bool) -> str:
    needs = row.needs
    cards = f"{needs.gpu} × {needs.gpu_mem_mb / 1000:.1f} GB" if needs.gpu else "-"
    disk = "-" if row.peak is None else f"{row.peak / 1e9:.1f} GB"
    time = _time(needs.runtime) if needs.runtime else "-"
    word = "fits" if row.fits else "no"
    shown = f"{GREEN if row.fits else RED}{word}{PLAIN}" if colour else word
    asked = ", if asked for" if row.optional else ""
    return f"{row.step:<{width}} {cards:<11} {needs.mem_mb / 1000:>5.1f} GB {disk:>9} {time:>8}  {shown}{asked}"


def _time(minutes: int) -> str:
    return f"{minutes} min" if minutes < 10_000 else f"{minutes / 60:.0f} h"


def as_json(machine: Machine, software: Software | None, plans: Sequence[Preflight]) -> dict[str, Any]:
    """Everything that is told, for programs."""
    rows = {plan.model: [{**asdict(row), "fits": row.fits} for row in plan.rows] for plan in plans}
    return {
        "machine": asdict(machine),
        "software": None
        if software is None
        else {**asdict(software), "architectures": len(software.architectures or ())},
        "fits": all(plan.fits for plan in plans),
        "models": {
            plan.model: {
                "fits": plan.fits,
                "formats": plan.formats,
                "steps": rows[plan.model],
                "ledger": [asdict(entry) for entry in plan.ledger],
            }
            for plan in plans
        },
    }


def _work(arguments: argparse.Namespace) -> None:
    project = read_project(arguments.config, arguments.changes)
    names = arguments.model or project.names
    for name in names:
        if name not in project.names:
            raise UsageError(f"--model: unknown model {name!r}{suggest(name, project.names)}")
    here = this_machine(Path(), cache_folder(), model_store())
    machine = planned_machine(project.hardware) if arguments.planned else here
    software = None if arguments.planned else this_software(project.llama_cpp)
    plans = [preflight(name, project, machine, software) for name in names]
    print("the machine that config.yaml plans for" if arguments.planned else "this machine")
    print(*describe_machine(machine), *(describe_software(software) if software else ()), sep="\n")
    for plan in plans:
        print("", *describe(plan, colour=sys.stdout.isatty()), sep="\n")
    if arguments.json:
        write_json(arguments.json, as_json(machine, software, plans))
    if not all(plan.fits for plan in plans):
        sys.exit(FAILED)


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__, threads=False)
    parser.add_argument(
        "--config", type=Path, nargs="*", default=[Path("config.yaml")], metavar="FILE", help="what is to be built"
    )
    parser.add_argument("--changes", type=json_mapping, default={}, metavar="JSON", help="put over what the files say")
    parser.add_argument("--model", action="append", metavar="NAME", help="may be repeated; left out, every model")
    parser.add_argument("--planned", action="store_true", help="the machine of config.yaml instead of this one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all of it as JSON")
    run_script(parser, _work, outputs=lambda given: [given.json] if given.json else [])


if __name__ == "__main__":
    main()
