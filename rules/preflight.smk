# In: config.yaml and the machine. Out: no artifact; what is told is in reports/preflight.json as well.


rule preflight:
    """Tell whether the models can be built on this machine, before anything starts."""
    log:
        "logs/preflight.log",
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
        script=script("preflight.py"),
        files=config_files,
        changes=config_changes,
    shell:
        "{params.python} {params.script:q}"
        " --config {params.files}"
        " --changes {params.changes:q}"
        " --json reports/preflight.json"
        " --log {log:q}"
