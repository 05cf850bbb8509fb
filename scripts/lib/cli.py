"""The thin entry that every script shares: common options, exit statuses, errors without tracebacks."""

from __future__ import annotations

import argparse
import errno
import logging
import math
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from lib.console import configure_logging, note, say
from lib.errors import ModelmillError
from lib.locks import only_writer
from lib.usage import Meter

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130
# How safetensors, which is written in Rust, tells what the operating system refused.
RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class UsageError(ModelmillError):
    """Options that do not go together; the script ends with status 2."""


def usable_cores() -> int:
    """Cores this process may use: its affinity, less what Slurm or a cgroup quota leaves of them."""
    limits = [len(os.sched_getaffinity(0))]
    if (allotted := os.environ.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        limits.append(int(allotted))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        share, period = quota.read_text().split()[:2]
        if share != "max":
            limits.append(int(share) // int(period))
    return max(1, min(limits))


def script_parser(description: str | None, *, threads: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have; `threads=False` where a setting of that name is one."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="write plain log lines to this file as well")
    if threads:
        parser.add_argument("--threads", type=positive, default=usable_cores(), metavar="N", help="CPU threads")
    return parser


def positive(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def planned_cards(text: str) -> list[float]:
    """GiB of each card, from a list like "24,24"."""
    try:
        cards = [float(size) for size in text.split(",") if size]
    except ValueError:
        cards = [math.nan]
    if not all(0 < size < math.inf for size in cards):
        raise UsageError(f"--gpus: expected GiB of each card, as in 24,24; found {text!r}")
    return cards


def _output(arguments: argparse.Namespace) -> list[Path]:
    output = getattr(arguments, "output", None)
    return [] if output is None else [output]


def run_script(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], None],
    *,
    outputs: Callable[[argparse.Namespace], Iterable[Path]] = _output,
) -> None:
    """
    Parse, set up the log, work, leave with the documented status, and end the log with what it took.

    Args:
        outputs: what nobody else may write meanwhile; manifests and logs beside it are written under its lock, too.
    """
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logging.raiseExceptions = False  # a log on a full disk would show a traceback for every line it misses
    try:
        configure_logging(log=None)
        with only_writer(*outputs(arguments)):
            # Not before: the log is that of the other run, if there is one.
            configure_logging(log=arguments.log)
            with Meter() as meter:
                work(arguments)
            note(str(meter.read()))
    except UsageError as error:
        _leave(f"{parser.prog}: {error}", WRONG_USE)
    except ModelmillError as error:
        _leave(f"{parser.prog}: {error}", FAILED)
    except KeyboardInterrupt:
        _leave(f"{parser.prog}: interrupted; nothing unfinished has a final name", INTERRUPTED)
    except MemoryError:
        _leave(f"{parser.prog}: out of memory", FAILED)
    except OSError as error:
        _leave(f"{parser.prog}: {describe_os_error(error, output=getattr(arguments, 'output', None))}", FAILED)
    except Exception as error:  # a fault of ours: one line for the user, the rest for whoever mends it
        if system := RUST_OS_ERROR.search(str(error)):
            number = int(system[1])
            told = OSError(number, os.strerror(number))
            _leave(f"{parser.prog}: {describe_os_error(told, output=getattr(arguments, 'output', None))}", FAILED)
        note(traceback.format_exc())
        where = arguments.log or "a log: run it again with --log FILE"
        _leave(f"{parser.prog}: internal error: {type(error).__name__}: {error} (details in {where})", FAILED)


def describe_os_error(error: OSError, *, output: Path | None = None) -> str:
    """
    An operating system's error as a line that names the file and, for a full disk, the way out.

    Args:
        output: what the script is to write; its disk is looked at where the error names no file.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        # Where an error names two files, as when one is copied, the second is the one being written.
        return describe_full_disk(writing=error.filename2 or error.filename, output=output)
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*([" → ".join(files)] if files else []), error.strerror or str(error)])


def describe_full_disk(*, writing: str | Path | None, output: Path | None = None) -> str:
    """What to say of a full disk: the file that was being written if that is known, else what is free for `output`."""
    if writing:
        where = f" (writing {writing})"
    else:
        where = f" ({free_space(output) / 1e6:.1f} MB are free now for {output})" if output else ""
    return f"the disk is full{where}: free some space and run the same command again"


def free_space(path: Path) -> int:
    """Free bytes of the file system on which `path` lies or would lie."""
    lies = path.absolute()
    return shutil.disk_usage(next(place for place in (lies, *lies.parents) if place.exists())).free


def _leave(message: str, status: int) -> None:
    say(message)
    sys.exit(status)
