"""Running another program: its lines go to the log, its progress to a bar, its last words into the error."""

from __future__ import annotations

import codecs
import os
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lib.console import note
from lib.errors import ModelmillError

LAST_LINES = 12


class ProgramError(ModelmillError):
    """A program that was run has failed."""


def run_program(
    command: Sequence[str | Path],
    *,
    follow: Callable[[str], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """
    Run a program to its end and hand each line it prints to `follow`.

    Args:
        command: program and arguments.
        follow: sees every line, also those that a progress bar overwrites with a carriage return.
        environment: variables added to this process's.

    Raises:
        ProgramError: it cannot be started, or ends with a status other than 0; the message ends with
            the last lines it printed.
    """
    words = [str(word) for word in command]
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
    except OSError as error:
        raise ProgramError(f"{words[0]} cannot be started: {error.strerror}") from error
    try:
        for line in _lines(process):
            last.append(line)
            note(line)
            if follow:
                follow(line)
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()
        if process.stdout:
            process.stdout.close()
    if process.returncode:
        name = Path(words[0]).name
        raise ProgramError("\n".join([f"{name} ended with status {process.returncode}:", *(f"  {x}" for x in last)]))


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Lines as they come; a carriage return ends one as well, so that a progress bar can be followed."""
    if process.stdout is None:
        return
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    rest = ""
    while chunk := os.read(process.stdout.fileno(), 1 << 16):
        *whole, rest = (rest + decode(chunk)).replace("\r", "\n").split("\n")
        yield from (line for line in whole if line.strip())
    if rest.strip():
        yield rest
