"""
llama.cpp as a pinned tool: fetched from the package index, built once into a cache, found again.

The build's bytes matter: quantized files depend on the compiler's flags (a build with `-march` in
CFLAGS changed 179 of 256 rows of Q4_K). So the flags are fixed, the environment's are ignored, and the
cache's key holds the source, the flags, the compiler and the CPU's features.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lib.config import schema
from lib.console import progress, say
from lib.errors import ModelmillError
from lib.jsonfile import digest_json
from lib.locks import in_turn
from lib.package_index import fetch_package
from lib.process import run_program
from lib.toolchain import cache_folder, cpu_features, describe_compiler

PACKAGE = "llama-cpp-python"
TOOLS = ("llama-quantize", "llama-server")
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_C_FLAGS=-ffp-contract=off",
    "-DCMAKE_CXX_FLAGS=-ffp-contract=off",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
FASTER = Path(__file__).with_suffix(".cmake")
# 120 of the tree's 176 MB: documentation, test vocabularies, pictures.
UNUSED_SOURCES = ("docs/", "models/", "media/", "tests/", ".github/", "benches/")


class LlamaCppError(ModelmillError):
    """llama.cpp is not there and cannot be built here."""


@dataclass(frozen=True)
class LlamaCpp:
    """A llama.cpp that is ready: its source tree and the folder of its programs."""

    source: Path
    programs: Path
    commit: str

    def tool(self, name: str) -> Path:
        """Path of a program, as in "llama-quantize"."""
        path = self.programs / name
        if not path.is_file():
            raise LlamaCppError(f"{self.programs} has no {name}; build it there, or leave llama_cpp.path empty")
        return path

    @property
    def convert_script(self) -> Path:
        """llama.cpp's converter from a Hugging Face checkpoint."""
        return self.source / "convert_hf_to_gguf.py"


def provide_llama_cpp(
    *, version: str, sha256: str, commit: str, cmake_flags: Sequence[str], threads: int, tools: Sequence[str] = TOOLS
) -> LlamaCpp:
    """
    Return the pinned llama.cpp with the named programs, building what the cache does not hold.

    An interrupted build goes on where it stopped; two builds at once wait for each other.

    Args:
        version, sha256: of the source distribution.
        commit: the llama.cpp commit in it.
        cmake_flags: added to CMAKE_FLAGS.
        threads: compilers run at once.

    Raises:
        CompilerError: no compiler.
        ProgramError: the build failed.
        PackageIndexError: the source could not be fetched.
    """
    flags = _all_flags(commit, cmake_flags)
    home = _home(sha256, flags)
    if not _is_complete(home, tools):
        with in_turn(home / "lock", waiting="llama.cpp is being built by another process; waiting for it"):
            if not (home / "source").is_dir():
                _unpack_source(version=version, sha256=sha256, home=home)
            if tools:
                _build(home=home, flags=flags, tools=tools, threads=threads)
    return _in_cache(home, commit)


def find_llama_cpp(*, sha256: str, commit: str, cmake_flags: Sequence[str]) -> LlamaCpp | None:
    """The pinned llama.cpp if the cache holds its source; its programs may still have to be built."""
    home = _home(sha256, _all_flags(commit, cmake_flags))
    return _in_cache(home, commit) if (home / "source").is_dir() else None


def _all_flags(commit: str, cmake_flags: Sequence[str]) -> list[str]:
    return [*CMAKE_FLAGS, f"-DLLAMA_BUILD_COMMIT={commit}", *cmake_flags]


def _home(sha256: str, flags: Sequence[str]) -> Path:
    """The folder of the cache in which that source is built with those flags."""
    key = digest_json([sha256, flags, FASTER.read_text(), describe_compiler(), cpu_features()])[:16]
    return cache_folder() / "llama.cpp" / key


def _in_cache(home: Path, commit: str) -> LlamaCpp:
    return LlamaCpp(source=home / "source", programs=home / "build" / "bin", commit=commit)


def use_llama_cpp(path: Path) -> LlamaCpp:
    """
    Return the user's own llama.cpp: a source tree with its programs in build/bin.

    Raises:
        LlamaCppError: no converter there, no programs, or no commit to write down.
    """
    if not (path / "convert_hf_to_gguf.py").is_file():
        raise LlamaCppError(f"llama_cpp.path: {path} has no convert_hf_to_gguf.py; name llama.cpp's source folder")
    commit = subprocess.run(["git", "-C", str(path), "rev-parse", "HEAD"], capture_output=True, text=True)
    if commit.returncode:
        raise LlamaCppError(f"llama_cpp.path: {path} is no git checkout, so its commit is not known")
    own = LlamaCpp(source=path, programs=path / "build" / "bin", commit=commit.stdout.strip()[:10])
    own.tool("llama-quantize")
    return own


