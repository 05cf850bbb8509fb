"""Build quantized GGUF files straight from base and adapter, without merged checkpoint or 16-bit file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli import UsageError, run_script, script_parser
from lib.console import say
from lib.gguf_file import check_same_tensors, count_types, read_gguf
from lib.imatrix import Imatrix, identify_imatrix, read_imatrix
from lib.llama_cpp import LlamaCpp, add_llama_cpp_options, llama_cpp_from
from lib.manifest import write_file_manifest
from lib.merge import Overflows, demand_device
from lib.merge_inputs import add_merge_inputs, read_merge
from lib.options import add_settings
from lib.outputs import finished_file, scratch_folder
from lib.provenance import gguf_metadata
from lib.quant_types import QUANTIZED_TYPES, source_type
from lib.quantize_options import add_quantize_options, tensor_types_from
from lib.quantized_gguf import plan_quantized
from lib.tensor_types import TensorTypes, quantizer_options, refuse_unmatched
from lib.typed import plain

if TYPE_CHECKING:
    from lib.direct import Target
    from lib.skeleton import Skeleton

PLACE = "{quant}"


def build_direct(
    *,
    base: Path,
    base_manifest: Path | None,
    adapter: Path | None,
    adapter_manifest: Path | None,
    artifact: str,
    name: str,
    dtype: str,
    base_weights: str,
    tensor_types: TensorTypes,
    imatrix: Path | None,
    device: str,
    outputs: Mapping[str, Path],
    llama_cpp: LlamaCpp,
    threads: int,
) -> list[dict[str, Any]]:
    """
    Write `outputs` and their manifests: the bytes that merging, converting and quantizing give, in one pass.

    Args:
        base, adapter: folders of a checkpoint and of a LoRA in peft's format; without one, the base as it is.
        base_manifest, adapter_manifest: their manifests, where these are not in the folders themselves.
        artifact: what is quantized: "merged", or "base", which is not merged but converted from what it is.
        name: the model's, for general.name.
        dtype, base_weights: of the merge, as for merge_adapter.py.
        tensor_types, imatrix: of the quantization, as for quantize_gguf.py.
        device: cpu or cuda; the result does not depend on it.
        outputs: by llama.cpp's type in lower case.
        threads: the result does not depend on them.

    Returns:
        The manifests, in the order of `outputs`.

    Raises:
        CheckpointError, LoraError, FourBitError, MergeError, SkeletonError, GgmlError, GgufError: see the modules.
        TensorTypeError: a pattern of `tensor_types` matches no tensor.
        ProgramError: llama.cpp's converter or llama-quantize refused.
    """
    from lib.direct import write_quantized
    from lib.ggml import Ggml
    from lib.skeleton import make_skeleton

    demand_device(device)
    rounded, outtype = dtype if artifact == "merged" else "float32", source_type(dtype)
    merge = read_merge(
        base=base,
        base_manifest=base_manifest,
        adapter=adapter,
        adapter_manifest=adapter_manifest,
        dtype=dtype,
        base_weights=base_weights,
        threads=threads,
    )
    source = {"digest": None, "origin": merge.origin} if artifact == "merged" else merge.origin["base"]
    links = merge.origin if artifact == "merged" else {"base": merge.origin["base"]}
    overflows = Overflows("bfloat16" if outtype == "bf16" else "float16")
    matrix = None if imatrix is None else read_imatrix(imatrix)
    identity = None if imatrix is None else identify_imatrix(imatrix)
    types = ", ".join(quant.upper() for quant in outputs)
    say(f"building {types} from {base} and {adapter or 'no adapter'} on {threads} threads, {device}")
    with ExitStack() as stack:
        # Compiling its loops and starting a GPU take as long as the converter does.
        ggml = stack.enter_context(ThreadPoolExecutor(1)).submit(Ggml, llama_cpp, device=device)
        partials = [stack.enter_context(finished_file(output)) for output in outputs.values()]
        first = next(iter(outputs.values()))
        skeleton = make_skeleton(
            stack.enter_context(scratch_folder(first.with_name(f".{first.name}.skeleton"))),
            merge.tensors,
            base=base,
            config=merge.config,
            dtype=rounded,
            outtype=outtype,
            metadata=gguf_metadata(source, artifact=artifact, name=name, llama_cpp_commit=llama_cpp.commit),
            llama_cpp=llama_cpp,
            overflows=overflows,
        )
        names = [tensor.name for tensor in skeleton.file.tensors]
        refuse_unmatched(tensor_types.tensor_type, names=names, source=str(base))
        targets = [
            _target(skeleton, quant, partial, tensor_types, imatrix, matrix, llama_cpp=llama_cpp)
            for quant, partial in zip(outputs, partials, strict=True)
        ]
        facts = write_quantized(
            skeleton, targets, ggml=ggml.result(), dtype=rounded, overflows=overflows, threads=threads, device=device
        )
        overflows.check()
        made = [read_gguf(partial) for partial in partials]
        for file in made:
            check_same_tensors(file, skeleton.file)
    manifests = []
    for (quant, output), each, file in zip(outputs.items(), facts, made, strict=True):
        say(f"wrote {output}: {each['size'] / 1e6:.0f} MB, tensors {count_types(file)}")
        made_by = {"llama_cpp": llama_cpp.commit, "type": quant, "tensor_types": plain(tensor_types)}
        origin = {**links, **made_by, "imatrix": identity}
        manifests.append(write_file_manifest(output, facts=each, origin=origin))
    return manifests


def _target(
    skeleton: Skeleton,
    quant: str,
    path: Path,
    tensor_types: TensorTypes,
    imatrix: Path | None,
    matrix: Imatrix | None,
    *,
    llama_cpp: LlamaCpp,
) -> Target:
    """One file's plan, with the importance of each tensor that has one."""
    import torch

    from lib.direct import Target

    plan = plan_quantized(
        skeleton.file,
        quant,
        options=quantizer_options(tensor_types),
        imatrix=imatrix,
        added=matrix.metadata if matrix else {},
        llama_cpp=llama_cpp,
    )
    importance = {name: torch.from_numpy(values) for name, values in (matrix.importance if matrix else {}).items()}
    return Target(plan, path, importance)


