"""Build quantized GGUF files straight from base and adapter, without merged checkpoint or 16-bit file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from convert_gguf import convert_gguf
from merge_adapter import merge_adapter
from quantize_gguf import quantize_gguf

from lib.cli import UsageError, run_script, script_parser
from lib.console import say
from lib.gguf_file import GgufFile, check_same_tensors, count_types, read_gguf
from lib.imatrix import Imatrix, identify_imatrix, read_imatrix
from lib.llama_cpp import LlamaCpp, add_llama_cpp_options, llama_cpp_from
from lib.locks import only_writer
from lib.manifest import write_file_manifest
from lib.merge import Overflows, demand_device
from lib.merge_inputs import add_merge_inputs, read_merge
from lib.options import add_settings
from lib.outputs import finished_file, scratch_folder
from lib.provenance import gguf_metadata
from lib.quant_types import QUANTIZED_TYPES, source_type
from lib.quantize_options import add_quantize_options, tensor_types_from
from lib.quantized_gguf import plan_quantized
from lib.skeleton import UnstreamedError, make_skeleton, started_converter
from lib.tensor_types import TensorTypes, quantizer_options, refuse_unmatched
from lib.typed import plain

if TYPE_CHECKING:
    from lib.direct import Target
    from lib.skeleton import Skeleton

PLACE = "{quant}"
SHARD_MB = 5000  # of a merged checkpoint that is not kept


@dataclass(frozen=True)
class Build:
    """
    What is built of what.

    Attributes:
        base, adapter: folders of a checkpoint and of a LoRA in peft's format; without one, the base as it is.
        base_manifest, adapter_manifest: their manifests, where these are not in the folders themselves.
        artifact: what is quantized: "merged", or "base", which is not merged but converted from what it is.
        name: the model's, for general.name.
        dtype, base_weights: of the merge, as for merge_adapter.py.
        tensor_types, imatrix: of the quantization, as for quantize_gguf.py.
        device: cpu or cuda, or auto for a GPU if there is one; the result does not depend on it.
        outputs: by llama.cpp's type in lower case.
        threads: the result does not depend on them.
    """

    base: Path
    base_manifest: Path | None
    adapter: Path | None
    adapter_manifest: Path | None
    artifact: str
    name: str
    dtype: str
    base_weights: str
    tensor_types: TensorTypes
    imatrix: Path | None
    device: str
    outputs: Mapping[str, Path]
    llama_cpp: LlamaCpp
    threads: int

    @property
    def first(self) -> Path:
        """The output beside which temporary files lie."""
        return next(iter(self.outputs.values()))


def build_direct(build: Build) -> list[dict[str, Any]]:
    """
    Write the outputs and their manifests: the bytes that merging, converting and quantizing give, in one pass.

    Returns:
        The manifests, in the order of the outputs.

    Raises:
        CheckpointError, LoraError, FourBitError, MergeError, SkeletonError, GgmlError, GgufError: see the modules.
        UnstreamedError: an architecture that this cannot do; `build_staged` can.
        TensorTypeError: a pattern of the tensor types matches no tensor.
        ProgramError: llama.cpp's converter or llama-quantize refused.
    """
    with ExitStack() as stack:
        converter = stack.enter_context(started_converter(build.llama_cpp))
        # Behind the start of the converter, since torch takes as long to import as that does.
        from lib.direct import write_quantized
        from lib.ggml import Ggml

        device = _device(build)
        merged = build.artifact == "merged"
        rounded, outtype = build.dtype if merged else "float32", source_type(build.dtype)
        merge = read_merge(
            base=build.base,
            base_manifest=build.base_manifest,
            adapter=build.adapter,
            adapter_manifest=build.adapter_manifest,
            dtype=build.dtype,
            base_weights=build.base_weights,
            threads=build.threads,
        )
        source = {"digest": None, "origin": merge.origin} if merged else merge.origin["base"]
        overflows = Overflows("bfloat16" if outtype == "bf16" else "float16")
        matrix = None if build.imatrix is None else read_imatrix(build.imatrix)
        links = dict(merge.origin) if merged else {"base": merge.origin["base"]}
        links["imatrix"] = None if build.imatrix is None else identify_imatrix(build.imatrix)
        types, tuned_by = ", ".join(quant.upper() for quant in build.outputs), build.adapter or "no adapter"
        say(f"building {types} from {build.base} and {tuned_by} on {build.threads} threads, {device}")
        # Compiling its loops and starting a GPU take as long as the converter does.
        ggml = stack.enter_context(ThreadPoolExecutor(1)).submit(Ggml, build.llama_cpp, device=device)
        partials = [stack.enter_context(finished_file(output)) for output in build.outputs.values()]
        skeleton = make_skeleton(
            stack.enter_context(scratch_folder(build.first.with_name(f".{build.first.name}.skeleton"))),
            merge.tensors,
            base=build.base,
            config=merge.config,
            dtype=rounded,
            outtype=outtype,
            metadata=gguf_metadata(
                source, artifact=build.artifact, name=build.name, llama_cpp_commit=build.llama_cpp.commit
            ),
            converter=converter,
            overflows=overflows,
        )
        facts = write_quantized(
            skeleton,
            _targets(build, skeleton, partials, matrix),
            ggml=ggml.result(),
            dtype=rounded,
            overflows=overflows,
            threads=build.threads,
            device=device,
        )
        overflows.check()
        made = [read_gguf(partial) for partial in partials]
        for file in made:
            check_same_tensors(file, skeleton.file)
    finished = zip(build.outputs, facts, made, strict=True)
    return [_describe(build, quant, each, file, links) for quant, each, file in finished]


def build_staged(build: Build) -> None:
    """
    Write the outputs and their manifests step by step, as for any architecture that llama.cpp knows.

    The merged checkpoint and the 16-bit file lie beside the first output until then. What is raised is what the
    scripts of the steps raise.
    """
    outtype = source_type(build.dtype)
    scratch = build.first.with_name(f".{build.first.name}.staged")
    with only_writer(*build.outputs.values()), scratch_folder(scratch) as folder:
        checkpoint, manifest, source = build.base, build.base_manifest, folder / f"source.{outtype}.gguf"
        if build.artifact == "merged":
            checkpoint, manifest = folder / "merged", None
            merge_adapter(
                base=build.base,
                base_manifest=build.base_manifest,
                adapter=build.adapter,
                adapter_manifest=build.adapter_manifest,
                dtype=build.dtype,
                base_weights=build.base_weights,
                device=_device(build),
                max_shard_size=SHARD_MB,
                output=checkpoint,
                threads=build.threads,
            )
        convert_gguf(
            checkpoint=checkpoint,
            manifest=manifest,
            artifact=build.artifact,
            name=build.name,
            outtype=outtype,
            output=source,
            llama_cpp=build.llama_cpp,
            threads=build.threads,
        )
        rmtree(folder / "merged", ignore_errors=True)
        for quant, output in build.outputs.items():
            quantize_gguf(
                source=source,
                quant=quant,
                tensor_types=build.tensor_types,
                imatrix=build.imatrix,
                output=output,
                llama_cpp=build.llama_cpp,
                threads=build.threads,
            )


def _device(build: Build) -> str:
    import torch

    demand_device(build.device)
    return build.device if build.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _targets(build: Build, skeleton: Skeleton, paths: Sequence[Path], matrix: Imatrix | None) -> list[Target]:
    """Each file's plan, with the importance of each tensor that has one."""
    import torch

    from lib.direct import Target

    names = [tensor.name for tensor in skeleton.file.tensors]
    refuse_unmatched(build.tensor_types.tensor_type, names=names, source=str(build.base))
    importance = {name: torch.from_numpy(values) for name, values in (matrix.importance if matrix else {}).items()}
    plans = (
        plan_quantized(
            skeleton.file,
            quant,
            options=quantizer_options(build.tensor_types),
            imatrix=build.imatrix,
            added=matrix.metadata if matrix else {},
            llama_cpp=build.llama_cpp,
        )
        for quant in build.outputs
    )
    return [Target(plan, path, importance) for plan, path in zip(plans, paths, strict=True)]


