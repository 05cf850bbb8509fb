"""Checking artifacts: what is whole passes wherever it lies, and every kind of damage is found and named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import pytest
from conftest import ROOT
from tiny_chain import (
    ADAPTER,
    ARTIFACTS,
    BASE,
    BASE_F16,
    F16,
    FILES,
    FOLDER_FILES,
    LLAMA_CPP,
    MERGED,
    Q4,
    flip,
    problems,
    rewrite_manifest,
    verify,
    write_chain,
    write_folder,
)

from lib.artifact import NoArtifactError, find_artifact
from lib.manifest import (
    NAME,
)
from lib.verification import check_artifact


@pytest.mark.parametrize("name", ARTIFACTS)
def test_what_is_whole_passes(name: str, chain: Path) -> None:
    assert problems(chain / name) == []


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_copy_alone_elsewhere_passes(name: str, chain: Path, tmp_path: Path) -> None:
    place = tmp_path / "stick" / Path(name).name
    place.parent.mkdir()
    if (chain / name).is_dir():
        shutil.copytree(chain / name, place)
    else:
        for ending in ("", ".json"):
            shutil.copy(f"{chain / name}{ending}", place.parent)
    shutil.rmtree(chain)
    report = check_artifact(find_artifact(place), threads=1)
    assert report.problems == []
    links = [line for line in report.lines if line.startswith("  from ")]
    assert len(links) == {BASE: 0, ADAPTER: 1, MERGED: 2, F16: 3, Q4: 4, BASE_F16: 1}[name]
    assert all(line.endswith(": not here") for line in links)


def test_the_chain_is_told_in_lines(chain: Path) -> None:
    def digest(name: str) -> str:
        return json.loads((chain / name / NAME).read_text())["digest"][:12]

    done = verify("--log", "logs/verify.log", "--threads", "1", Q4, folder=chain)
    size = (chain / Q4).stat().st_size / 1e6
    sha256 = {name: hashlib.sha256((chain / name).read_bytes()).hexdigest()[:12] for name in (Q4, F16)}
    assert done.stderr.splitlines() == [
        f"{Q4}: GGUF, {size:.1f} MB, sha256 {sha256[Q4]}…, q4_k_m, by llama.cpp {LLAMA_CPP}",
        f"  from the 16-bit GGUF m.f16.gguf {sha256[F16]}…, f16, by llama.cpp {LLAMA_CPP}: see {F16}.json",
        f"  from the merged checkpoint {digest(MERGED)}…, merged in float32 onto the original weights, "
        f"rounded once to float16: see {MERGED}/{NAME}",
        f"  from the adapter {digest(ADAPTER)}…, trained on talks.jsonl dddddddddddd…; method qlora; "
        f"peft 0.21.2, torch 2.13.0: see {ADAPTER}/{NAME}",
        f"  from the base {digest(BASE)}…, maker/model (hub, revision {'c' * 40}): see {BASE}/{NAME}",
        "  ok",
    ]
    assert done.returncode == 0
    assert (chain / "logs/verify.log").read_text().splitlines()[-2].endswith("  ok")


@pytest.mark.parametrize("name", FOLDER_FILES)
def test_a_flipped_byte_in_a_folder(name: str, chain: Path) -> None:
    flip(chain / name)
    folder, _, file = name.rpartition("/")
    found = problems(chain / folder)
    assert any(each.startswith(f"{file}: changed: sha256 ") for each in found), found
    assert all(file in each for each in found)


@pytest.mark.parametrize("name", FOLDER_FILES)
def test_a_shorter_and_a_missing_file_in_a_folder(name: str, chain: Path) -> None:
    path, size = chain / name, (chain / name).stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path.name}: {size - 1} bytes, expected {size}" in problems(path.parent)
    path.unlink()
    assert problems(path.parent) == [f"{path.name}: missing"]


@pytest.mark.parametrize("name", [F16, Q4, BASE_F16])
def test_a_flipped_byte_in_a_gguf(name: str, chain: Path) -> None:
    flip(chain / name)
    (found,) = problems(chain / name)
    assert found.startswith(f"{Path(name).name}: changed: sha256 ")


def test_every_change_of_a_folder_is_listed(chain: Path) -> None:
    folder = chain / MERGED
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    flip(folder / "config.json", at=2)
    (folder / "notes").mkdir()
    found = problems(folder)
    assert [each.partition(":")[0] for each in found] == [
        "config.json",
        "model.safetensors",
        "notes",
        "weights.safetensors",
    ]
    assert found[1:] == [
        "model.safetensors: missing",
        "notes: not in the manifest",
        "weights.safetensors: not in the manifest",
    ]


def test_what_the_workflow_leaves_in_a_folder_is_no_surplus(chain: Path) -> None:
    (chain / MERGED / ".snakemake_timestamp").touch()
    assert problems(chain / MERGED) == []


def test_a_renamed_gguf(chain: Path) -> None:
    renamed = chain / "models/better.gguf"
    (chain / Q4).rename(renamed)
    Path(f"{chain / Q4}.json").rename(f"{renamed}.json")
    assert problems(renamed) == ["better.gguf.json describes a file of another name: 'm.q4_k_m.gguf'"]


def test_a_gguf_that_is_gone(chain: Path) -> None:
    (chain / Q4).unlink()
    assert problems(chain / Q4) == problems(Path(f"{chain / Q4}.json")) == ["m.q4_k_m.gguf: missing"]


NONSENSE = {
    "empty": "",
    "cut off": '{"artifact": "merged", ',
    "a list": "[]",
    "null": "null",
    "no text": b"\xff\xfe\x00{",
    "deep": "[" * 100_000,
    "a list of files": {"files": ["config.json"]},
    "no facts": {"files": {"config.json": 5}},
    "no sha256": {"files": {"config.json": {"size": 3}}},
    "text for a size": {"files": {"config.json": {"size": "3", "sha256": "0" * 64}}},
    "negative size": {"files": {"config.json": {"size": -1, "sha256": "0" * 64}}},
    "true for a size": {"files": {"config.json": {"size": True, "sha256": "0" * 64}}},
    "endless size": {"files": {"config.json": {"size": 10**400, "sha256": "0" * 64}}},
    "wrong sha256": {"files": {"config.json": {"size": 3, "sha256": "Z" * 64}}},
    "a file outside": {"files": {"../x": {"size": 3, "sha256": "0" * 64}}},
    "a file deep outside": {"files": {"a/../../x": {"size": 3, "sha256": "0" * 64}}},
    "an absolute file": {"files": {"/etc/hostname": {"size": 3, "sha256": "0" * 64}}},
    "no name": {"files": {"": {"size": 3, "sha256": "0" * 64}}},
    "the folder itself": {"files": {".": {"size": 3, "sha256": "0" * 64}}},
    "an impossible name": {"files": {"a\0b": {"size": 3, "sha256": "0" * 64}}},
    "a broken name": {"files": {"\ud800": {"size": 3, "sha256": "0" * 64}}},
    "number for an artifact": {"artifact": 5},
    "number for a digest": {"digest": 5},
    "list for an origin": {"origin": []},
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_a_damaged_manifest_of_a_folder(nonsense: str, chain: Path) -> None:
    path, content = chain / MERGED / NAME, NONSENSE[nonsense]
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (found,) = problems(chain / MERGED)
    assert str(path) in found and any(word in found for word in ("is damaged:", "no valid JSON", "no manifest"))
    # Seen from what was made of it, the same.
    assert found in problems(chain / Q4)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"size": 3}', '{"size": [], "sha256": "x", "origin": 5, "name": {}}', "[" * 100_000]
)
def test_a_damaged_manifest_of_a_file(content: str, chain: Path) -> None:
    Path(f"{chain / Q4}.json").write_text(content)
    (found,) = problems(chain / Q4)
    assert f"{Q4}.json" in found


def test_a_gguf_cut_off_anywhere(chain: Path) -> None:
    path = chain / Q4
    content = path.read_bytes()
    for size in (*range(0, 64), *range(64, len(content), 97), len(content) - 1):
        path.write_bytes(content[:size])
        found = problems(path)
        assert found[0] == f"{path.name}: {size} bytes, expected {len(content)}"
        assert len(found) == 2 and ("cut off or damaged" in found[1] or "no GGUF file" in found[1]), (size, found)


def test_a_damaged_length_in_a_gguf_ends_at_the_end_of_the_file(chain: Path) -> None:
    path = chain / Q4
    content, key = path.read_bytes(), b"tokenizer.ggml.token_type"
    at = content.index(key) + len(key) + 8  # behind the key: what it is, of what, and how many
    assert content[at : at + 8] == (3).to_bytes(8, "little")
    path.write_bytes(content[:at] + (1 << 50).to_bytes(8, "little") + content[at + 8 :])
    (_, found) = problems(path)
    assert "end behind the end of the file" in found


@pytest.mark.slow
def test_any_flipped_byte_of_a_gguf_without_a_manifest_ends_in_plain_words(chain: Path) -> None:
    Path(f"{chain / Q4}.json").unlink()
    path = chain / Q4
    content = path.read_bytes()
    for at in range(gguf.GGUFReader(path).data_offset):
        for bits in (0x01, 0x80):
            path.write_bytes(content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :])
            found = problems(path)
            assert found[0].startswith("m.q4_k_m.gguf.json is missing") and len(found) <= 2


def test_a_gguf_without_a_manifest_tells_what_it_says_of_itself(chain: Path) -> None:
    Path(f"{chain / Q4}.json").unlink()
    done = verify(Q4, folder=chain)
    assert done.returncode == 1
    assert f"  it says of itself: general.base_model.0.version {'c' * 40}" in done.stderr.splitlines()
    assert "m.q4_k_m.gguf.json is missing: there is nothing to check this file against" in done.stderr
    assert done.stderr.splitlines()[-1] == "verify.py: 1 of 1 checked did not pass"


def test_a_modelfile_stands_for_its_weights(chain: Path) -> None:
    done = verify("models/m.Modelfile", Q4, folder=chain)
    assert (done.returncode, done.stderr.count(f"{Q4}: GGUF")) == (0, 1), "the same file is checked once"
    assert "named by models/m.Modelfile, which has no manifest of its own and was not checked" in done.stderr
    flip(chain / Q4)
    assert verify("models/m.Modelfile", folder=chain).returncode == 1


def test_a_base_that_is_used_in_place(tmp_path: Path) -> None:
    place, kept = tmp_path / "given", tmp_path / "bases/m"
    write_folder(place, FILES[BASE], artifact="base", origin={"kind": "path", "name": "given"})
    kept.mkdir(parents=True)
    (place / NAME).rename(kept / NAME)
    (place / "README.md").write_text("theirs")
    (found,) = problems(kept)
    assert f"scripts/verify.py --manifest {kept / NAME} FOLDER" in found and "'given'" in found
    assert problems(place, manifest=kept / NAME) == []
    (place / "merges.txt").write_text("a file of the tokenizer's")
    flip(place / "model.safetensors")
    found = problems(place, manifest=kept / NAME)
    assert [each.partition(": ")[0] for each in found] == ["model.safetensors", "merges.txt"]


@contextmanager
def without_rights() -> Iterator[None]:
    """As root nothing is closed to us: be somebody else for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_cannot_be_read() -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        chain = write_chain(Path(place) / "project")
        (chain / MERGED / "model.safetensors").chmod(0)
        (chain / ADAPTER).chmod(0)
        with without_rights():
            merged, adapter = problems(chain / MERGED), problems(chain / ADAPTER)
        (chain / ADAPTER).chmod(0o755)
    assert merged[0] == "model.safetensors: Permission denied"
    assert [each for each in merged[1:] if "cannot be read" in each and f"{ADAPTER}/{NAME}" in each] == merged[1:] != []
    assert adapter == [f"cannot be read: {chain / ADAPTER / NAME}: Permission denied"]


