# In: a GGUF file, what is known of its chat template. Out: ollama/{model}.json, the receipt of a running Ollama server.


rule register_model:
    """Register the model in a running Ollama server, and ask it the held-out questions there."""
    input:
        manifest=lambda w: default_gguf(w.model) + ".json",
        gguf=lambda w: ancient(default_gguf(w.model)),
        base="bases/{model}/MANIFEST.json",
        chat="reports/{model}.chat.json",
        questions_identity=lambda w: f"work/{w.model}/questions.json" if spec(w.model).smoke else [],
        questions=lambda w: ancient(spec(w.model).smoke.questions) if spec(w.model).smoke else [],
    output:
        receipt="ollama/{model}.json",
    log:
        "logs/{model}/register_model.log",
    benchmark:
        "logs/{model}/register_model.jsonl"
    retries: 0
    localrule: True
    conda:
        "../envs/llama_cpp.yaml"
    threads: 1
    resources:
        mem_mb=lambda w: estimate.register_needs(spec(w.model)).mem_mb,
        disk_mb=lambda w: estimate.register_needs(spec(w.model)).disk_mb,
        runtime=lambda w: estimate.register_needs(spec(w.model)).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("register_model.py"),
        code=code_digest("register_model.py"),
        tokenizer=base_folder,
        name=ollama_name,
        system=system_option,
        messages=ollama_messages,
        parameters=ollama_parameters,
        questions=questions_options,
    shell:
        "{params.python} {params.script:q}"
        " --gguf {input.gguf:q}"
        " --chat {input.chat:q}"
        " --tokenizer {params.tokenizer:q}"
        " --name {params.name:q}"
        " {params.system}"
        " --messages {params.messages:q}"
        " --parameters {params.parameters:q}"
        " {params.questions}"
        " --output {output.receipt:q}"
        " --log {log:q}"
