# In: a backbone, and clips in TrackNet's layout, drawn here if there are none. Out: adapters/{model}, what was trained;
# models/{model}/merged, a model that loads with transformers alone; models/{model}.onnx; and reports/{model}.eval.json
# with pictures beside it.
HEATMAPS = "|".join(PROJECT.heatmaps) or "(?!)"
EVALUATED = "|".join(evaluated(PROJECT)) or "(?!)"
DRAWN = "|".join(name for name, model in PROJECT.heatmaps.items() if model.clips.synthetic) or "(?!)"


rule make_clips:
    """Draw clips of a tennis court with a flying ball."""
    output:
        clips=directory("work/{model}/clips"),
        marker=touch("work/{model}/clips.made"),
    log:
        "logs/{model}/make_clips.log",
    benchmark:
        "logs/{model}/make_clips.jsonl"
    wildcard_constraints:
        model=DRAWN,
    priority: 100
    conda:
        "../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=lambda w: heatmap_estimate.make_clips_needs(spec(w.model)).mem_mb,
        disk_mb=lambda w: heatmap_estimate.make_clips_needs(spec(w.model)).disk_mb,
        runtime=lambda w: heatmap_estimate.make_clips_needs(spec(w.model)).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("make_clips.py"),
        code=code_digest("make_clips.py"),
        games=lambda w: spec(w.model).clips.synthetic.games,
        clips=lambda w: spec(w.model).clips.synthetic.clips,
        frames=lambda w: spec(w.model).clips.synthetic.frames,
        size=lambda w: "x".join(map(str, spec(w.model).clips.synthetic.size)),
        seed=lambda w: spec(w.model).clips.synthetic.seed,
    shell:
        "{params.python} {params.script:q}"
        " --output {output.clips:q}"
        " --games {params.games}"
        " --clips {params.clips}"
        " --frames {params.frames}"
        " --size {params.size}"
        " --seed {params.seed}"
        " --log {log:q}"


rule check_clips:
    """Check the clips before anything long starts, and write down which they are."""
    input:
        clips=clip_tables,
    output:
        identity="work/{model}/clips.json",
    log:
        "logs/{model}/check_clips.log",
    benchmark:
        "logs/{model}/check_clips.jsonl"
    wildcard_constraints:
        model=HEATMAPS,
    priority: 100
    retries: 0
    localrule: True
    conda:
        "../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=lambda w: heatmap_estimate.check_clips_needs(spec(w.model)).mem_mb,
        disk_mb=lambda w: heatmap_estimate.check_clips_needs(spec(w.model)).disk_mb,
        runtime=lambda w: heatmap_estimate.check_clips_needs(spec(w.model)).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("check_clips.py"),
        code=code_digest("check_clips.py"),
        folder=clips_folder,
        # As inputs, tens of thousands of frames would slow every plan down.
        frames=lambda w: frames_seen(w.model),
    shell:
        "{params.python} {params.script:q}"
        " --clips {params.folder:q}"
        " --output {output.identity:q}"
        " --log {log:q}"


rule train_heatmap:
    """Train decoder and head, and the backbone or an adapter on it."""
    input:
        base="bases/{model}/MANIFEST.json",
        clips_identity="work/{model}/clips.json",
        clips=lambda w: ancient(clip_tables(w)),
    output:
        # `update`: Snakemake puts the earlier model back when the new training fails.
        manifest=update("adapters/{model}/MANIFEST.json"),
        weights=update("adapters/{model}/heatmap.safetensors"),
    log:
        "logs/{model}/train_heatmap.log",
    benchmark:
        "logs/{model}/train_heatmap.jsonl"
    wildcard_constraints:
        model=HEATMAPS,
    conda:
        "../envs/train.yaml"
    threads: lambda w: heatmap_estimate.train_threads(spec(w.model))
    resources:
        mem_mb=lambda w: heatmap_estimate.train_needs(spec(w.model)).mem_mb,
        disk_mb=lambda w: heatmap_estimate.train_needs(spec(w.model)).disk_mb,
        runtime=lambda w: heatmap_estimate.train_needs(spec(w.model)).runtime,
        gpu=lambda w: heatmap_estimate.train_needs(spec(w.model)).gpu,
        gpu_mem_mb=lambda w: heatmap_estimate.train_needs(spec(w.model)).gpu_mem_mb,
    params:
        python=on_gpus(lambda w: heatmap_estimate.train_needs(spec(w.model))),
        script=script("train_heatmap.py"),
        code=code_digest("train_heatmap.py"),
        base=base_folder,
        folder=clips_folder,
        heatmap=lambda w: as_options(spec(w.model).heatmap),
        use=lambda w: as_options(spec(w.model).clips.use),
        settings=lambda w: as_options(spec(w.model).adapter.train),
        gpus=heatmap_gpus,
    shell:
        "{params.python} {params.script:q}"
        " --base {params.base:q}"
        " --base-manifest {input.base:q}"
        " --clips {params.folder:q}"
        " --clips-identity {input.clips_identity:q}"
        " {params.heatmap}"
        " {params.use}"
        " {params.settings}"
        " --gpus={params.gpus:q}"
        " --checkpoints work/{wildcards.model}/checkpoints"
        " --tensorboard reports/{wildcards.model}.tensorboard"
        " --history work/{wildcards.model}/training.json"
        " --output adapters/{wildcards.model}"
        " --log {log:q}"