def _outputs(template: str, quants: Sequence[str]) -> dict[str, Path]:
    if len(set(quants)) > 1 and PLACE not in template:
        raise UsageError(f"--output: several types need {PLACE} in the name, as in model.{PLACE}.gguf")
    return {quant: Path(template.replace(PLACE, quant)) for quant in quants}


def _device(chosen: str) -> str:
    import torch

    return chosen if chosen != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _work(arguments: argparse.Namespace) -> None:
    if arguments.artifact == "base" and arguments.adapter:
        raise UsageError("--artifact base: a base has no adapter")
    build_direct(
        base=arguments.base,
        base_manifest=arguments.base_manifest,
        adapter=arguments.adapter,
        adapter_manifest=arguments.adapter_manifest,
        artifact=arguments.artifact,
        name=arguments.name,
        dtype=arguments.dtype,
        base_weights=arguments.base_weights,
        tensor_types=tensor_types_from(arguments, quants=arguments.quant),
        imatrix=arguments.imatrix,
        device=_device(arguments.device),
        outputs=_outputs(str(arguments.output), arguments.quant),
        llama_cpp=llama_cpp_from(arguments),
        threads=arguments.threads,
    )


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    add_merge_inputs(parser)
    parser.add_argument(
        "--quant", choices=QUANTIZED_TYPES, required=True, action="append", help="type of the weights; may be repeated"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help=f"the GGUF file; {PLACE} in its name is the type"
    )
    parser.add_argument("--artifact", choices=["merged", "base"], default="merged", help="what is quantized")
    parser.add_argument("--name", default="model", help="name of the model, written into the file")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where it is computed; the bytes are the same"
    )
    add_settings(parser, "merge", without=("device", "max_shard_size"))
    add_quantize_options(parser)
    add_llama_cpp_options(parser)
    run_script(parser, _work)


if __name__ == "__main__":
    main()
