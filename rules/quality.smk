# In: a model's 16-bit GGUF, its quantized types, a text. Out: reports/{model}.quality.{json,png}, what quantizing and
# merging cost the model and what tuning brought; work/{model}/quality.*.json, the figures of each; and
# work/{model}/quality.json, the limits are met.
JUDGED = [name for name, model in PROJECT.models.items() if model.quality]
MERGED_TWICE = [name for name in JUDGED if spec(name).quality.base_weights]
HELD_OUT = [name for name in JUDGED if spec(name).holds_out]
LIMITED = [name for name in JUDGED if spec(name).quality.limits]


rule check_quality_text:
    """Check the text that files are judged by before anything long starts, and write down which it is."""
    input:
        text=lambda w: spec(w.model).quality.text,
    output:
        identity="work/{model}/quality_text.json",
    log:
        "logs/{model}/check_quality_text.log",
    benchmark:
        "logs/{model}/check_quality_text.jsonl"
    wildcard_constraints:
        model="|".join(JUDGED) or "(?!)",
    priority: 100
    retries: 0
    localrule: True
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
        script=script("check_calibration.py"),
        code=code_digest("check_calibration.py"),
    shell:
        "{params.python} {params.script:q}" " --text {input.text:q}" " --output {output.identity:q}" " --log {log:q}"


rule measure_types:
    """
    Compare all types with the 16-bit file, by what it says of each token, which is kept in a file meanwhile.

    One job, since that file is large and no artifact; figures of the same files are not measured again.
    """
    input:
        source=lambda w: quantize_source(tuned(w)) + ".json",
        gguf=lambda w: ancient(quantize_source(tuned(w))),
        manifests=lambda w: [f"{file}.json" for file in compared_files(w)],
        ggufs=lambda w: ancient(compared_files(w)),
        matrix=lambda w: [f"{file}.json" for file in compared_matrix(w)],
        matrix_gguf=lambda w: ancient(compared_matrix(w)),
        text_identity="work/{model}/quality_text.json",
        text=lambda w: ancient(spec(w.model).quality.text),
        general_text=lambda w: spec(w.model).quality.general_text or [],
        llama_cpp="work/llama_cpp.json",
    output:
        figures="work/{model}/quality.types.json",
    log:
        "logs/{model}/measure_types.log",
    benchmark:
        "logs/{model}/measure_types.jsonl"
    wildcard_constraints:
        model="|".join(JUDGED) or "(?!)",
    conda:
        "../envs/llama_cpp.yaml"
    threads: 8
    resources:
        mem_mb=lambda w: estimate.measure_needs(spec(w.model), PROJECT.hardware).mem_mb,
        disk_mb=lambda w: estimate.measure_needs(spec(w.model), PROJECT.hardware).disk_mb,
        runtime=lambda w: estimate.measure_needs(spec(w.model), PROJECT.hardware).runtime,
        gpu=lambda w: estimate.measure_needs(spec(w.model), PROJECT.hardware).gpu,
        gpu_mem_mb=lambda w: estimate.measure_needs(spec(w.model), PROJECT.hardware).gpu_mem_mb,
    params:
        python=on_gpus(lambda w: estimate.measure_needs(spec(w.model), PROJECT.hardware)),
        script=script("measure_types.py"),
        code=code_digest("measure_types.py"),
        types=compared_options,
        settings=lambda w: as_options(spec(w.model).quantize.tensor_types),
        chunks=lambda w: spec(w.model).quality.chunks,
        general=general_options,
        # Not recorded: figures of a GPU are as good.
        device=lambda w, input: spec(w.model).quality.device,
        llama_cpp=llama_cpp_options(),
    shell:
        "{params.python} {params.script:q}"
        " --reference {input.gguf:q}"
        " {params.types}"
        " --text {input.text:q}"
        " --chunks {params.chunks}"
        " {params.general}"
        " {params.settings}"
        " --device {params.device}"
        " --known work/{wildcards.model}/quality"
        " --output {output.figures:q}"
        " {params.llama_cpp}"
        " --log {log:q}"


rule compare_merges:
    """Merge into the original weights and into those of the 4-bit training, and compare both with what was trained."""
    input:
        base="bases/{model}/MANIFEST.json",
        adapter="adapters/{model}/MANIFEST.json",
        text_identity="work/{model}/quality_text.json",
        text=lambda w: ancient(spec(w.model).quality.text),
        llama_cpp="work/llama_cpp.json",
    output:
        figures="work/{model}/quality.merges.json",
    log:
        "logs/{model}/compare_merges.log",
    benchmark:
        "logs/{model}/compare_merges.jsonl"
    wildcard_constraints:
        model="|".join(MERGED_TWICE) or "(?!)",
    conda:
        "../envs/train.yaml"
    threads: 8
    resources:
        mem_mb=lambda w: merges_needs(w).mem_mb,
        disk_mb=lambda w: merges_needs(w).disk_mb,
        runtime=lambda w: merges_needs(w).runtime,
        gpu=lambda w: merges_needs(w).gpu,
        gpu_mem_mb=lambda w: merges_needs(w).gpu_mem_mb,
    params:
        python=on_gpus(merges_needs),
        script=script("compare_merges.py"),
        code=code_digest("compare_merges.py"),
        base=base_folder,
        dtype=lambda w: spec(w.model).merge.dtype,
        chunks=lambda w: spec(w.model).quality.chunks,
        # By functions of the input, which are not recorded: figures of a GPU are as good.
        device=lambda w, input: spec(w.model).quality.device,
        merge_device=lambda w, input: spec(w.model).merge.device,
        trained_device=lambda w, input: spec(w.model).adapter.train.device,
        gpus=planned_gpus,
        llama_cpp=llama_cpp_options(),
    shell:
        "{params.python} {params.script:q}"
        " --base {params.base:q}"
        " --base-manifest {input.base:q}"
        " --adapter adapters/{wildcards.model}"
        " --dtype {params.dtype}"
        " --text {input.text:q}"
        " --chunks {params.chunks}"
        " --device {params.device}"
        " --merge-device {params.merge_device}"
        " --trained-device {params.trained_device}"
        " --gpus '{params.gpus}'"
        " --output {output.figures:q}"
        " {params.llama_cpp}"
        " --log {log:q}"


