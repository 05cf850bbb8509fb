"""The direct path: the same bytes as merging, converting and quantizing, one after another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from build_direct import build_direct
from convert_gguf import convert_gguf
from merge_adapter import merge_adapter
from peft import LoraConfig, get_peft_model
from quantize_gguf import quantize_gguf
from test_architectures import MODELS
from test_quantize_gguf import MIXTURE
from transformers import AutoModelForCausalLM

from lib.llama_cpp import LlamaCpp

pytestmark = pytest.mark.slow

# Wide enough for k-quants, except where rows do not fill a block and llama.cpp takes another type.
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module", params=MODELS)
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


def staged(
    folder: Path,
    quants: list[str],
    llama_cpp: LlamaCpp,
    *,
    dtype: str = "float16",
    imatrix: Path | None = None,
    **tensor_types: Any,
) -> dict[str, bytes]:
    """What merging, converting and quantizing make of base and adapter, by type."""
    outtype = "bf16" if dtype == "bfloat16" else "f16"
    merged, source = folder / f"merged-{dtype}", folder / f"model-{dtype}.{outtype}.gguf"
    if not source.is_file():
        merge_adapter(
            base=folder / "base",
            base_manifest=None,
            adapter=folder / "adapter",
            adapter_manifest=None,
            dtype=dtype,
            max_shard_size=20,
            output=merged,
            threads=2,
        )
        convert_gguf(
            checkpoint=merged,
            manifest=None,
            artifact="merged",
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
    **tensor_types: Any,
) -> dict[str, bytes]:
    """What the direct path makes of them."""
    outputs = {quant: folder / f"direct.{quant}.gguf" for quant in quants}
    build_direct(
        base=folder / "base",
        base_manifest=None,
        adapter=folder / "adapter",
        adapter_manifest=None,
        name="model",
        dtype=dtype,
        base_weights="original",
        tensor_types=dataclasses.replace(MIXTURE, **tensor_types),
        imatrix=imatrix,
        device="cpu",
        outputs=outputs,
        llama_cpp=llama_cpp,
        threads=threads,
    )
    made = {quant: output.read_bytes() for quant, output in outputs.items()}
    for output in outputs.values():
        output.unlink()
        output.with_name(f"{output.name}.json").unlink()
    return made


def test_every_architecture_has_the_bytes_of_the_staged_path(model: Path, llama_cpp: LlamaCpp) -> None:
    quants = ["q4_k_m", "q5_k_m", "q8_0"]
    assert directly(model, quants, llama_cpp) == staged(model, quants, llama_cpp)
    assert not list(model.glob("direct.*")) and not list(model.glob(".direct*"))
