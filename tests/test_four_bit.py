"""The 4-bit round trip against bitsandbytes' own codes, transformers' own load, and a merge onto it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
import training_runs as runs
from conftest import ROOT
from merge_adapter import merge_adapter
from safetensors.torch import load_file
from test_merge import random, stored, unit_in_last_place

from lib import four_bit as module
from lib.adapter_folder import CONFIG, WEIGHTS, write_adapter
from lib.base_model import load_base
from lib.four_bit import FourBit, FourBitError, block_scales, nearest, read_four_bit, round_trip
from lib.lora import LoraError
from lib.manifest import describe_files, write_folder_manifest
from lib.safetensors_file import StoredTensor, read_rows

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
DOUBLE = pytest.mark.parametrize("double", [True, False], ids=["double", "single"])


def how(*, device: str = "cpu", dtype: str = "bfloat16", double: bool = True, blocksize: int = 64) -> FourBit:
    return FourBit(device, dtype, double, blocksize, layers=1, skipped=())


def read_back(tensor: StoredTensor, asked: FourBit, *, rows: int) -> torch.Tensor:
    """The whole tensor after the round trip, by blocks of rows."""
    scales = block_scales(tensor, asked)
    parts = [
        round_trip(read_rows(tensor, top, min(top + rows, tensor.rows)), top * tensor.row_values, scales, asked)
        for top in range(0, tensor.rows, rows)
    ]
    return torch.cat(parts)


def unpacked(packed: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[:count]


@DOUBLE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 128), (37, 65), (3, 10), (300, 512)], ids=str)
def test_codes_and_values_are_bitsandbytes(shape: tuple[int, int], dtype: str, double: bool, tmp_path: Path) -> None:
    """The largest has 2,400 magnitudes, so that their own quantization has several blocks."""
    asked = how(dtype=dtype, double=double)
    tensor = stored(tmp_path, weight=random(*shape, seed=3) / 30)["weight"]
    loaded = random(*shape, seed=3).div(30).to(DTYPES[dtype])
    packed, state = bitsandbytes.quantize_4bit(loaded, quant_type="nf4", compress_statistics=double)
    scales = block_scales(tensor, asked)
    padded = torch.nn.functional.pad(loaded.float().flatten(), (0, -loaded.numel() % 64)).view(-1, 64)
    codes = nearest(padded, scales.largest, bitsandbytes.get_4bit_type("nf4", device="cpu")).flatten()
    assert torch.equal(codes[: loaded.numel()], unpacked(packed, loaded.numel()).int())
    expected = bitsandbytes.dequantize_4bit(packed, state).double()
    for rows in (1, 5, shape[0]):
        found = read_back(tensor, asked, rows=rows).double()
        assert ((found - expected).abs() <= unit_in_last_place(expected.abs().float(), DTYPES[dtype])).all()
    assert not torch.equal(found.float(), loaded.float())


def test_magnitudes_as_a_gpu_quantizes_them(tmp_path: Path) -> None:
    """The nearest of the 8-bit numbers to each, found by trying all of them; on the CPU bitsandbytes takes others."""
    tensor = stored(tmp_path, weight=random(600, 512, seed=5) / 30)["weight"]
    found = block_scales(tensor, how(device="cuda", dtype="float32"))
    assert torch.equal(found.largest, block_scales(tensor, how(dtype="float32")).largest)
    numbers, centred = (
        bitsandbytes.create_dynamic_map().double(),
        found.largest.double() - found.largest.double().mean(),
    )
    for block, kept in zip(centred.split(256), found.kept.double().split(256), strict=True):
        choices = numbers * block.abs().max()
        best = (block.unsqueeze(1) - choices).abs().min(dim=1).values
        assert ((kept - found.largest.double().mean() - block).abs() - best).abs().max() < 1e-7
    assert not torch.equal(found.kept, block_scales(tensor, how(dtype="float32")).kept)


@pytest.mark.parametrize("blocksize", [32, 128])
def test_another_size_of_blocks(blocksize: int, tmp_path: Path) -> None:
    # Rows of whole blocks: others its dequantization on a CPU cuts into blocks of their own, unlike what it packed.
    weight = random(40, 256, seed=1)
    packed, state = bitsandbytes.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=False)
    asked = how(dtype="float32", double=False, blocksize=blocksize)
    found = read_back(stored(tmp_path, weight=weight)["weight"], asked, rows=7)
    assert torch.equal(found, bitsandbytes.dequantize_4bit(packed, state))


def test_blocks_of_rows_threads_and_parts_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, found = stored(tmp_path, weight=random(200, 130, seed=8))["weight"], set()
    before = torch.get_num_threads()
    try:
        for threads, part in ((1, 1 << 22), (2, 64), (2, 1000)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(module, "READ_VALUES", part)
            found |= {read_back(tensor, how(), rows=rows).numpy().tobytes() for rows in (1, 33, 200)}
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_blocks_of_zeros_stay_zeros(tmp_path: Path) -> None:
    weight = torch.zeros(2, 128)
    weight[1, 3] = 1.5
    found = read_back(stored(tmp_path, weight=weight)["weight"], how(double=False), rows=1)
    assert torch.equal(found, weight)


def adapted(base: Path, folder: Path, *, precision: str, **quantization: Any) -> tuple[Any, Path]:
    """A model of random factors on the 4-bit base, and its adapter as train_adapter.py leaves it."""
    run = runs.settings(method="qlora", precision=precision, quantization=quantization)
    model = runs.adapted(base, run)
    folder.mkdir()
    write_adapter(model, folder, base_name="tiny-llama")
    origin = {"base": None, "four_bit": model.get_base_model().four_bit}
    write_folder_manifest(
        folder, artifact="adapter", files=describe_files(folder, [CONFIG, WEIGHTS], threads=1), origin=origin
    )
    return model, folder


def merge(base: Path, adapter: Path | None, output: Path, **changes: Any) -> dict[str, torch.Tensor]:
    asked = {"dtype": "float16", "base_weights": "nf4", "max_shard_size": 1000, "threads": 2, **changes}
    merge_adapter(base=base, base_manifest=None, adapter=adapter, adapter_manifest=None, output=output, **asked)
    return weights(output)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "quantization",
    [{}, {"bnb_4bit_use_double_quant": False}, {"llm_int8_skip_modules": ["lm_head", "up_proj"]}],
    ids=["double", "single", "skipped"],
)
def test_a_merge_onto_what_transformers_loads(
    quantization: dict[str, Any], precision: str, tiny_base: Path, tmp_path: Path
) -> None:
    model, adapter = adapted(tiny_base, tmp_path / "adapter", precision=precision, **quantization)
    found, original = merge(tiny_base, adapter, tmp_path / "out"), weights(tiny_base)
    held, kept = 0, 0
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        weight = layer.base_layer.weight
        if hasattr(weight, "quant_state"):
            loaded = bitsandbytes.dequantize_4bit(weight.data, weight.quant_state)
            held += 1
        else:
            loaded = weight
            kept += 1
        assert loaded.dtype == DTYPES[PRECISIONS[precision]]
        update = layer.get_delta_weight("default").double()
        expected = loaded.double() + update
        largest = torch.stack([loaded.double().abs(), update.abs(), expected.abs()]).amax(0).float()
        # One unit of the load's dtype from the round trip, and one of the output's from the merge.
        allowed = unit_in_last_place(largest, torch.float16) + unit_in_last_place(largest, loaded.dtype)
        error = (found[f"{name}.weight"].double() - expected).abs()
        assert (error <= allowed).all(), name
        plain = original[f"{name}.weight"].double() + update
        assert hasattr(weight, "quant_state") == ((found[f"{name}.weight"] - plain).abs().max() > 0.005)
    assert (held, kept) == ((12, 2) if "llm_int8_skip_modules" in quantization else (14, 0))
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(found[name], original[name].to(torch.float16))
    manifest = json.loads((tmp_path / "out/MANIFEST.json").read_text())
    assert manifest["origin"]["merge"] == {"base_weights": "nf4", "dtype": "float16"}


def test_threads_change_no_byte(tiny_base: Path, tmp_path: Path) -> None:
    _, adapter = adapted(tiny_base, tmp_path / "adapter", precision="bf16")
    shards = set()
    for threads in (1, 2, 5):
        merge(tiny_base, adapter, tmp_path / f"{threads}", threads=threads)
        shards.add((tmp_path / f"{threads}/model.safetensors").read_bytes())
    assert len(shards) == 1


def test_bitsandbytes_is_there_before_threads_compute(tiny_base: Path, tmp_path: Path) -> None:
    """Once in five merges, on a busy machine, threads that imported it together found torch half imported."""
    _, adapter = adapted(tiny_base, tmp_path / "adapter", precision="bf16")
    asked = {"base": tiny_base, "adapter": adapter, "base_manifest": None, "adapter_manifest": None}
    code = (
        "import sys; from pathlib import PosixPath; from lib.merge_inputs import read_merge; "
        f"read_merge(**{asked}, dtype='float16', base_weights='nf4', threads=1); "
        "print('bitsandbytes.functional' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_the_manifest_says_how_the_base_was_held(tiny_base: Path) -> None:
    run = runs.settings(method="qlora", precision="bf16")
    plain = load_base(tiny_base, run, device_map={"": "cpu"}).four_bit
    assert plain == runs.adapted(tiny_base, run).get_base_model().four_bit
    assert (plain["device"], plain["dtype"], plain["double_quant"]) == ("cpu", "bfloat16", True)
    assert (plain["blocksize"], plain["layers"]) == (64, 14)
    assert set(plain["skipped"]) == {"model.embed_tokens", "lm_head"}
    other = runs.settings(method="qlora", quantization={"bnb_4bit_quant_type": "fp4"})
    for settings in (runs.settings(), runs.settings(method="int8"), other):
        assert load_base(tiny_base, settings, device_map={"": "cpu"}).four_bit is None


@pytest.mark.parametrize("said", [None, {}, {"dtype": "float32"}])
def test_an_adapter_that_does_not_say(said: Any) -> None:
    with pytest.raises(FourBitError, match="does not say how its base was held in NF4"):
        read_four_bit({"origin": {"four_bit": said}})
    with pytest.raises(FourBitError):
        read_four_bit({"origin": None})


def test_without_an_adapter_there_was_no_training(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(FourBitError, match="there is no adapter"):
        merge(tiny_base, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_number_of_layers(tiny_base: Path, tmp_path: Path) -> None:
    _, adapter = adapted(tiny_base, tmp_path / "adapter", precision="bf16")
    manifest = json.loads((adapter / "MANIFEST.json").read_text())
    manifest["origin"]["four_bit"]["layers"] = 15
    (adapter / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(LoraError, match="has 14 matrices that could have been in 4 bits, .* tells of 15 layers"):
        merge(tiny_base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base-weights", "nf4"], "does not say how its base was held in NF4"),
        (["--device", "cuda"], "merge.device is cuda, but torch finds no GPU"),
    ],
)
def test_on_the_command_line(options: list[str], said: str, tiny_base: Path, tmp_path: Path) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(runs.adapted(tiny_base, runs.settings()), adapter, base_name="tiny-llama")
    command = [sys.executable, ROOT / "scripts/merge_adapter.py", "--base", tiny_base, "--adapter", adapter]
    done = subprocess.run([*command, "--output", tmp_path / "out", *options], capture_output=True, text=True)
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