def test_a_manifest_cannot_steer_the_terminal(chain: Path) -> None:
    rewrite_manifest(chain / BASE, lambda listed: listed["origin"].update(name="a\x1b[2Jb\rok"))
    done = verify(BASE, folder=chain)
    assert "\x1b" not in done.stderr and "\r" not in done.stderr
    assert "a\N{REPLACEMENT CHARACTER}[2Jb" in done.stderr


def test_an_artifact_of_another_kind_is_checked_by_its_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"a": b"1"}, artifact="something new", origin={"base": 5})
    assert problems(tmp_path / "x") == []
    flip(tmp_path / "x/a")
    assert len(problems(tmp_path / "x")) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "PATH"),
        (["models/none.gguf"], "models/none.gguf is not there"),
        (["none", Q4, "no more"], "no more is not there"),
        (["models"], "models holds no MANIFEST.json"),
        ([f"{MERGED}/config.json"], "it may be a part of models/m/merged: give that folder"),
        (["notes.txt"], "notes.txt has no manifest notes.txt.json beside it"),
        (["pipe.gguf"], "pipe.gguf has no manifest pipe.gguf.json beside it"),
        (["ollama.Modelfile"], "names no GGUF file: its FROM is llama3"),
        (["--manifest", f"{BASE}/{NAME}", BASE, ADAPTER], "--manifest is of one folder"),
        (["--manifest", "none.json", BASE], "none.json: not there"),
        (["--manifest", f"{BASE}/{NAME}", Q4], f"{Q4} is no folder"),
        (["--threads", "0", Q4], "--threads"),
    ],
)
def test_wrong_use(arguments: list[str], said: str, chain: Path) -> None:
    (chain / "notes.txt").touch()
    os.mkfifo(chain / "pipe.gguf")
    (chain / "ollama.Modelfile").write_text("FROM llama3\n")
    done = verify(*arguments, folder=chain)
    assert done.returncode == 2
    assert said in done.stderr
    assert "ok" not in done.stderr.split(), "nothing is checked then"


