# In: a GGUF file. Out: models/{model}.Modelfile for the default type, models/{model}.{quant}.Modelfile for any.


rule render_modelfile:
    """Write the Ollama Modelfile of a GGUF."""
    input:
        manifest=lambda w: modelfile_gguf(w) + ".json",
        gguf=lambda w: ancient(modelfile_gguf(w)),
    output:
        modelfile="models/{model}{suffix}.Modelfile",
    log:
        "logs/{model}/render_modelfile{suffix}.log",
    benchmark:
        "logs/{model}/render_modelfile{suffix}.jsonl"
    conda:
        "../envs/llama_cpp.yaml"
    threads: 1
    resources:
        mem_mb=estimate.small_needs().mem_mb,
        disk_mb=estimate.small_needs().disk_mb,
        runtime=estimate.small_needs().runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("render_modelfile.py"),
        code=code_digest("render_modelfile.py"),
        system=lambda w: (shlex.join([f"--system={text}"]) if (text := spec(w.model).ollama.system) is not None else ""),
        parameters=lambda w: json.dumps(dict(spec(w.model).ollama.parameters), ensure_ascii=False, sort_keys=True),
    shell:
        "{params.python} {params.script:q}"
        " --gguf {input.gguf:q}"
        " {params.system}"
        " --parameters {params.parameters:q}"
        " --output {output.modelfile:q}"
        " --log {log:q}"
