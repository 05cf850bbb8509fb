"""What a conversion writes is finite: a value that 16 bits cannot hold ends it, and nothing has the final name."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_gguf import convert_gguf
from safetensors.torch import load_file, save_file

from lib.checked_converter import BLOCK_BYTES, CheckedTensor, Checker, is_finite
from lib.llama_cpp import LlamaCpp
from lib.process import ProgramError

TENSOR = "model.layers.1.mlp.up_proj.weight"


def with_value(base: Path, folder: Path, value: float) -> Path:
    """A copy of a checkpoint with one value of one tensor changed."""
    copy = shutil.copytree(base, folder)
    shard = next(path for path in sorted(copy.glob("*.safetensors")) if TENSOR in load_file(path))
    tensors = load_file(shard)
    tensors[TENSOR][-1, -1] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    return copy


def convert(checkpoint: Path, output: Path, llama_cpp: LlamaCpp) -> Path:
    convert_gguf(
        checkpoint=checkpoint,
        manifest=None,
        artifact="base",
        name="tiny",
        outtype=output.suffixes[0][1:],
        output=output,
        llama_cpp=llama_cpp,
        threads=1,
    )
    return output


@pytest.mark.parametrize(("value", "outtype"), [(1e6, "f16"), (float("nan"), "f16"), (float("inf"), "bf16")])
def test_a_value_that_is_not_finite_ends_it(
    value: float, outtype: str, tiny_base: Path, tmp_path: Path, llama_cpp: LlamaCpp
) -> None:
    base = with_value(tiny_base, tmp_path / "base", value)
    output = tmp_path / f"tiny.{outtype}.gguf"
    with pytest.raises(ProgramError, match=r"blk\.1\.ffn_up\.weight holds values that are not finite in B?F16"):
        convert(base, output, llama_cpp)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_large_value_fits_bfloat16(tiny_base: Path, tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    base = with_value(tiny_base, tmp_path / "base", 1e6)
    assert convert(base, tmp_path / "tiny.bf16.gguf", llama_cpp).stat().st_size > 1_000_000


KINDS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_which_bit_patterns_are_finite(kind: str) -> None:
    """Every pattern of 16 bits (in the upper half of a float32), each told from its neighbours, as torch tells it."""
    dtype = KINDS[kind]
    bits = torch.arange(1 << 16, dtype=torch.int32)
    values = (bits << 16).view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(dtype)
    data, size = values.view(torch.uint8).numpy().tobytes(), values.element_size()
    found = [is_finite(data[number * size : (number + 1) * size], kind=kind) for number in range(0, 1 << 16, 7)]
    assert found == values[::7].isfinite().tolist()
    assert not all(found) and any(found)


class Written:
    """A file that grows by tensors of float16 with padding between, as the converter's does."""

    def __init__(self, path: Path) -> None:
        self.path, self.checker = path, Checker()
        path.write_bytes(b"GGUF header")

    def add(self, values: np.ndarray, *, kind: str = "F16") -> None:
        with self.path.open("ab") as file:
            CheckedTensor(values, self.checker, name=f"at {file.tell()}", kind=kind).tofile(file)
            file.write(b"\xff" * 6)

    def finish(self) -> dict[str, object]:
        self.checker.finish(self.path.with_suffix(".json"))
        return json.loads(self.path.with_suffix(".json").read_text())


@pytest.mark.parametrize("place", [0, BLOCK_BYTES // 2 - 1, BLOCK_BYTES // 2, BLOCK_BYTES // 2 + 9])
def test_every_block_is_looked_at_and_hashed(place: int, tmp_path: Path) -> None:
    values = np.zeros(BLOCK_BYTES // 2 + 10, dtype=np.float16)
    for value in (65504, np.inf, np.nan):
        values[place] = value
        written = Written(tmp_path / "values")
        written.add(np.ones(5, dtype=np.float16))
        written.add(values)
        if value == 65504:
            written.add(np.full(3, np.nan, dtype=np.float16), kind="I16")  # no numbers of that kind are not finite
            content = written.path.read_bytes()
            assert written.finish() == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            continue
        with pytest.raises(ValueError, match=r"at 27 holds values that are not finite in F16"):
            written.finish()


def test_many_tensors_end_at_the_first_that_is_not_finite(tmp_path: Path) -> None:
    written = Written(tmp_path / "values")
    with pytest.raises(ValueError, match="at 11 holds values"):
        for _ in range(1000):
            written.add(np.full(4, np.inf, dtype=np.float16))
    assert written.path.stat().st_size < 1000


def test_a_beginning_that_is_written_again_is_not_what_was_hashed(tmp_path: Path) -> None:
    written = Written(tmp_path / "values")
    written.add(np.ones(5, dtype=np.float16))
    with written.path.open("r+b") as file:
        file.write(b"gguf")
    with pytest.raises(ValueError, match="changed at its beginning"):
        written.finish()


@pytest.mark.slow
def test_the_manifest_has_the_digest_of_the_file(built: Path) -> None:
    for name in ("tiny.f16.gguf", "tiny.base.f16.gguf"):
        content = (built / "models" / name).read_bytes()
        manifest = json.loads((built / f"models/{name}.json").read_text())
        assert (manifest["size"], manifest["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
