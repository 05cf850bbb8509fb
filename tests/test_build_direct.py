"""The direct path: the same bytes as merging, converting and quantizing, one after another."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers
from build_direct import Build, build_direct
from compute_imatrix import compute_imatrix
from convert_gguf import convert_gguf
from merge_adapter import merge_adapter
from peft import LoraConfig, get_peft_model
from quantize_gguf import quantize_gguf
from safetensors.torch import load_file, save_file
from test_architectures import MODELS, sentencepiece
from test_quantize_gguf import CHOSEN, MIXTURE
from transformers import AutoModelForCausalLM

from lib import direct
from lib.direct import closed_blocks
from lib.llama_cpp import LlamaCpp
from lib.merge import MergeError
from lib.quant_types import BUILDABLE_TYPES, QUANTIZED_TYPES
from lib.skeleton import Matrix

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]

# Wide enough for k-quants, except where rows do not fill a block and llama.cpp takes another type.
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


# Mistral's conversion is Llama's.
@pytest.fixture(scope="module", params=[name for name in MODELS if name != "mistral"])
def model(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random base in bfloat16 and an adapter for it, of one architecture after another."""
    name, write, options = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "base").mkdir()
    vocabulary = write(tiny_base, folder / "base")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **{"tie_word_embeddings": False, **SIZES, **options}, vocab_size=vocabulary
    )
    base = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16)
    base.save_pretrained(folder / "base", max_shard_size="20MB")
    return write_adapter(folder, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))


def write_adapter(folder: Path, config: LoraConfig) -> Path:
    torch.manual_seed(1)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tuned.save_pretrained(folder / "adapter")
    return folder


def adapter_of(folder: Path) -> Path | None:
    """The adapter that was written for a base, if there is one."""
    return folder / "adapter" if (folder / "adapter").is_dir() else None


def staged(
    folder: Path,
    quants: list[str],
    llama_cpp: LlamaCpp,
    *,
    dtype: str = "float16",
    imatrix: Path | None = None,
    artifact: str = "merged",
    **tensor_types: Any,
) -> dict[str, bytes]:
    """What merging, converting and quantizing make of base and adapter, by type."""
    outtype = "bf16" if dtype == "bfloat16" else "f16"
    merged, source = folder / f"merged-{dtype}", folder / f"{artifact}-{dtype}.{outtype}.gguf"
    if not source.is_file():
        if artifact == "merged":
            merge_adapter(
                base=folder / "base",
                base_manifest=None,
                adapter=adapter_of(folder),
                adapter_manifest=None,
                dtype=dtype,
                max_shard_size=20,
                output=merged,
                threads=2,
            )
        convert_gguf(
            checkpoint=merged if artifact == "merged" else folder / "base",
            manifest=None,
            artifact=artifact,
            name="model",
            outtype=outtype,
            output=source,
            llama_cpp=llama_cpp,
            threads=2,
        )
    made = {}
    for quant in quants:
        output = folder / f"staged.{quant}.gguf"
        quantize_gguf(
            source=source,
            quant=quant,
            tensor_types=dataclasses.replace(MIXTURE, **tensor_types),
            imatrix=imatrix,
            output=output,
            llama_cpp=llama_cpp,
            threads=2,
        )
        made[quant] = output.read_bytes()
        output.unlink()
    return made


def directly(
    folder: Path,
    quants: list[str],
    llama_cpp: LlamaCpp,
    *,
    dtype: str = "float16",
    imatrix: Path | None = None,
    threads: int = 2,
    device: str = "cpu",
    artifact: str = "merged",
    **tensor_types: Any,
) -> dict[str, bytes]:
    """What the direct path makes of them."""
    outputs = {quant: folder / f"direct.{quant}.gguf" for quant in quants}
    build = Build(
        base=folder / "base",
        base_manifest=None,
        adapter=adapter_of(folder) if artifact == "merged" else None,
        adapter_manifest=None,
        artifact=artifact,
        name="model",
        dtype=dtype,
        base_weights="original",
        tensor_types=dataclasses.replace(MIXTURE, **tensor_types),
        imatrix=imatrix,
        device=device,
        outputs=outputs,
        llama_cpp=llama_cpp,
        threads=threads,
    )
    build_direct(build)
    made = {quant: output.read_bytes() for quant, output in outputs.items()}
    for output in outputs.values():
        output.unlink()
        output.with_name(f"{output.name}.json").unlink()
    return made


