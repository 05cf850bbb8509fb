# In: a merged checkpoint, or a base (`.base`). Out: models/{model}{base}.{type}.gguf with its manifest beside it.


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
