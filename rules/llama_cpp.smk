# In: the pinned source distribution. Out: llama.cpp built in a cache outside this folder, and which one it is.


rule build_llama_cpp:
    """Fetch and build llama.cpp, unless the cache has it."""
    output:
        identity="work/llama_cpp.json",
    log:
        "logs/build_llama_cpp.log",
    benchmark:
        "logs/build_llama_cpp.jsonl"
    priority: 90  # a missing compiler shows before anything long
    conda:
        "../envs/llama_cpp.yaml"
    threads: 8
    resources:
        mem_mb=estimate.build_needs().mem_mb,
        disk_mb=estimate.build_needs().disk_mb,
        runtime=estimate.build_needs().runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("build_llama_cpp.py"),
        code=code_digest("build_llama_cpp.py"),
        llama_cpp=llama_cpp_options(),
    shell:
        "{params.python} {params.script:q}" " --output {output.identity:q}" " {params.llama_cpp}" " --log {log:q}"