def test_every_architecture_has_the_bytes_of_the_staged_path(model: Path, llama_cpp: LlamaCpp) -> None:
    # Of a large vocabulary llama-quantize takes its time.
    large = json.loads((model / "base/config.json").read_text())["vocab_size"] > 1000
    quants = ["q4_k_m"] if large else ["q4_k_m", "q5_k_m", "q8_0"]
    assert directly(model, quants, llama_cpp) == staged(model, quants, llama_cpp)
    assert not list(model.glob("direct.*")) and not list(model.glob(".direct*"))


@pytest.fixture(scope="module")
def llama(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer, whose rows are permuted, with an adapter: as small as every type can be had of."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "base").mkdir()
    vocabulary = sentencepiece(tiny_base, folder / "base")
    sizes = {**SIZES, "num_hidden_layers": 1, "intermediate_size": 256, "vocab_size": vocabulary}
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))
    base.to(torch.bfloat16).save_pretrained(folder / "base")
    return write_adapter(folder, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))


@pytest.fixture(scope="module")
def imatrix(llama: Path, llama_cpp: LlamaCpp) -> Path:
    """An importance matrix of the tuned model."""
    staged(llama, [], llama_cpp)
    output = llama / "model.imatrix.gguf"
    compute_imatrix(
        source=llama / "merged-float16.f16.gguf",
        text=tiny.write_text(llama / "text"),
        chunks=3,
        output=output,
        llama_cpp=llama_cpp,
        threads=2,
    )
    return output


def test_every_type_has_the_bytes_of_the_staged_path(llama: Path, llama_cpp: LlamaCpp) -> None:
    found, expected = (way(llama, [*BUILDABLE_TYPES], llama_cpp) for way in (directly, staged))
    assert [name for name in BUILDABLE_TYPES if found[name] != expected[name]] == []


def test_every_type_with_an_importance_matrix(llama: Path, imatrix: Path, llama_cpp: LlamaCpp) -> None:
    found, expected = (way(llama, [*QUANTIZED_TYPES], llama_cpp, imatrix=imatrix) for way in (directly, staged))
    assert [name for name in QUANTIZED_TYPES if found[name] != expected[name]] == []


