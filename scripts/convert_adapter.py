"""Convert a LoRA adapter to GGUF with llama.cpp's own converter, for those who keep one base and many adapters."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.adapter_folder import CONFIG, WEIGHTS, write_config
from lib.cli import run_script, script_parser
from lib.console import say
from lib.gguf_file import GgufError, GgufFile, read_gguf
from lib.jsonfile import read_json
from lib.llama_cpp import LlamaCpp, add_llama_cpp_options, llama_cpp_from
from lib.lora import LoraError, LowRank, Update, read_lora
from lib.manifest import describe_file, write_file_manifest
from lib.merge_inputs import read_merge
from lib.origin import LORA
from lib.outputs import finished_file, scratch_beside
from lib.process import run_program

ALPHA = "adapter.lora.alpha"
FACTORS = (".lora_a", ".lora_b")


def convert_adapter(
    *,
    base: Path,
    base_manifest: Path | None,
    adapter: Path,
    adapter_manifest: Path | None,
    name: str,
    output: Path,
    llama_cpp: LlamaCpp,
    threads: int,
) -> dict[str, Any]:
    """
    Write the adapter as GGUF, its factors in float32, and its manifest.

    llama.cpp scales a product by alpha / rank with one alpha for the whole file. Where peft's scales come to that
    (rsLoRA with one rank, patterns of the rank) the file has the alpha that gives them; others are refused.

    Args:
        base: checkpoint that the adapter belongs to.
        base_manifest, adapter_manifest: their manifests, where these are not in the folders themselves.
        adapter: folder in peft's format.
        name: of the model, for general.name.

    Returns:
        The manifest of the file.

    Raises:
        CheckpointError, ManifestError: base or adapter are not whole.
        LoraError: no adapter, one that does not fit the base, or one that is more than low-rank products with a common
            alpha.
        ProgramError: llama.cpp's converter refused it.
        GgufError: what it wrote is not the whole adapter.
    """
    factors, alpha = _common_alpha(read_lora(adapter), where=adapter)
    # As for a merge, which tells an adapter that does not fit.
    held = read_merge(
        base=base,
        base_manifest=base_manifest,
        adapter=adapter,
        adapter_manifest=adapter_manifest,
        dtype="float16",
        base_weights="original",
        threads=threads,
    )
    origin = {role: held.origin[role] for role in ("adapter", "base")}
    say(f"converting {adapter} to GGUF, {len(factors)} pairs of factors, alpha {alpha:g}")
    with finished_file(output) as partial, scratch_beside(output) as folder:
        (folder / "base").mkdir()
        (folder / "adapter").mkdir()
        shutil.copy(base / "config.json", folder / "base")
        os.symlink((adapter / WEIGHTS).absolute(), folder / "adapter" / WEIGHTS)
        told = {**read_json(adapter / CONFIG), "lora_alpha": alpha, "use_rslora": False, "alpha_pattern": {}}
        write_config(told, folder / "adapter", base_name="base")
        command = [sys.executable, llama_cpp.source / "convert_lora_to_gguf.py", folder / "adapter"]
        command += ["--base", folder / "base", "--outfile", folder / "adapter.gguf", "--outtype", "f32"]
        run_program(command, output=output)
        _say_origin(folder / "adapter.gguf", partial, origin, name=name, llama_cpp=llama_cpp)
        _check(read_gguf(partial), pairs=len(factors), alpha=alpha)
        facts = describe_file(partial)
    made_by = {"llama_cpp": llama_cpp.commit, "type": LORA}
    say(f"wrote {output}: {facts['size'] / 1e6:.0f} MB")
    return write_file_manifest(output, facts=facts, origin={**origin, **made_by})


def _common_alpha(updates: Mapping[str, Update], *, where: Path) -> tuple[dict[str, LowRank], float]:
    """
    The products, and the alpha that gives all of them their scale.

    Raises:
        LoraError: listing what a GGUF adapter cannot say.
    """
    factors, problems = {}, []
    for name, update in sorted(updates.items()):
        product = update.low_rank
        if product is None or update != Update(low_rank=product, tied=update.tied):
            problems.append(f"  {name}: more than a product of two factors (whole values, biases or single rows)")
        elif product.magnitude is not None:
            problems.append(f"  {name}: DoRA's magnitudes")
        elif product.transposed:
            problems.append(f"  {name}: an embedding, or a weight that is stored (in, out)")
        else:
            factors[name] = product
    alphas = {name: product.scale * product.a.rows for name, product in factors.items()}
    alpha = next(iter(alphas.values()), 0.0)
    if other := next((name for name, each in alphas.items() if not math.isclose(each, alpha, rel_tol=1e-6)), None):
        first = next(iter(alphas))
        problems.append(
            f"  {first} is scaled as by alpha {alpha:g}, {other} as by {alphas[other]:g}; a GGUF adapter has one alpha"
        )
    if not problems and alpha == 0:
        problems.append("  alpha is 0, which llama.cpp takes for none at all")
    if problems:
        message = f"{where} cannot be an adapter of llama.cpp's; merge it (models/….gguf) instead:"
        raise LoraError("\n".join([message, *problems]))
    return factors, alpha


def _say_origin(source: Path, output: Path, origin: Mapping[str, Any], *, name: str, llama_cpp: LlamaCpp) -> None:
    """Copy a GGUF with what it was made from in its metadata, instead of the names of folders."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys

    read = GGUFReader(source)
    writer = GGUFWriter(output, read.fields[Keys.General.ARCHITECTURE].contents())
    for key, field in read.fields.items():
        if not key.startswith("GGUF.") and key not in (Keys.General.ARCHITECTURE, Keys.General.NAME):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    told = [
        f"LoRA adapter sha256:{origin['adapter']['digest']}",
        f"for the base sha256:{origin['base']['digest']}",
        f"llama.cpp {llama_cpp.commit}",
    ]
    writer.add_key_value(Keys.General.NAME, name, GGUFValueType.STRING)
    writer.add_key_value(Keys.General.DESCRIPTION, "; ".join(told), GGUFValueType.STRING)
    for tensor in read.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(file: GgufFile, *, pairs: int, alpha: float) -> None:
    """
    Raises:
        GgufError: a pair is missing, or the alpha is another one.
    """
    names = {tensor.name for tensor in file.tensors}
    written = {name.removesuffix(end) for name in names for end in FACTORS if name.endswith(end)}
    if names != {name + end for name in written for end in FACTORS} or len(written) != pairs:
        raise GgufError(f"llama.cpp's converter wrote {len(names)} tensors, expected {pairs} pairs of factors")
    if not math.isclose(file.metadata.get(ALPHA, 0.0), alpha, rel_tol=1e-6):
        raise GgufError(f"{ALPHA} is {file.metadata.get(ALPHA)}, expected {alpha:g}")


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="base checkpoint")
    parser.add_argument("--base-manifest", type=Path, metavar="FILE", help="its manifest, if not in that folder")
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="adapter in peft's format")
    parser.add_argument("--adapter-manifest", type=Path, metavar="FILE", help="its manifest, if not in that folder")
    parser.add_argument("--name", default="model", help="name of the model, written into the file")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the GGUF file")
    add_llama_cpp_options(parser)

    def work(arguments: argparse.Namespace) -> None:
        convert_adapter(
            base=arguments.base,
            base_manifest=arguments.base_manifest,
            adapter=arguments.adapter,
            adapter_manifest=arguments.adapter_manifest,
            name=arguments.name,
            output=arguments.output,
            llama_cpp=llama_cpp_from(arguments, tools=()),
            threads=arguments.threads,
        )

    run_script(parser, work)


if __name__ == "__main__":
    main()