def _describe(
    build: Build, quant: str, facts: dict[str, Any], file: GgufFile, links: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the manifest of a finished file."""
    output = build.outputs[quant]
    say(f"wrote {output}: {facts['size'] / 1e6:.0f} MB, tensors {count_types(file)}")
    made_by = {"llama_cpp": build.llama_cpp.commit, "type": quant, "tensor_types": plain(build.tensor_types)}
    return write_file_manifest(output, facts=facts, origin={**links, **made_by})


def _outputs(template: str, quants: Sequence[str]) -> dict[str, Path]:
    if len(set(quants)) > 1 and PLACE not in template:
        raise UsageError(f"--output: several types need {PLACE} in the name, as in model.{PLACE}.gguf")
    return {quant: Path(template.replace(PLACE, quant)) for quant in quants}


def _work(arguments: argparse.Namespace) -> None:
    if arguments.artifact == "base" and arguments.adapter:
        raise UsageError("--artifact base: a base has no adapter")
    build = Build(
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
        device=arguments.device,
        outputs=_outputs(str(arguments.output), arguments.quant),
        llama_cpp=llama_cpp_from(arguments),
        threads=arguments.threads,
    )
    try:
        build_direct(build)
    except UnstreamedError as error:
        if arguments.path == "direct":
            raise UnstreamedError(f"{error}; set quantize.path: auto, or staged") from error
        say(f"{error}; merging, converting and quantizing one after the other instead, with 16-bit copies in between")
        build_staged(build)


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
    parser.add_argument(
        "--path",
        choices=["auto", "direct"],
        default="auto",
        help="whether an architecture that cannot be streamed is built step by step, or refused",
    )
    add_settings(parser, "merge", without=("device", "max_shard_size"))
    add_quantize_options(parser)
    add_llama_cpp_options(parser)
    run_script(parser, _work, outputs=lambda given: _outputs(str(given.output), given.quant).values())


if __name__ == "__main__":
    main()