@pytest.mark.parametrize("chosen", ["leave_output_tensor", "tensor_type", "pure with other tensors"])
def test_types_of_single_tensors(chosen: str, llama: Path, llama_cpp: LlamaCpp) -> None:
    settings = CHOSEN[chosen][0]
    assert directly(llama, ["q4_k_m"], llama_cpp, **settings) == staged(llama, ["q4_k_m"], llama_cpp, **settings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merges_in_another_type(dtype: str, llama: Path, llama_cpp: LlamaCpp) -> None:
    found, expected = (way(llama, ["q4_k_m", "q8_0"], llama_cpp, dtype=dtype) for way in (directly, staged))
    assert found == expected


def test_a_base_keeps_what_a_merge_would_round(llama: Path, tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    """A vector's value below float16's normal ones: of a base it stays, of a model without adapter it is rounded."""
    shutil.copytree(llama / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    weights["model.norm.weight"][0] = 1.234e-6
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    made = {}
    for artifact in ("merged", "base"):
        made[artifact] = directly(tmp_path, ["q4_k_m"], llama_cpp, artifact=artifact)
        assert made[artifact] == staged(tmp_path, ["q4_k_m"], llama_cpp, artifact=artifact)
    assert made["merged"] != made["base"]


def test_neither_threads_nor_blocks_change_a_byte(
    llama: Path, llama_cpp: LlamaCpp, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = directly(llama, ["q4_k_m"], llama_cpp, threads=1)
    monkeypatch.setattr(direct, "BLOCK_VALUES", {"cpu": 1000})
    assert directly(llama, ["q4_k_m"], llama_cpp, threads=5) == expected


def test_blocks_hold_the_rows_that_change_places() -> None:
    tensor = SimpleNamespace(rows=12, row_values=10)
    order = (1, 0, 2, 5, 4, 3, 6, 7, 9, 8, 11, 10)
    assert [*closed_blocks(Matrix(tensor, None), 45)] == [(0, 4), (4, 8), (8, 12)]
    assert [*closed_blocks(Matrix(tensor, None), 1)] == [(row, row + 1) for row in range(12)]
    assert [*closed_blocks(Matrix(tensor, order), 1)] == [(0, 2), (2, 3), (3, 6), (6, 7), (7, 8), (8, 10), (10, 12)]
    assert [*closed_blocks(Matrix(tensor, order), 45)] == [(0, 3), (3, 7), (7, 10), (10, 12)]
    assert [*closed_blocks(Matrix(tensor, (*range(1, 12), 0)), 45)] == [(0, 12)]


def test_experts_are_built_step_by_step(tiny_base: Path, tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    (tmp_path / "base").mkdir()
    sentencepiece(tiny_base, tmp_path / "base")
    config = transformers.MixtralConfig(**SIZES, vocab_size=384, num_local_experts=2, tie_word_embeddings=False)
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    write_adapter(tmp_path, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    command = [sys.executable, ROOT / "scripts/build_direct.py", "--base", tmp_path / "base", "--name=model"]
    command += ["--adapter", tmp_path / "adapter", "--quant=q8_0", "--quant=q4_k_m", "--threads=2"]
    command += ["--output", tmp_path / "out/direct.{quant}.gguf"]
    refused = subprocess.run([*command, "--path=direct"], capture_output=True, text=True)
    assert refused.returncode == 1
    (said,) = [line for line in refused.stderr.splitlines() if line.startswith("build_direct.py: ")]
    assert re.search(r"LlamaModel cannot be streamed: model\.layers\.0\..*experts.* is put together", said)
    assert said.endswith("; set quantize.path: auto, or staged")
    assert [*(tmp_path / "out").iterdir()] == []

    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "one after the other instead" in built.stderr
    names = [f"direct.{quant}.gguf{end}" for quant in ("q8_0", "q4_k_m") for end in ("", ".json")]
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    for quant, expected in staged(tmp_path, ["q8_0", "q4_k_m"], llama_cpp).items():
        assert (tmp_path / f"out/direct.{quant}.gguf").read_bytes() == expected
    verified = subprocess.run(
        [sys.executable, ROOT / "scripts/verify.py", tmp_path / "out/direct.q4_k_m.gguf"],
        capture_output=True,
        text=True,
    )
    assert verified.returncode == 0, verified.stderr


def test_values_beyond_float16_are_told(llama: Path, tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    shutil.copytree(llama / "base", tmp_path / "base")
    shutil.copytree(llama / "adapter", tmp_path / "adapter")
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    name = next(name for name in factors if "layers.0.mlp.up_proj.lora_B" in name)
    factors[name][3] = 1e6
    save_file(factors, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(MergeError, match=r"set merge\.dtype: bfloat16:\n  model\.layers\.0\.mlp\.up_proj\.weight: "):
        directly(tmp_path, ["q4_k_m"], llama_cpp)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    assert directly(tmp_path, ["q4_k_m"], llama_cpp, dtype="bfloat16") == staged(
        tmp_path, ["q4_k_m"], llama_cpp, dtype="bfloat16"
    )
