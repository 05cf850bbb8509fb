# In: a merged checkpoint, or a base (`.base`); directly, base and adapter. Out: models/{model}{base}.{type}.gguf with
# its manifest beside it; of the type `auto` the one that work/{model}/type.json tells. Several types that are built
# directly and asked for together are one job.
CHOSEN = [name for name, model in PROJECT.models.items() if model.quantize.is_auto]


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


rule choose_type:
    """Choose the type that `auto` stands for, by what was measured of those that fit."""
    input:
        measured="work/{model}/quality.types.json",
    output:
        chosen="work/{model}/type.json",
    log:
        "logs/{model}/choose_type.log",
    benchmark:
        "logs/{model}/choose_type.jsonl"
    wildcard_constraints:
        model="|".join(CHOSEN) or "(?!)",
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
        script=script("choose_type.py"),
        code=code_digest("choose_type.py"),
        budget=budget_options,
    shell:
        "{params.python} {params.script:q}"
        " --measured {input.measured:q}"
        " {params.budget}"
        " --output {output.chosen:q}"
        " --log {log:q}"


rule quantize_gguf:
    """Quantize with llama.cpp's quantizer."""
    input:
        source=lambda w: quantize_source(w) + ".json",
        gguf=lambda w: ancient(quantize_source(w)),
        imatrix=imatrix_manifest,
        imatrix_gguf=imatrix_gguf,
        chosen=chosen_file,
        llama_cpp="work/llama_cpp.json",
    output:
        gguf="models/{model}{base}.{quant}.gguf",
        manifest="models/{model}{base}.{quant}.gguf.json",
    log:
        "logs/{model}/quantize_gguf{base}.{quant}.log",
    benchmark:
        "logs/{model}/quantize_gguf{base}.{quant}.jsonl"
    wildcard_constraints:
        model=PATHS.staged_models(),
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
        quant=quant_option,
        settings=lambda w: as_options(spec(w.model).quantize.tensor_types),
        imatrix=imatrix_option,
        llama_cpp=llama_cpp_options(),
    shell:
        "{params.python} {params.script:q}"
        " --source {input.gguf:q}"
        " {params.quant}"
        " {params.settings}"
        " {params.imatrix}"
        " --output {output.gguf:q}"
        " {params.llama_cpp}"
        " --log {log:q}"


for PASS in direct_passes():

    rule:
        name:
            PASS.name
        input:
            base="bases/{model}/MANIFEST.json",
            base_check="work/{model}/base.json",
            adapter=tuned_adapter,
            imatrix=of_first(imatrix_manifest, PASS.quants),
            imatrix_gguf=of_first(imatrix_gguf, PASS.quants),
            llama_cpp="work/llama_cpp.json",
        output:
            gguf=expand("models/{{model}}{{base}}.{quant}.gguf", quant=PASS.quants),
            manifest=expand("models/{{model}}{{base}}.{quant}.gguf.json", quant=PASS.quants),
        log:
            f"logs/{{model}}/build_direct{{base}}.{JOIN.join(PASS.quants)}.log",
        benchmark:
            f"logs/{{model}}/build_direct{{base}}.{JOIN.join(PASS.quants)}.jsonl"
        wildcard_constraints:
            model=PASS.model,
            base=PASS.base,
        conda:
            "../envs/train.yaml"
        threads: 8
        resources:
            mem_mb=lambda w, quants=PASS.quants: direct_needs(w, quants).mem_mb,
            disk_mb=lambda w, quants=PASS.quants: direct_needs(w, quants).disk_mb,
            runtime=lambda w, quants=PASS.quants: direct_needs(w, quants).runtime,
            gpu=lambda w, quants=PASS.quants: direct_needs(w, quants).gpu,
            gpu_mem_mb=lambda w, quants=PASS.quants: direct_needs(w, quants).gpu_mem_mb,
        params:
            python=on_gpus(lambda w, quants=PASS.quants: direct_needs(w, quants)),
            script=script("build_direct.py"),
            code=code_digest("build_direct.py"),
            base=base_folder,
            adapter=adapter_options,
            artifact=lambda w: "base" if w.base else "merged",
            dtype=lambda w: spec(w.model).merge.dtype,
            base_weights=lambda w: spec(w.model).merge.base_weights,
            settings=lambda w: as_options(spec(w.model).quantize.tensor_types),
            imatrix=of_first(imatrix_option, PASS.quants),
            llama_cpp=llama_cpp_options(),
            # By functions of the input, which are not recorded: a file's bytes are the same on any device and path, and
            # whether it was built alone or with others.
            device=lambda w, input: spec(w.model).merge.device,
            path=lambda w, input: spec(w.model).quantize.path,
            quants=lambda w, input, quants=PASS.quants: " ".join(f"--quant {each}" for each in quants_of(w, quants)),
            output=lambda w, input: f"models/{w.model}{w.base}.{{quant}}.gguf",
        shell:
            "{params.python} {params.script:q}"
            " --base {params.base:q}"
            " --base-manifest {input.base:q}"
            " {params.adapter}"
            " --artifact {params.artifact}"
            " --name {wildcards.model}{wildcards.base}"
            " --dtype {params.dtype}"
            " --base-weights {params.base_weights}"
            " {params.quants}"
            " {params.settings}"
            " {params.imatrix}"
            " --device {params.device}"
            " --path {params.path}"
            " --output {params.output:q}"
            " {params.llama_cpp}"
            " --log {log:q}"