rule merge_heatmap:
    """Bring backbone, adapter, decoder and head together in a model that loads on its own."""
    input:
        base="bases/{model}/MANIFEST.json",
        adapter="adapters/{model}/MANIFEST.json",
        weights=ancient("adapters/{model}/heatmap.safetensors"),
    output:
        manifest="models/{model}/merged/MANIFEST.json",
        files=big(directory("models/{model}/merged")),
    log:
        "logs/{model}/merge_heatmap.log",
    benchmark:
        "logs/{model}/merge_heatmap.jsonl"
    wildcard_constraints:
        model=HEATMAPS,
    conda:
        "../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=lambda w: heatmap_estimate.merge_needs(spec(w.model)).mem_mb,
        disk_mb=lambda w: heatmap_estimate.merge_needs(spec(w.model)).disk_mb,
        runtime=lambda w: heatmap_estimate.merge_needs(spec(w.model)).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("merge_heatmap.py"),
        code=code_digest("merge_heatmap.py"),
        base=base_folder,
        dtype=lambda w: spec(w.model).merge.dtype,
    shell:
        "{params.python} {params.script:q}"
        " --base {params.base:q}"
        " --base-manifest {input.base:q}"
        " --adapter adapters/{wildcards.model}"
        " --dtype {params.dtype}"
        " --output models/{wildcards.model}/merged"
        " --log {log:q}"


rule export_onnx:
    """Export the model to ONNX, and hold what onnxruntime computes against it."""
    input:
        manifest="models/{model}/merged/MANIFEST.json",
        model=ancient("models/{model}/merged"),
    output:
        onnx="models/{model}.onnx",
        manifest="models/{model}.onnx.json",
    log:
        "logs/{model}/export_onnx.log",
    benchmark:
        "logs/{model}/export_onnx.jsonl"
    wildcard_constraints:
        model=HEATMAPS,
    conda:
        "../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=lambda w: heatmap_estimate.export_needs(spec(w.model)).mem_mb,
        disk_mb=lambda w: heatmap_estimate.export_needs(spec(w.model)).disk_mb,
        runtime=lambda w: heatmap_estimate.export_needs(spec(w.model)).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("export_onnx.py"),
        code=code_digest("export_onnx.py"),
    shell:
        "{params.python} {params.script:q}" " --model {input.model:q}" " --output {output.onnx:q}" " --log {log:q}"


rule evaluate_heatmap:
    """Count where the model finds the ball in clips that it did not learn from, and draw some of it."""
    input:
        manifest="models/{model}/merged/MANIFEST.json",
        model=ancient("models/{model}/merged"),
        clips_identity="work/{model}/clips.json",
        clips=lambda w: ancient(clip_tables(w)),
    output:
        report=report(
            "reports/{model}.eval.json",
            caption="../report/eval.rst",
            category="Heatmaps",
            labels={"model": "{model}", "shows": "precision, recall and distance on held-out clips"},
        ),
        overlays=directory("reports/{model}.overlays"),
    log:
        "logs/{model}/evaluate_heatmap.log",
    benchmark:
        "logs/{model}/evaluate_heatmap.jsonl"
    wildcard_constraints:
        model=EVALUATED,
    conda:
        "../envs/train.yaml"
    threads: 4
    resources:
        mem_mb=lambda w: heatmap_estimate.evaluate_needs(spec(w.model)).mem_mb,
        disk_mb=lambda w: heatmap_estimate.evaluate_needs(spec(w.model)).disk_mb,
        runtime=lambda w: heatmap_estimate.evaluate_needs(spec(w.model)).runtime,
        gpu=lambda w: heatmap_estimate.evaluate_needs(spec(w.model)).gpu,
        gpu_mem_mb=lambda w: heatmap_estimate.evaluate_needs(spec(w.model)).gpu_mem_mb,
    params:
        python=on_gpus(lambda w: heatmap_estimate.evaluate_needs(spec(w.model))),
        script=script("evaluate_heatmap.py"),
        code=code_digest("evaluate_heatmap.py"),
        folder=clips_folder,
        use=lambda w: as_options(spec(w.model).clips.use),
        evaluation=lambda w: as_options(spec(w.model).evaluation),
        device=lambda w: spec(w.model).adapter.train.device,
    shell:
        "{params.python} {params.script:q}"
        " --model {input.model:q}"
        " --clips {params.folder:q}"
        " {params.use}"
        " {params.evaluation}"
        " --device {params.device}"
        " --output {output.report:q}"
        " --overlays {output.overlays:q}"
        " --log {log:q}"
