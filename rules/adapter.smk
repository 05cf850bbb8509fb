# In: a base, and conversations or an adapter that is there already. Out: adapters/{model}, a LoRA in peft's format; and
# for llama.cpp what it was trained on as a text and what was held out as tokens, work/{model}/training.txt and
# held_out.json, with rendered.json to tell which they are.
ADAPTED = [name for name, model in PROJECT.models.items() if model.adapter]
UNADAPTED = [name for name, model in PROJECT.models.items() if not model.adapter]
TRAINED = [name for name, model in PROJECT.models.items() if model.adapter and model.adapter.train is not None]
IMPORTED = [name for name, model in PROJECT.models.items() if model.adapter and model.adapter.train is None]


rule check_data:
    """Check the conversations before anything long starts, and write down which they are."""
    input:
        data=lambda w: spec(w.model).adapter.train.data,
        eval_data=held_out_data,
    output:
        identity="work/{model}/data.json",
    log:
        "logs/{model}/check_data.log",
    benchmark:
        "logs/{model}/check_data.jsonl"
    wildcard_constraints:
        model="|".join(TRAINED) or "(?!)",
    priority: 100
    retries: 0
    localrule: True
    conda:
        "../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=estimate.small_needs().mem_mb,
        disk_mb=estimate.small_needs().disk_mb,
        runtime=estimate.small_needs().runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("check_data.py"),
        code=code_digest("check_data.py"),
        held_out=held_out_option,
    shell:
        "{params.python} {params.script:q}"
        " --data={input.data:q}"
        " {params.held_out}"
        " --output {output.identity:q}"
        " --log {log:q}"


rule render_data:
    """Write what is trained on as a text, and what is held out as tokens, each sample as training sees it."""
    input:
        base="bases/{model}/MANIFEST.json",
        data_identity="work/{model}/data.json",
        data=lambda w: ancient(spec(w.model).adapter.train.data),
        eval_data=lambda w: ancient(held_out_data(w)),
    output:
        training="work/{model}/training.txt",
        held_out="work/{model}/held_out.json",
        identity="work/{model}/rendered.json",
    log:
        "logs/{model}/render_data.log",
    benchmark:
        "logs/{model}/render_data.jsonl"
    wildcard_constraints:
        model="|".join(TRAINED) or "(?!)",
    # Data that the chat template does not render, or too few for a matrix, are told before the training.
    priority: 95
    conda:
        "../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=lambda w: estimate.render_needs(spec(w.model)).mem_mb,
        disk_mb=lambda w: estimate.render_needs(spec(w.model)).disk_mb,
        runtime=lambda w: estimate.render_needs(spec(w.model)).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("render_data.py"),
        code=code_digest("render_data.py"),
        base=base_folder,
        division=division_options,
    shell:
        "{params.python} {params.script:q}"
        " --base {params.base:q}"
        " --data={input.data:q}"
        " {params.division}"
        " --output {output.training:q}"
        " --held-out {output.held_out:q}"
        " --identity {output.identity:q}"
        " --log {log:q}"


