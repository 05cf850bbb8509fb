"""Running another program: its lines go to the log, its progress to a bar, its last words into the error."""

from __future__ import annotations

import codecs
import os
import re
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import dropwhile
from pathlib import Path

from lib.cli import describe_full_disk, free_space
from lib.console import note
from lib.errors import ModelmillError
from lib.locks import held_locks

LAST_LINES = 12
LEAST_FREE = 1 << 20  # bytes; on a disk with less, no file of ours could be finished
# What the C library says, and what numpy says when it could not write a whole array.
FULL_DISK = re.compile(r"No space left on device|Disk quota exceeded|\d+ requested and \d+ written")
BAR = re.compile(r"\d+%\|")  # of tqdm; a dozen of them would push out what the program says at its end
FRAME = re.compile(r'\s+File ".*", line \d+')


class ProgramError(ModelmillError):
    """
    A program that was run has failed.

    Attributes:
        status: what it ended with; None if it could not be started.
    """

    status: int | None = None


class Program:
    """A program that was started, whose end is to be waited for."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        listens: bool = False,
    ) -> None:
        """
        Args:
            command: program and arguments.
            environment: variables added to this process's.
            folder: where it runs, if not in this process's working folder.
            listens: whether it is told something on its standard input.

        Raises:
            ProgramError: it cannot be started.
        """
        words = [str(word) for word in command]
        self._name = words[0]
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE if listens else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                cwd=folder,
                pass_fds=held_locks(),
            )
        except OSError as error:
            raise ProgramError(f"{self._name} cannot be started: {error.strerror}") from error

    def tell(self, text: str) -> None:
        """Write to its standard input, and close that; why a program did not read it, `finish` says."""
        if self._process.stdin and not self._process.stdin.closed:
            with suppress(BrokenPipeError), self._process.stdin as stdin:
                stdin.write(text.encode())

    def finish(
        self, *, follow: Callable[[str], None] | None = None, line_ends: str = "\r", output: Path | None = None
    ) -> None:
        """
        Wait for its end; the arguments and what is raised are those of `run_program`.
        """
        last: deque[str] = deque(maxlen=LAST_LINES)
        self.tell("")
        try:
            for line in _lines(self._process, line_ends):
                if not BAR.search(line):
                    last.append(line)
                note(line)
                if follow:
                    follow(line)
        except BaseException:
            self._process.kill()
            raise
        finally:
            self._process.wait()
            self.end()
        if self._process.returncode:
            ended = f"{Path(self._name).name} ended with status {self._process.returncode}:"
            if _met_full_disk(last, output=output):
                ended = f"{describe_full_disk(writing=output)}; {ended}"
            failed = ProgramError("\n".join([ended, *(f"  {line}" for line in _without_frames(last))]))
            failed.status = self._process.returncode
            raise failed

    def end(self) -> None:
        """End it, if it still runs."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with suppress(BrokenPipeError):
                    stream.close()


def run_program(
    command: Sequence[str | Path],
    *,
    follow: Callable[[str], None] | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    line_ends: str = "\r",
    output: Path | None = None,
) -> None:
    """
    Run a program to its end and hand each line it prints to `follow`.

    Args:
        command: program and arguments.
        follow: sees every line, also those that a progress bar overwrites with a carriage return.
        environment: variables added to this process's.
        folder: where it runs, if not in this process's working folder.
        line_ends: what ends a line beside a line feed, for programs that show progress without one.
        output: the file that it writes; a program that ends with an error while its disk is full is said to
            have met that, since few say so themselves. Without it, the working folder is looked at.

    Raises:
        ProgramError: it cannot be started, or ends with a status other than 0; the message ends with
            the last lines it printed, of a Python traceback only the error.
    """
    Program(command, environment=environment, folder=folder).finish(follow=follow, line_ends=line_ends, output=output)


def _met_full_disk(last: Iterable[str], *, output: Path | None) -> bool:
    """Whether a failed program says that the disk is full, or it is: llama-quantize says "iostream error" alone."""
    return any(FULL_DISK.search(line) for line in last) or free_space(output or Path()) < LEAST_FREE


def _without_frames(last: Sequence[str]) -> Sequence[str]:
    """The last lines of a program; where they hold a Python traceback, what stands below its last frame."""
    frames = [number for number, line in enumerate(last) if FRAME.match(line)]
    if not frames:
        return last
    below = list(last)[frames[-1] + 1 :]
    return list(dropwhile(lambda line: line.startswith("    "), below)) or last


def _lines(process: subprocess.Popen[bytes], ends: str) -> Iterator[str]:
    """Lines as they come; each of the characters `ends` ends one as well, so that a progress bar can be followed."""
    if process.stdout is None:
        return
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    rest = ""
    while chunk := os.read(process.stdout.fileno(), 1 << 16):
        *whole, rest = re.split(f"[\n{re.escape(ends)}]", rest + decode(chunk))
        yield from (line for line in whole if line.strip())
    if rest.strip():
        yield rest