def test_status_of_several(chain: Path) -> None:
    done = verify(*ARTIFACTS, folder=chain)
    assert (done.returncode, done.stderr.splitlines().count("  ok")) == (0, 6)
    flip(chain / F16)
    rewrite_manifest(chain / MERGED, lambda listed: listed.update(files="all of them"))
    done = verify(*ARTIFACTS, folder=chain)
    lines = done.stderr.splitlines()
    assert (done.returncode, lines.count("  ok")) == (1, 3)
    assert lines[-1] == "verify.py: 3 of 6 checked did not pass"
    assert lines.count("  2 problems:") == 1, "the file itself, and the manifest that it was made from"


def test_paths_of_manifests_and_from_within(chain: Path) -> None:
    assert find_artifact(chain / MERGED / NAME) == find_artifact(chain / MERGED)
    done = verify(".", NAME, folder=chain / MERGED)
    assert (done.returncode, done.stderr.count("see ")) == (0, 2)
    with pytest.raises(NoArtifactError, match="is not there"):
        find_artifact(chain / "models/x.gguf.json")


def test_it_starts_without_torch(chain: Path) -> None:
    code = (
        "import sys, verify; from pathlib import Path; "
        "verify.verify(paths=[Path(sys.argv[1])], manifest=None, threads=1); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    assert subprocess.run([sys.executable, "-c", code, chain / Q4], env=environment).returncode == 0


TINY = (
    "adapters/tiny", "models/tiny/merged", "models/tiny.f16.gguf", "models/tiny.q4_k_m.gguf",
    "models/tiny.base.f16.gguf", "models/tiny.base.q4_k_m.gguf", "models/tiny.Modelfile",
)  # fmt: skip


@pytest.mark.slow
def test_everything_that_the_workflow_built_passes(built: Path, tiny_base: Path) -> None:
    done = verify(*TINY, folder=built)
    assert done.returncode == 0, done.stderr
    # The Modelfile's weights are the file that is named as well.
    assert done.stderr.splitlines().count("  ok") == len(TINY) - 1
    assert "not here" not in done.stderr
    assert verify("--manifest", built / "bases/tiny" / NAME, tiny_base).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TINY if "Modelfile" not in name])
def test_what_the_workflow_built_passes_elsewhere_and_any_damage_fails(name: str, built: Path, tmp_path: Path) -> None:
    place = tmp_path / "stick" / Path(name).name
    if (built / name).is_dir():
        shutil.copytree(built / name, place)
        files = [path for path in place.iterdir() if path.name not in (NAME, ".snakemake_timestamp")]
    else:
        place.parent.mkdir()
        for ending in ("", ".json"):
            shutil.copy(f"{built / name}{ending}", place.parent)
        files = [place]
    report = check_artifact(find_artifact(place), threads=2)
    assert report.problems == []
    assert all(line.endswith(": not here") for line in report.lines[1:])
    assert len(report.lines) > 1
    for path in files:
        flip(path, at=path.stat().st_size // 2)
        found = problems(place)
        assert any(each.startswith(f"{path.name}: changed: sha256 ") for each in found), found
        flip(path, at=path.stat().st_size // 2)
    assert problems(place) == []
