# In: a merged checkpoint, or a base (`.base`); directly, base and adapter. Out: models/{model}{base}.{type}.gguf with
# its manifest beside it.
DIRECT = [name for name in PROJECT.models if builds_directly(name)]
STAGED = [name for name in PROJECT.models if name not in DIRECT]


rule convert_gguf:
    """Convert a checkpoint to a 16-bit GGUF with llama.cpp's converter."""
    input:
        checkpoint=checkpoint_manifest,
        files=merged_folder,
        llama_cpp="work/llama_cpp.json",
    output:
        gguf=big("models/{model}{base}.{source}.gguf"),
        manifest="models/{model}{base}.{source}.gguf.json",
    log:
        "logs/{model}/convert_gguf{base}.{source}.log",
    benchmark:
        "logs/{model}/convert_gguf{base}.{source}.jsonl"
    conda:
        "../envs/llama_cpp.yaml"
    threads: 1
    resources:
        mem_mb=lambda w: estimate.convert_needs(spec(w.model)).mem_mb,
        disk_mb=lambda w: estimate.convert_needs(spec(w.model)).disk_mb,
        runtime=lambda w: estimate.convert_needs(spec(w.model)).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("convert_gguf.py"),
        code=code_digest("convert_gguf.py"),
        checkpoint=checkpoint_folder,
        artifact=lambda w: "base" if w.base else "merged",
        llama_cpp=llama_cpp_options(),
    shell:
        "{params.python} {params.script:q}"
        " --checkpoint {params.checkpoint:q}"
        " --manifest {input.checkpoint:q}"
        " --artifact {params.artifact}"
        " --name {wildcards.model}{wildcards.base}"
        " --outtype {wildcards.source}"
        " --output {output.gguf:q}"
        " {params.llama_cpp}"
        " --log {log:q}"


rule quantize_gguf:
    """Quantize with llama.cpp's quantizer."""
    input:
        source=lambda w: quantize_source(w) + ".json",
        gguf=lambda w: ancient(quantize_source(w)),
        imatrix=imatrix_manifest,
        imatrix_gguf=imatrix_gguf,
        llama_cpp="work/llama_cpp.json",
    output:
        gguf="models/{model}{base}.{quant}.gguf",
        manifest="models/{model}{base}.{quant}.gguf.json",
    log:
        "logs/{model}/quantize_gguf{base}.{quant}.log",
    benchmark:
        "logs/{model}/quantize_gguf{base}.{quant}.jsonl"
    wildcard_constraints:
        model=model_names(PROJECT, STAGED),
    conda:
        "../envs/llama_cpp.yaml"
    threads: 8
    resources:
        mem_mb=lambda w: estimate.quantize_needs(spec(w.model), w.quant).mem_mb,
        disk_mb=lambda w: estimate.quantize_needs(spec(w.model), w.quant).disk_mb,
        runtime=lambda w: estimate.quantize_needs(spec(w.model), w.quant).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("quantize_gguf.py"),
        code=code_digest("quantize_gguf.py"),
        settings=lambda w: as_options(spec(w.model).quantize.tensor_types),
        imatrix=imatrix_option,
        llama_cpp=llama_cpp_options(),
    shell:
        "{params.python} {params.script:q}"
        " --source {input.gguf:q}"
        " --quant {wildcards.quant}"
        " {params.settings}"
        " {params.imatrix}"
        " --output {output.gguf:q}"
        " {params.llama_cpp}"
        " --log {log:q}"


rule build_direct:
    """Merge, convert and quantize in one pass over the base."""
    input:
        base="bases/{model}/MANIFEST.json",
        base_check=ancient("work/{model}/base.json"),
        adapter=tuned_adapter,
        imatrix=imatrix_manifest,
        imatrix_gguf=imatrix_gguf,
        llama_cpp="work/llama_cpp.json",
    output:
        gguf="models/{model}{base}.{quant}.gguf",
        manifest="models/{model}{base}.{quant}.gguf.json",
    log:
        "logs/{model}/build_direct{base}.{quant}.log",
    benchmark:
        "logs/{model}/build_direct{base}.{quant}.jsonl"
    wildcard_constraints:
        model=model_names(PROJECT, DIRECT),
    conda:
        "../envs/train.yaml"
    threads: 8
    resources:
        mem_mb=lambda w: estimate.direct_needs(spec(w.model), w.quant).mem_mb,
        disk_mb=lambda w: estimate.direct_needs(spec(w.model), w.quant).disk_mb,
        runtime=lambda w: estimate.direct_needs(spec(w.model), w.quant).runtime,
        gpu=lambda w: estimate.direct_needs(spec(w.model), w.quant).gpu,
        gpu_mem_mb=lambda w: estimate.direct_needs(spec(w.model), w.quant).gpu_mem_mb,
    params:
        python=interpreter,
        script=script("build_direct.py"),
        code=code_digest("build_direct.py"),
        base=base_folder,
        adapter=adapter_options,
        artifact=lambda w: "base" if w.base else "merged",
        dtype=lambda w: spec(w.model).merge.dtype,
        base_weights=lambda w: spec(w.model).merge.base_weights,
        settings=lambda w: as_options(spec(w.model).quantize.tensor_types),
        imatrix=imatrix_option,
        llama_cpp=llama_cpp_options(),
        # By a function of the input, which is not recorded: the bytes are the same on any device.
        device=lambda w, input: spec(w.model).merge.device,
    shell:
        "{params.python} {params.script:q}"
        " --base {params.base:q}"
        " --base-manifest {input.base:q}"
        " {params.adapter}"
        " --artifact {params.artifact}"
        " --name {wildcards.model}{wildcards.base}"
        " --dtype {params.dtype}"
        " --base-weights {params.base_weights}"
        " --quant {wildcards.quant}"
        " {params.settings}"
        " {params.imatrix}"
        " --device {params.device}"
        " --output {output.gguf:q}"
        " {params.llama_cpp}"
        " --log {log:q}"