def _is_complete(home: Path, tools: Sequence[str]) -> bool:
    return (home / "source").is_dir() and all((home / f"{tool}.built").is_file() for tool in tools)


def _unpack_source(*, version: str, sha256: str, home: Path) -> None:
    partial = home / "source.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with TemporaryDirectory(dir=home) as download:
        archive = fetch_package(requirement=f"{PACKAGE}=={version}", sha256=sha256, folder=Path(download), source=True)
        prefix = f"llama_cpp_python-{version}/vendor/llama.cpp/"
        with tarfile.open(archive) as tar:
            for member in tar:
                inside = member.name.removeprefix(prefix)
                if inside != member.name and not inside.startswith(UNUSED_SOURCES):
                    member.name = inside
                    tar.extract(member, partial, filter="data")
    if not (partial / "convert_hf_to_gguf.py").is_file():
        raise LlamaCppError(f"{PACKAGE} {version} carries no llama.cpp tree")
    os.replace(partial, home / "source")


def _build(*, home: Path, flags: Sequence[str], tools: Sequence[str], threads: int) -> None:
    say(f"building llama.cpp ({', '.join(tools)}) on {threads} threads; this happens once, into {home}")
    build = home / "build"
    # -march and the like from the user's shell would change the bytes of quantized files.
    environment = dict.fromkeys(("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS"), "")
    # The cmake and ninja that pip installed lie beside this interpreter.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    configure = ["cmake", "-G", "Ninja", "-S", str(home / "source"), "-B", str(build), *flags]
    configure.append(f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={FASTER}")
    run_program(configure, environment=environment)
    with progress("building llama.cpp", total=1000, unit="‰") as bar:
        done = 0

        def follow(line: str) -> None:
            nonlocal done
            if (share := _share_done(line)) is not None:
                bar.advance(max(0, int(1000 * share) - done))
                done = max(done, int(1000 * share))

        command = ["cmake", "--build", str(build), "--parallel", str(threads), "--target", *tools]
        run_program(command, environment=environment, follow=follow)
    for tool in tools:
        (home / f"{tool}.built").touch()


def _share_done(line: str) -> float | None:
    """What ninja's "[12/139]" says is done."""
    counts = line[1:].partition("]")[0].split("/") if line.startswith("[") else []
    if len(counts) == 2 and all(count.strip().isdigit() for count in counts):
        return int(counts[0]) / int(counts[1])
    return None


def add_llama_cpp_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which llama.cpp a script uses; the defaults are the pinned one."""
    pinned = schema()["properties"]["llama_cpp"]["properties"]
    group = parser.add_argument_group("llama.cpp")
    for name in ("version", "sha256", "commit"):
        group.add_argument(f"--llama-cpp-{name}", default=pinned[name]["default"], help=pinned[name]["description"])
    group.add_argument("--llama-cpp-path", type=Path, metavar="DIR", help=pinned["path"]["description"])
    group.add_argument(
        "--llama-cpp-cmake-flag", action="append", default=[], metavar="-DNAME=VALUE", help="an additional CMake flag"
    )


def llama_cpp_words(arguments: argparse.Namespace) -> list[str]:
    """These options again, for another script."""
    named = {name: getattr(arguments, f"llama_cpp_{name}") for name in ("version", "sha256", "commit", "path")}
    words = [f"--llama-cpp-{name}={value}" for name, value in named.items() if value is not None]
    return [*words, *(f"--llama-cpp-cmake-flag={flag}" for flag in arguments.llama_cpp_cmake_flag)]


def llama_cpp_from(arguments: argparse.Namespace, *, tools: Sequence[str] = TOOLS) -> LlamaCpp:
    """The llama.cpp that a script's options name, built if the cache does not hold it."""
    if arguments.llama_cpp_path is not None:
        return use_llama_cpp(arguments.llama_cpp_path)
    return provide_llama_cpp(
        version=arguments.llama_cpp_version,
        sha256=arguments.llama_cpp_sha256,
        commit=arguments.llama_cpp_commit,
        cmake_flags=arguments.llama_cpp_cmake_flag,
        threads=arguments.threads,
        tools=tools,
    )