rule measure_tuning:
    """Judge the tuned model and its base, in the default type, by what was held out of the training data."""
    input:
        tuned=lambda w: default_gguf(w.model) + ".json",
        base=lambda w: default_gguf(w.model, ".base") + ".json",
        tuned_gguf=lambda w: ancient(default_gguf(w.model)),
        base_gguf=lambda w: ancient(default_gguf(w.model, ".base")),
        identity="work/{model}/rendered.json",
        held_out=ancient("work/{model}/held_out.json"),
        llama_cpp="work/llama_cpp.json",
    output:
        figures="work/{model}/quality.tuning.json",
    log:
        "logs/{model}/measure_tuning.log",
    benchmark:
        "logs/{model}/measure_tuning.jsonl"
    wildcard_constraints:
        model="|".join(HELD_OUT) or "(?!)",
    conda:
        "../envs/llama_cpp.yaml"
    threads: 8
    resources:
        mem_mb=lambda w: tuning_needs(w).mem_mb,
        disk_mb=lambda w: tuning_needs(w).disk_mb,
        runtime=lambda w: tuning_needs(w).runtime,
        gpu=lambda w: tuning_needs(w).gpu,
        gpu_mem_mb=lambda w: tuning_needs(w).gpu_mem_mb,
    params:
        python=on_gpus(tuning_needs),
        script=script("measure_tuning.py"),
        code=code_digest("measure_tuning.py"),
        chunks=lambda w: spec(w.model).quality.chunks,
        # Not recorded: figures of a GPU are as good.
        device=lambda w, input: spec(w.model).quality.device,
        llama_cpp=llama_cpp_options(),
    shell:
        "{params.python} {params.script:q}"
        " --tuned {input.tuned_gguf:q}"
        " --base {input.base_gguf:q}"
        " --held-out {input.held_out:q}"
        " --chunks {params.chunks}"
        " --device {params.device}"
        " --output {output.figures:q}"
        " {params.llama_cpp}"
        " --log {log:q}"


rule report_quality:
    """Put the figures of all files together."""
    input:
        types="work/{model}/quality.types.json",
        merges=merges_file,
        tuning=tuning_file,
        chosen=type_file,
    output:
        report="reports/{model}.quality.json",
        picture=report(
            "reports/{model}.quality.png",
            caption="../report/quality.rst",
            category="Quality",
            labels={"model": "{model}", "shows": "divergence and agreement of each type, by size"},
        ),
    log:
        "logs/{model}/report_quality.log",
    benchmark:
        "logs/{model}/report_quality.jsonl"
    wildcard_constraints:
        model="|".join(JUDGED) or "(?!)",
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
        script=script("report_quality.py"),
        code=code_digest("report_quality.py"),
        matrices=matrix_options,
        merges=lambda w: f"--merges={merges_file(w)}" if merges_file(w) else "",
        tuning=lambda w: f"--tuning={tuning_file(w)}" if tuning_file(w) else "",
        chosen=lambda w: f"--chosen={type_file(w)}" if type_file(w) else "",
    shell:
        "{params.python} {params.script:q}"
        " --model {wildcards.model}"
        " --types {input.types:q}"
        " {params.matrices}"
        " {params.merges}"
        " {params.tuning}"
        " {params.chosen}"
        " --output {output.report:q}"
        " --picture {output.picture:q}"
        " --log {log:q}"


rule check_quality:
    """Hold a model's types to the limits that are set for them; its base and other merges are not built for that."""
    input:
        types="work/{model}/quality.types.json",
        chosen=type_file,
    output:
        passed=passed_file("{model}"),
    log:
        "logs/{model}/check_quality.log",
    benchmark:
        "logs/{model}/check_quality.jsonl"
    wildcard_constraints:
        model="|".join(LIMITED) or "(?!)",
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
        script=script("check_quality.py"),
        code=code_digest("check_quality.py"),
        types=judged_types,
        matrices=matrix_options,
        limits=limit_options,
    shell:
        "{params.python} {params.script:q}"
        " --model {wildcards.model}"
        " --measured {input.types:q}"
        " {params.types}"
        " {params.matrices}"
        " {params.limits}"
        " --output {output.passed:q}"
        " --log {log:q}"
