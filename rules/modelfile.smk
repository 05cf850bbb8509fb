# In: a GGUF file, the base's tokenizer. Out: models/{model}.Modelfile for the default type, models/{model}.{quant}.Modelfile
# for any, models/{model}.adapter.Modelfile for the base with the adapter beside it, and what the chat template writes of
# some conversations.


rule render_modelfile:
    """Write the Ollama Modelfile of a GGUF, and check that it is talked to as it was trained."""
    input:
        base="bases/{model}/MANIFEST.json",
        llama_cpp="work/llama_cpp.json",
        manifest=lambda w: modelfile_gguf(w) + ".json",
        gguf=lambda w: ancient(modelfile_gguf(w)),
        adapter_manifest=lambda w: [f"{file}.json" for file in modelfile_adapter(w)],
        adapter=lambda w: ancient(modelfile_adapter(w)),
    output:
        modelfile="models/{model}{suffix}.Modelfile",
        report="reports/{model}{suffix}.chat.json",
    log:
        "logs/{model}/render_modelfile{suffix}.log",
    benchmark:
        "logs/{model}/render_modelfile{suffix}.jsonl"
    wildcard_constraints:
        model=model_names(PROJECT, without=[rf"({'|'.join(UNADAPTED) or '(?!)'})\.adapter\."]),
    conda:
        "../envs/llama_cpp.yaml"
    threads: 1
    resources:
        mem_mb=lambda w: estimate.modelfile_needs(spec(w.model)).mem_mb,
        disk_mb=lambda w: estimate.modelfile_needs(spec(w.model)).disk_mb,
        runtime=lambda w: estimate.modelfile_needs(spec(w.model)).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("render_modelfile.py"),
        code=code_digest("render_modelfile.py"),
        tokenizer=base_folder,
        adapter=lambda w: shlex.join(f"--adapter={file}" for file in modelfile_adapter(w)),
        system=system_option,
        llama_cpp=llama_cpp_options(),
        messages=ollama_messages,
        parameters=ollama_parameters,
    shell:
        "{params.python} {params.script:q}"
        " --gguf {input.gguf:q}"
        " {params.adapter}"
        " --tokenizer {params.tokenizer:q}"
        " {params.system}"
        " --messages {params.messages:q}"
        " --parameters {params.parameters:q}"
        " --output {output.modelfile:q}"
        " --report {output.report:q}"
        " {params.llama_cpp}"
        " --log {log:q}"
