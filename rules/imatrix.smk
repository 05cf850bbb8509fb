# In: a 16-bit GGUF and a text, the user's own or the training data as render_data writes them. Out:
# models/{model}{base}.imatrix.gguf, how much each input of each layer weighs.
CALIBRATED = [name for name, model in PROJECT.models.items() if model.quantize.imatrix]


rule check_calibration:
    """Check the text before anything long starts, and write down which it is."""
    input:
        text=checked_text,
        rendered=rendered_identity,
    output:
        identity="work/{model}/calibration.json",
    log:
        "logs/{model}/check_calibration.log",
    benchmark:
        "logs/{model}/check_calibration.jsonl"
    wildcard_constraints:
        model="|".join(CALIBRATED) or "(?!)",
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
        rendered=rendered_option,
    shell:
        "{params.python} {params.script:q}"
        " --text={input.text:q}"
        " {params.rendered}"
        " --output {output.identity:q}"
        " --log {log:q}"


rule compute_imatrix:
    """Compute the importance matrix with llama.cpp; a base has its own, so that comparisons are fair."""
    input:
        source=lambda w: imatrix_source(w) + ".json",
        gguf=lambda w: ancient(imatrix_source(w)),
        text_identity="work/{model}/calibration.json",
        text=lambda w: ancient(imatrix_text(w)),
        rendered=rendered_identity,
        llama_cpp="work/llama_cpp.json",
    output:
        gguf="models/{model}{base}.imatrix.gguf",
        manifest="models/{model}{base}.imatrix.gguf.json",
    log:
        "logs/{model}/compute_imatrix{base}.log",
    benchmark:
        "logs/{model}/compute_imatrix{base}.jsonl"
    wildcard_constraints:
        model="|".join(CALIBRATED) or "(?!)",
    conda:
        "../envs/llama_cpp.yaml"
    threads: 8
    resources:
        mem_mb=lambda w: estimate.imatrix_needs(spec(w.model), PROJECT.hardware).mem_mb,
        disk_mb=lambda w: estimate.imatrix_needs(spec(w.model), PROJECT.hardware).disk_mb,
        runtime=lambda w: estimate.imatrix_needs(spec(w.model), PROJECT.hardware).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("compute_imatrix.py"),
        code=code_digest("compute_imatrix.py"),
        chunks=lambda w: spec(w.model).quantize.imatrix.chunks,
        rendered=rendered_option,
        llama_cpp=llama_cpp_options(),
    shell:
        "{params.python} {params.script:q}"
        " --source {input.gguf:q}"
        " --text={input.text:q}"
        " {params.rendered}"
        " --chunks {params.chunks}"
        " --output {output.gguf:q}"
        " {params.llama_cpp}"
        " --log {log:q}"
