"""Running programs: what they print is followed, and their last words end up in the error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_disk import small_disk

from lib.console import LOGGER, configure_logging
from lib.process import LAST_LINES, Program, ProgramError, run_program


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    handlers = LOGGER.handlers[:]
    configure_logging(log=tmp_path / "x.log")
    yield tmp_path / "x.log"
    for handler in set(LOGGER.handlers) - set(handlers):
        handler.close()
    LOGGER.handlers[:] = handlers


def run(program: str, **options: object) -> list[str]:
    """The lines that are seen of a Python program."""
    seen: list[str] = []
    run_program([sys.executable, "-c", program], follow=seen.append, **options)
    return seen


def test_every_line_is_followed_in_order_from_both_streams() -> None:
    assert run(
        "import sys; print('one', flush=True); print('two', file=sys.stderr, flush=True); print('three', end='')"
    ) == ["one", "two", "three"]


def test_a_progress_bar_is_followed() -> None:
    program = "import sys; [sys.stderr.write(f'\\r[{n}/3] go') for n in (1, 2, 3)]; sys.stderr.write('\\n')"
    assert run(program) == ["[1/3] go", "[2/3] go", "[3/3] go"]


def test_progress_without_lines_is_followed() -> None:
    program = "import sys; sys.stdout.write('chunks 2\\n[1]7.25,[2]6.9,\\rdone\\n')"
    assert run(program, line_ends="\r,") == ["chunks 2", "[1]7.25", "[2]6.9", "done"]
    assert run(program) == ["chunks 2", "[1]7.25,[2]6.9,", "done"]


def test_it_runs_where_it_is_told(tmp_path: Path) -> None:
    assert run("import os; print(os.getcwd())", folder=tmp_path) == [str(tmp_path.resolve())]
    assert run("import os; print(os.getcwd())") == [os.getcwd()]


def test_blank_lines_and_windows_line_ends() -> None:
    assert run("import sys; sys.stdout.write('a\\r\\n\\n  \\nb\\r\\n')") == ["a", "b"]


def test_text_that_comes_in_pieces_is_put_together() -> None:
    """A character's bytes may arrive in two reads."""
    program = (
        "import sys, time\n"
        "for byte in '語だ'.encode():\n"
        "    sys.stdout.buffer.write(bytes([byte])); sys.stdout.buffer.flush(); time.sleep(0.02)\n"
    )
    assert run(program) == ["語だ"]


def test_bytes_that_are_no_text_do_no_harm() -> None:
    (line,) = run("import sys; sys.stdout.buffer.write(b'a\\xffb\\n')")
    assert line == "a\ufffdb"


def test_output_goes_to_the_log_and_not_to_the_screen(log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_program([sys.executable, "-c", "print('detail')"])
    assert "detail" in log.read_text()
    assert capfd.readouterr() == ("", "")


def test_the_error_ends_with_the_last_lines() -> None:
    program = f"import sys; [print('line', n) for n in range({LAST_LINES + 5})]; sys.exit(3)"
    with pytest.raises(ProgramError) as failed:
        run_program([sys.executable, "-c", program])
    first, *rest = str(failed.value).splitlines()
    assert first == f"{Path(sys.executable).name} ended with status 3:"
    assert rest == [f"  line {n}" for n in range(5, LAST_LINES + 5)]


def test_a_program_that_was_killed() -> None:
    with pytest.raises(ProgramError, match=r"-9|signal 9|SIGKILL"):
        run_program([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])


@pytest.mark.parametrize("mode", [None, 0o644])
def test_a_program_that_cannot_be_started(mode: int | None, tmp_path: Path) -> None:
    program = tmp_path / "no-such-program"
    if mode is not None:
        program.touch(mode=mode)
    with pytest.raises(ProgramError, match=r"no-such-program cannot be started: (No such file|Permission denied)"):
        run_program([program])


def test_variables_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    program = "import os; print(os.environ['KEPT'], os.environ['ADDED'])"
    assert run(program, environment={"ADDED": "2"}) == ["1 2"]


def test_nothing_can_be_asked_of_the_user() -> None:
    """A program that waits for an answer would hang where nobody sees its question."""
    inner = "import sys; sys.exit(len(sys.stdin.read()))"
    outer = f"import sys; from lib.process import run_program; run_program([sys.executable, '-c', {inner!r}])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", outer], input=b"answer", env=environment).returncode == 0


