"""Importance matrices: computed by llama.cpp, used by the types that profit, the same bytes wherever it is done."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from compute_imatrix import compute_imatrix
from conftest import ROOT, copy_built, run_snakemake
from gguf import GGUFReader
from quantize_gguf import quantize_gguf
from test_quantize_gguf import MIXTURE, copied, quantize
from test_rebuild import plan, set_in_config
from tiny import write_text

from lib.calibration import CalibrationError
from lib.gguf_file import count_types, read_gguf
from lib.llama_cpp import LlamaCpp
from lib.quant_types import IGNORE_IMATRIX, NEED_IMATRIX, QUANTIZED_TYPES

pytestmark = pytest.mark.slow

CHUNKS = 3
BUILT = ("models/tiny.q4_k_m.gguf", "models/tiny.iq2_xs.gguf", "models/tiny.q8_0.gguf", "models/tiny.base.iq2_xs.gguf")
MATRICES = ("models/tiny.imatrix.gguf", "models/tiny.base.imatrix.gguf")


@pytest.fixture(scope="module")
def weighed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the built folder in which a matrix was configured, and files of several types were made."""
    project, checkout = copy_built(built, tmp_path_factory.mktemp("weighed") / "place")
    write_text(project / "read.txt")
    matrix = {"types": ["q4_k_m", "iq2_xs"], "imatrix": {"text": "read.txt", "chunks": CHUNKS}}
    set_in_config("models", "tiny", "quantize", value=matrix)(project, checkout)
    done = run_snakemake(project, "-j1", *BUILT, checkout=checkout)
    assert done.returncode == 0, done.stderr
    assert plan(project, checkout, *BUILT) == set()
    return project


def test_the_matrix_says_what_it_was_made_of(weighed: Path, llama_cpp: LlamaCpp) -> None:
    found = read_gguf(weighed / MATRICES[0])
    assert found.metadata.get("imatrix.datasets") == ["calibration.txt"]
    assert (found.metadata.get("imatrix.chunk_count"), found.metadata.get("imatrix.chunk_size")) == (CHUNKS, 512)
    # Seven matrices in each of two layers, each with its sums and its counts.
    assert len(found.tensors) == 2 * 7 * 2
    source = json.loads((weighed / "models/tiny.f16.gguf.json").read_text())
    text = (weighed / "read.txt").read_bytes()
    assert json.loads((weighed / f"{MATRICES[0]}.json").read_text()) == {
        "artifact": "gguf",
        "name": "tiny.imatrix.gguf",
        "size": (weighed / MATRICES[0]).stat().st_size,
        "sha256": hashlib.sha256((weighed / MATRICES[0]).read_bytes()).hexdigest(),
        "origin": {
            "source": {key: source[key] for key in ("name", "sha256", "origin")},
            "text": {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()},
            "chunks": CHUNKS,
            "llama_cpp": llama_cpp.commit,
        },
    }


def test_the_base_has_its_own_matrix(weighed: Path) -> None:
    tuned, base = (json.loads((weighed / f"{name}.json").read_text()) for name in MATRICES)
    assert (tuned["origin"]["source"]["name"], base["origin"]["source"]["name"]) == (
        "tiny.f16.gguf",
        "tiny.base.f16.gguf",
    )
    assert tuned["sha256"] != base["sha256"]
    quantized = json.loads((weighed / "models/tiny.base.iq2_xs.gguf.json").read_text())
    assert quantized["origin"]["imatrix"] == {key: base[key] for key in ("sha256", "origin")}


def test_files_made_with_it(weighed: Path, built: Path) -> None:
    low = read_gguf(weighed / "models/tiny.iq2_xs.gguf")
    assert count_types(low)["IQ2_XS"] >= 8
    said = {
        key: low.metadata.get(f"quantize.imatrix.{key}") for key in ("file", "dataset", "entries_count", "chunks_count")
    }
    assert said == {
        "file": "imatrix.gguf",
        "dataset": "calibration.txt",
        "entries_count": 14,
        "chunks_count": CHUNKS,
    }
    plain, used = (GGUFReader(folder / "models/tiny.q4_k_m.gguf") for folder in (built, weighed))
    changed = {
        one.name
        for one, other in zip(plain.tensors, used.tensors, strict=True)
        if one.data.tobytes() != other.data.tobytes()
    }
    # All but the embedding and the output head, which have no entry in a matrix, and the norms.
    assert changed == {tensor.name for tensor in plain.tensors if "attn_" in tensor.name or "ffn_" in tensor.name} - {
        tensor.name for tensor in plain.tensors if "norm" in tensor.name
    }
    assert read_gguf(weighed / "models/tiny.q8_0.gguf").metadata.get("quantize.imatrix.file") is None
    assert json.loads((weighed / "models/tiny.q8_0.gguf.json").read_text())["origin"]["imatrix"] is None


