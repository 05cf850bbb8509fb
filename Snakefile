from snakemake.utils import min_version

min_version("9.0")


include: "rules/common.smk"


rule all:
    """Default GGUF and Modelfile of every model in config.yaml, ONNX file and evaluation of every heatmap model."""
    input:
        final_targets(),
    localrule: True
    resources:
        mem_mb=1,
        disk_mb=1,
        runtime=1,
        gpu=0,
        gpu_mem_mb=0,


include: "rules/preflight.smk"
include: "rules/llama_cpp.smk"
include: "rules/base.smk"
include: "rules/adapter.smk"
include: "rules/merged.smk"
include: "rules/gguf.smk"
include: "rules/imatrix.smk"
include: "rules/modelfile.smk"
include: "rules/ollama.smk"
include: "rules/heatmap.smk"
include: "rules/quality.smk"
include: "rules/reports.smk"
include: "rules/wrong_targets.smk"
include: "rules/cluster.smk"
include: "rules/before_start.smk"


onstart:
    check_before_start()