def test_a_follower_that_fails_ends_the_program(tmp_path: Path) -> None:
    marker = tmp_path / "still-running"
    program = f"import time; print('go', flush=True); time.sleep(30); open({str(marker)!r}, 'w')"

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_program([sys.executable, "-c", program], follow=stop)
    assert not marker.exists()


@pytest.mark.parametrize(
    "said",
    ["cannot write: No space left on device", "OSError: 65536 requested and 52896 written", "Disk quota exceeded"],
)
def test_a_program_that_says_that_the_disk_is_full(said: str, tmp_path: Path) -> None:
    with pytest.raises(ProgramError) as failed:
        run_program([sys.executable, "-c", f"print({said!r}); exit(1)"], output=tmp_path / "x.gguf")
    first, second = str(failed.value).splitlines()
    assert first.startswith(f"the disk is full (writing {tmp_path / 'x.gguf'}): free some space")
    assert second == f"  {said}"


def test_a_program_that_fills_the_disk_and_does_not_say_so(tmp_path: Path) -> None:
    program = (
        "import sys\ntry:\n    open('full/x', 'wb').write(bytes(1 << 21))\nexcept OSError:\n    sys.exit('stream')"
    )
    with small_disk(tmp_path / "full") as disk, pytest.raises(ProgramError, match=r"^the disk is full .*\n  stream$"):
        run_program(["env", "-C", tmp_path, sys.executable, "-c", program], output=disk / "x")


def test_a_program_that_fails_for_another_reason(tmp_path: Path) -> None:
    with pytest.raises(ProgramError) as failed:
        run_program([sys.executable, "-c", "exit(1)"], output=tmp_path / "not/there")
    assert "disk" not in str(failed.value)


def test_a_python_programs_traceback_is_for_the_log(log: Path) -> None:
    program = (
        "import sys\n"
        "def inner():\n    try:\n        {}['lost']\n    except KeyError as error:\n"
        "        raise ValueError('first\\n  second') from error\n"
        "sys.stderr.write('Writing:  38%|###    | 1/3\\n')\ninner()\n"
    )
    with pytest.raises(ProgramError) as failed:
        run_program([sys.executable, "-c", program])
    _, *rest = str(failed.value).splitlines()
    assert rest == ["  ValueError: first", "    second"]
    assert "Traceback (most recent call last)" in log.read_text()
    assert "KeyError: 'lost'" in log.read_text()


def test_progress_bars_do_not_push_out_the_last_words() -> None:
    program = "import sys; print('the reason', flush=True); [print(f'\\r{n}%|#', end='') for n in range(50)]; exit(1)"
    with pytest.raises(ProgramError, match=r":\n  the reason$"):
        run_program([sys.executable, "-c", program])


def listening(program: str) -> Program:
    return Program([sys.executable, "-c", program], listens=True)


def test_a_program_is_told_what_to_do_after_its_start() -> None:
    seen: list[str] = []
    program = listening("import sys; print('ready', flush=True); print(len(sys.stdin.read()))")
    program.tell("x" * 1_000_000)
    program.finish(follow=seen.append)
    assert seen == ["ready", "1000000"]


def test_a_program_that_does_not_listen_says_why() -> None:
    program = listening("import sys; sys.stdin.close(); sys.exit('no such module')")
    program.tell("x" * 1_000_000)
    with pytest.raises(ProgramError, match="no such module") as caught:
        program.finish()
    assert caught.value.status == 1


def test_a_program_that_is_not_needed_any_more_is_ended(tmp_path: Path) -> None:
    program = listening(f"import pathlib, sys; sys.stdin.read(); pathlib.Path({str(tmp_path / 'done')!r}).touch()")
    program.end()
    program.end()
    program.tell("too late")
    assert not (tmp_path / "done").exists()