rule train_adapter:
    """Train a LoRA adapter on the base."""
    input:
        base="bases/{model}/MANIFEST.json",
        base_check="work/{model}/base.json",
        data_identity="work/{model}/data.json",
        data=lambda w: ancient(spec(w.model).adapter.train.data),
        eval_data=lambda w: ancient(held_out_data(w)),
    output:
        # `update`: Snakemake puts the earlier adapter back when the new training fails.
        manifest=update("adapters/{model}/MANIFEST.json"),
        weights=update("adapters/{model}/adapter_model.safetensors"),
        config=update("adapters/{model}/adapter_config.json"),
    log:
        "logs/{model}/train_adapter.log",
    benchmark:
        "logs/{model}/train_adapter.jsonl"
    wildcard_constraints:
        model="|".join(TRAINED) or "(?!)",
    conda:
        "../envs/train.yaml"
    threads: 8
    resources:
        mem_mb=lambda w: estimate.train_needs(spec(w.model), PROJECT.hardware).mem_mb,
        disk_mb=lambda w: estimate.train_needs(spec(w.model), PROJECT.hardware).disk_mb,
        runtime=lambda w: estimate.train_needs(spec(w.model), PROJECT.hardware).runtime,
        gpu=lambda w: estimate.train_needs(spec(w.model), PROJECT.hardware).gpu,
        gpu_mem_mb=lambda w: estimate.train_needs(spec(w.model), PROJECT.hardware).gpu_mem_mb,
    params:
        python=on_gpus(lambda w: estimate.train_needs(spec(w.model), PROJECT.hardware)),
        script=script("train_adapter.py"),
        code=code_digest("train_adapter.py"),
        base=base_folder,
        settings=lambda w: as_options(spec(w.model).adapter.train),
        gpus=planned_gpus,
        reason=method_reason,
    shell:
        "{params.python} {params.script:q}"
        " --base {params.base:q}"
        " --base-manifest {input.base:q}"
        " {params.settings}"
        " --gpus={params.gpus:q}"
        " --method-reason={params.reason:q}"
        " --checkpoints work/{wildcards.model}/checkpoints"
        " --tensorboard reports/{wildcards.model}.tensorboard"
        " --history work/{wildcards.model}/training.json"
        " --output adapters/{wildcards.model}"
        " --log {log:q}"


rule import_adapter:
    """Take an adapter that is there already, once it fits the base."""
    input:
        base="bases/{model}/MANIFEST.json",
        weights=lambda w: f"{spec(w.model).adapter.path}/adapter_model.safetensors",
        config=lambda w: f"{spec(w.model).adapter.path}/adapter_config.json",
    output:
        # `update`: the earlier adapter stays when the new one does not fit.
        manifest=update("adapters/{model}/MANIFEST.json"),
        weights=update("adapters/{model}/adapter_model.safetensors"),
        config=update("adapters/{model}/adapter_config.json"),
    log:
        "logs/{model}/import_adapter.log",
    benchmark:
        "logs/{model}/import_adapter.jsonl"
    wildcard_constraints:
        model="|".join(IMPORTED) or "(?!)",
    conda:
        "../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=lambda w: estimate.import_needs(spec(w.model)).mem_mb,
        disk_mb=lambda w: estimate.import_needs(spec(w.model)).disk_mb,
        runtime=lambda w: estimate.import_needs(spec(w.model)).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("import_adapter.py"),
        code=code_digest("import_adapter.py"),
        base=base_folder,
        adapter=adapter_folder,
        # A link that now leads to another, older adapter changes no time that Snakemake looks at.
        name=lambda w: os.path.basename(os.path.realpath(spec(w.model).adapter.path)),
    shell:
        "{params.python} {params.script:q}"
        " --base {params.base:q}"
        " --base-manifest {input.base:q}"
        " --adapter {params.adapter:q}"
        " --output adapters/{wildcards.model}"
        " --log {log:q}"


rule convert_adapter:
    """Convert the adapter to GGUF, for those who keep one base and many adapters."""
    input:
        base="bases/{model}/MANIFEST.json",
        adapter="adapters/{model}/MANIFEST.json",
        weights=ancient("adapters/{model}/adapter_model.safetensors"),
        llama_cpp="work/llama_cpp.json",
    output:
        gguf="models/{model}.adapter.gguf",
        manifest="models/{model}.adapter.gguf.json",
    log:
        "logs/{model}/convert_adapter.log",
    benchmark:
        "logs/{model}/convert_adapter.jsonl"
    wildcard_constraints:
        model="|".join(ADAPTED) or "(?!)",
    conda:
        "../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=lambda w: estimate.convert_adapter_needs(spec(w.model)).mem_mb,
        disk_mb=lambda w: estimate.convert_adapter_needs(spec(w.model)).disk_mb,
        runtime=lambda w: estimate.convert_adapter_needs(spec(w.model)).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("convert_adapter.py"),
        code=code_digest("convert_adapter.py"),
        base=base_folder,
        llama_cpp=llama_cpp_options(),
    shell:
        "{params.python} {params.script:q}"
        " --base {params.base:q}"
        " --base-manifest {input.base:q}"
        " --adapter adapters/{wildcards.model}"
        " --name {wildcards.model}"
        " --output {output.gguf:q}"
        " {params.llama_cpp}"
        " --log {log:q}"
