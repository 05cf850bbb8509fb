"""Export a merged heatmap model as an ONNX file that onnxruntime computes as torch does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lib.cli import run_script, script_parser
from lib.console import say
from lib.manifest import describe_file, identify_folder, write_file_manifest
from lib.outputs import finished_file


def export_model(*, model: Path, output: Path, threads: int) -> dict[str, Any]:
    """
    Write `output` and its manifest.

    Args:
        model: folder of the merged model.
        output: the ONNX file; it appears only when it was compared with the model.
        threads: of the comparison.

    Returns:
        The manifest of the file.

    Raises:
        HeatmapError: there is no such model.
        OnnxError: see lib.onnx_export.
    """
    import torch

    from lib.heatmap_folder import CONFIG, MERGED, load_heatmap
    from lib.onnx_export import export_onnx

    torch.set_num_threads(threads)
    loaded = load_heatmap(model)
    source = identify_folder(model, None, artifact="merged", names=lambda _: [CONFIG, MERGED], threads=threads)
    say(f"exporting {model}")
    with finished_file(output) as partial:
        made_by = export_onnx(loaded, partial, threads=threads)
        facts = describe_file(partial)
    parity = made_by["parity"]
    say(
        f"wrote {output}: {facts['size'] / 1e6:.1f} MB, opset {made_by['opset']}; onnxruntime and torch differ by "
        f"{parity['largest_difference_at_most']:g} at most ({', '.join(parity['inputs'])})"
    )
    return write_file_manifest(output, artifact="onnx", facts=facts, origin={"merged": source, **made_by})


def main() -> None:
    """The command line."""
    parser = script_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="merged heatmap model")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the ONNX file")

    def work(arguments: argparse.Namespace) -> None:
        export_model(model=arguments.model, output=arguments.output, threads=arguments.threads)

    run_script(parser, work)


if __name__ == "__main__":
    main()
