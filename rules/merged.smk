# In: a base and an adapter, or a base alone. Out: models/{model}/merged, a sharded 16-bit checkpoint.


rule merge_adapter:
    """Fold the adapter into the base checkpoint, tensor by tensor."""
    input:
        base="bases/{model}/MANIFEST.json",
        base_check="work/{model}/base.json",
        adapter=adapter_manifest,
    output:
        manifest="models/{model}/merged/MANIFEST.json",
        files=big(directory("models/{model}/merged")),
    log:
        "logs/{model}/merge_adapter.log",
    benchmark:
        "logs/{model}/merge_adapter.jsonl"
    conda:
        "../envs/train.yaml"
    threads: 8
    resources:
        mem_mb=lambda w: estimate.merge_needs(spec(w.model), THREADS).mem_mb,
        disk_mb=lambda w: estimate.merge_needs(spec(w.model), THREADS).disk_mb,
        runtime=lambda w: estimate.merge_needs(spec(w.model), THREADS).runtime,
        gpu=lambda w: estimate.merge_needs(spec(w.model), THREADS).gpu,
        gpu_mem_mb=lambda w: estimate.merge_needs(spec(w.model), THREADS).gpu_mem_mb,
    params:
        python=on_gpus(lambda w: estimate.merge_needs(spec(w.model), THREADS)),
        script=script("merge_adapter.py"),
        code=code_digest("merge_adapter.py"),
        base=base_folder,
        adapter=lambda w: (f"--adapter adapters/{w.model}" if spec(w.model).adapter else ""),
        dtype=lambda w: spec(w.model).merge.dtype,
        base_weights=lambda w: spec(w.model).merge.base_weights,
        max_shard_size=lambda w: spec(w.model).merge.max_shard_size,
        # By a function of the input, which is not recorded: the bytes are the same on any device.
        device=lambda w, input: spec(w.model).merge.device,
    shell:
        "{params.python} {params.script:q}"
        " --base {params.base:q}"
        " --base-manifest {input.base:q}"
        " {params.adapter}"
        " --dtype {params.dtype}"
        " --base-weights {params.base_weights}"
        " --max-shard-size {params.max_shard_size}"
        " --device {params.device}"
        " --output models/{wildcards.model}/merged"
        " --log {log:q}"