def test_no_path_of_this_machine_in_any_of_them(weighed: Path) -> None:
    for name in (*BUILT, *MATRICES, *(f"{name}.json" for name in (*BUILT, *MATRICES)), "work/tiny/calibration.json"):
        content = (weighed / name).read_bytes()
        for path in (weighed, ROOT, Path.home(), "/tmp"):
            assert str(path).encode() not in content, name


def quantize_with(llama_cpp: LlamaCpp, weighed: Path, quant: str, output: Path, **changes: object) -> dict[str, object]:
    return quantize(llama_cpp, weighed, quant, output, imatrix=weighed / MATRICES[0], **changes)


@pytest.mark.parametrize("quant", QUANTIZED_TYPES)
def test_every_type_is_built_with_a_matrix_and_stays_as_it_is(
    quant: str, weighed: Path, llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    """Ollama's server copies a file by llama-quantize's COPY; that must not change its bytes."""
    output = tmp_path / f"tiny.{quant}.gguf"
    manifest = quantize_with(llama_cpp, weighed, quant, output)
    assert copied(llama_cpp, output) == output.read_bytes()
    assert manifest["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert list(read_gguf(output).metadata)[-2:] == ["general.quantization_version", "general.file_type"]


@pytest.mark.parametrize("quant", sorted(IGNORE_IMATRIX & set(QUANTIZED_TYPES)))
def test_types_that_ignore_a_matrix(quant: str, weighed: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """Else leaving the matrix out for them would lose something."""
    quantize_with(llama_cpp, weighed, quant, tmp_path / "with.gguf")
    command = [llama_cpp.tool("llama-quantize"), weighed / "models/tiny.f16.gguf", tmp_path / "without.gguf", quant]
    subprocess.run(command, capture_output=True, check=True)
    one, other = (GGUFReader(tmp_path / name).tensors for name in ("with.gguf", "without.gguf"))
    assert [tensor.data.tobytes() for tensor in one] == [tensor.data.tobytes() for tensor in other]


@pytest.mark.parametrize("quant", sorted(set(QUANTIZED_TYPES) - NEED_IMATRIX - IGNORE_IMATRIX))
def test_types_that_profit_from_a_matrix(quant: str, weighed: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    quantize_with(llama_cpp, weighed, quant, tmp_path / "with.gguf")
    command = [llama_cpp.tool("llama-quantize"), weighed / "models/tiny.f16.gguf", tmp_path / "without.gguf", quant]
    subprocess.run(command, capture_output=True, check=True)
    one, other = (GGUFReader(tmp_path / name).tensors for name in ("with.gguf", "without.gguf"))
    assert [tensor.data.tobytes() for tensor in one] != [tensor.data.tobytes() for tensor in other]


def test_other_folders_names_and_threads_give_the_same_bytes(
    weighed: Path, llama_cpp: LlamaCpp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [hashlib.sha256((weighed / name).read_bytes()).hexdigest() for name in (MATRICES[0], BUILT[1])]
    for threads, name in ((1, "別の folder"), (3, "third")):
        folder = tmp_path / name
        folder.mkdir()
        for suffix in ("", ".json"):
            shutil.copyfile(weighed / f"models/tiny.f16.gguf{suffix}", folder / f"source.gguf{suffix}")
        shutil.copyfile(weighed / "read.txt", folder / f"{name}.text")
        monkeypatch.chdir(folder)
        matrix = compute_imatrix(
            source=Path("source.gguf"),
            text=Path(f"{name}.text"),
            chunks=CHUNKS,
            output=Path("matrix.gguf"),
            llama_cpp=llama_cpp,
            threads=threads,
        )
        quantized = quantize_gguf(
            source=Path("source.gguf"),
            quant="iq2_xs",
            tensor_types=MIXTURE,
            imatrix=Path("matrix.gguf"),
            output=Path("low.gguf"),
            llama_cpp=llama_cpp,
            threads=threads,
        )
        assert [matrix["sha256"], quantized["sha256"]] == expected, name


def test_single_tensors_of_a_type_that_needs_a_matrix(weighed: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    quantize_with(llama_cpp, weighed, "q8_0", output, tensor_type={"ffn_up": "iq2_xxs"})
    assert count_types(read_gguf(output)) == {"F32": 5, "IQ2_XXS": 2, "Q8_0": 14}
    assert copied(llama_cpp, output) == output.read_bytes()


def test_a_pure_type_with_a_matrix(weighed: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    kept = {"token_embedding_type": "q8_0", "output_tensor_type": "q6_k"}
    quantize_with(llama_cpp, weighed, "iq2_xs", tmp_path / "out.gguf", pure=True, **kept)
    assert count_types(read_gguf(tmp_path / "out.gguf")) == {"F32": 5, "IQ2_XS": 14, "Q6_K": 1, "Q8_0": 1}


def test_a_text_with_too_few_tokens_is_refused_at_once(weighed: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """Its bytes would do; only the model's tokenizer can tell."""
    text = tmp_path / "short.txt"
    text.write_text("Snakemake builds it. " * 60)
    with pytest.raises(CalibrationError, match=r"short\.txt is too short: \d+ tokens, and 1024 \(two chunks of 512\)"):
        compute_imatrix(
            source=weighed / "models/tiny.f16.gguf",
            text=text,
            chunks=1,
            output=tmp_path / "out.gguf",
            llama_cpp=llama_cpp,
            threads=2,
        )
    assert list(tmp_path.iterdir()) == [text]


def test_a_text_with_fewer_chunks_than_asked_for(weighed: Path, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    manifest = compute_imatrix(
        source=weighed / "models/tiny.f16.gguf",
        text=weighed / "read.txt",
        chunks=1000,
        output=tmp_path / "out.gguf",
        llama_cpp=llama_cpp,
        threads=2,
    )
    used = manifest["origin"]["chunks"]
    assert CHUNKS < used < 100
    assert read_gguf(tmp_path / "out.gguf").metadata.get("imatrix.chunk_count") == used


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--quant", "iq2_xs"], "iq2_xs needs an importance matrix; give it with --imatrix"),
        (["--quant", "iq2_xs", "--imatrix", "m.gguf", "--pure"], "--pure: iq2_xs cannot hold tensors"),
    ],
)
def test_wrong_options_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts/quantize_gguf.py", "--source", "x.gguf", "--output", "y.gguf", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


# The rebuild table of a project with a matrix; q8_0 makes no use of one.
COMPUTED = {("compute_imatrix", name) for name in MATRICES}
QUANTIZED = {("quantize_gguf", name) for name in BUILT}
USING = QUANTIZED - {("quantize_gguf", "models/tiny.q8_0.gguf")}


def change_the_text(project: Path, checkout: Path) -> None:
    text = (project / "read.txt").read_text(encoding="utf-8")
    (project / "read.txt").write_text(text.replace("Two", "Ten", 1), encoding="utf-8")


TABLE: dict[str, tuple[Callable[[Path, Path], None], set[tuple[str, str]]]] = {
    "a word of the text": (
        change_the_text,
        {("check_calibration", "work/tiny/calibration.json"), *COMPUTED, *USING},
    ),
    "the text's time": (lambda project, checkout: os.utime(project / "read.txt"), set()),
    "the number of chunks": (
        set_in_config("models", "tiny", "quantize", "imatrix", "chunks", value=2),
        COMPUTED | USING,
    ),
    "the types of single tensors": (
        set_in_config("models", "tiny", "quantize", "tensor_type", value={"attn_v": "q8_0"}),
        QUANTIZED,
    ),
    "one more type": (
        set_in_config("models", "tiny", "quantize", "types", value=["q4_k_m", "iq2_xs", "q8_0", "iq1_s"]),
        set(),
    ),
}


@pytest.mark.parametrize("edited", TABLE)
def test_edit_reruns_exactly(edited: str, weighed: Path, tmp_path: Path) -> None:
    edit, expected = TABLE[edited]
    project, checkout = copy_built(weighed, tmp_path / "copy")
    edit(project, checkout)
    assert plan(project, checkout, *BUILT) == expected


def test_without_the_matrix_q8_0_stays_and_iq2_xs_is_refused(weighed: Path, tmp_path: Path) -> None:
    project, checkout = copy_built(weighed, tmp_path / "copy")
    set_in_config("models", "tiny", "quantize", value={"types": ["q4_k_m"]})(project, checkout)
    assert plan(project, checkout, "models/tiny.q8_0.gguf") == set()
    assert plan(project, checkout, "models/tiny.q4_k_m.gguf") == {("quantize_gguf", "models/tiny.q4_k_m.gguf")}
    done = run_snakemake(project, "-n", "models/tiny.iq1_s.gguf", checkout=checkout)
    assert done.returncode == 1
    assert "iq1_s needs an importance matrix; set models.tiny.quantize.imatrix.text" in done.stderr + done.stdout
