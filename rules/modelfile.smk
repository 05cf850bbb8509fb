# In: a GGUF file, the base's tokenizer. Out: models/{model}.Modelfile for the default type, models/{model}.{quant}.Modelfile
# for any, and what the chat template writes of some conversations.


rule render_modelfile:
    """Write the Ollama Modelfile of a GGUF, and check that it is talked to as it was trained."""
    input:
        base="bases/{model}/MANIFEST.json",
        llama_cpp="work/llama_cpp.json",
        manifest=lambda w: modelfile_gguf(w) + ".json",
        gguf=lambda w: ancient(modelfile_gguf(w)),
    output:
        modelfile="models/{model}{suffix}.Modelfile",
        report="reports/{model}{suffix}.chat.json",
    log:
        "logs/{model}/render_modelfile{suffix}.log",
    benchmark:
        "logs/{model}/render_modelfile{suffix}.jsonl"
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
        system=lambda w: (shlex.join([f"--system={text}"]) if (text := spec(w.model).ollama.system) is not None else ""),
        llama_cpp=llama_cpp_options(),
        messages=lambda w: json.dumps([dict(each) for each in spec(w.model).ollama.messages], ensure_ascii=False),
        parameters=lambda w: json.dumps(dict(spec(w.model).ollama.parameters), ensure_ascii=False, sort_keys=True),
    shell:
        "{params.python} {params.script:q}"
        " --gguf {input.gguf:q}"
        " --tokenizer {params.tokenizer:q}"
        " {params.system}"
        " --messages {params.messages:q}"
        " --parameters {params.parameters:q}"
        " --output {output.modelfile:q}"
        " --report {output.report:q}"
        " {params.llama_cpp}"
        " --log {log:q}"
