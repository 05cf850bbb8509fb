# In: trained adapters, finished models. Out: reports/{model}.*, how training went, what it all took and what the models
# can do; the HTML report of `snakemake --report` shows those that are there.


report: "../report/workflow.rst"


ASKED = [name for name, model in PROJECT.models.items() if model.smoke and model.adapter]
WITH_QUESTIONS = [name for name, model in PROJECT.models.items() if model.smoke]
WITH_DOCUMENTS = [name for name, model in PROJECT.models.items() if model.rag]


rule report_training:
    """Sum up a training run and draw its curves, from the record that it left."""
    input:
        adapter="adapters/{model}/MANIFEST.json",
    output:
        report="reports/{model}.training.json",
        picture=report(
            "reports/{model}.training.png",
            caption="../report/training.rst",
            category="Training",
            labels={"model": "{model}", "shows": "loss, learning rate, speed and memory"},
        ),
    log:
        "logs/{model}/report_training.log",
    benchmark:
        "logs/{model}/report_training.jsonl"
    wildcard_constraints:
        model="|".join([*TRAINED, *PROJECT.heatmaps]) or "(?!)",
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
        script=script("report_training.py"),
        code=code_digest("report_training.py"),
        # No input: it is no output of any rule. The manifest tells when there is another one.
        history=lambda wildcards, input: f"work/{wildcards.model}/training.json",
    shell:
        "{params.python} {params.script:q}"
        " --history {params.history:q}"
        " --adapter adapters/{wildcards.model}"
        " --title {wildcards.model}"
        " --output {output.report:q}"
        " --picture {output.picture:q}"
        " --log {log:q}"


rule report_resources:
    """Set what each step took beside what it asks for, of the steps that ran here; none is run for it."""
    output:
        report="reports/{model}.resources.json",
        picture=report(
            "reports/{model}.resources.png",
            caption="../report/resources.rst",
            category="Resources",
            labels={"model": "{model}", "shows": "declared against measured memory, time and disk; sizes"},
        ),
    log:
        "logs/{model}/report_resources.log",
    wildcard_constraints:
        model="|".join(PROJECT.names),
    priority: -100  # so that in a run that builds as well it comes last
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
        script=script("report_resources.py"),
        code=code_digest("report_resources.py"),
        # In place of inputs, which would be built for the report: it is made anew when anything that it says changed.
        content=lambda w: digest_json(report_resources(w.model, PROJECT)),
        files=config_files,
        changes=config_changes,
    shell:
        "{params.python} {params.script:q}"
        " --config {params.files}"
        " --changes {params.changes:q}"
        " --model {wildcards.model}"
        " --output {output.report:q}"
        " --picture {output.picture:q}"
        " --log {log:q}"


rule check_questions:
    """Check the held-out questions before anything long starts, and write down which they are."""
    input:
        questions=lambda w: spec(w.model).smoke.questions,
    output:
        identity="work/{model}/questions.json",
    log:
        "logs/{model}/check_questions.log",
    benchmark:
        "logs/{model}/check_questions.jsonl"
    wildcard_constraints:
        model="|".join(WITH_QUESTIONS) or "(?!)",
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
        script=script("check_questions.py"),
        code=code_digest("check_questions.py"),
    shell:
        "{params.python} {params.script:q}"
        " --questions {input.questions:q}"
        " --output {output.identity:q}"
        " --log {log:q}"


rule smoke_test:
    """Ask the tuned model and its base held-out questions."""
    input:
        tuned=lambda w: default_gguf(w.model) + ".json",
        tuned_gguf=lambda w: ancient(default_gguf(w.model)),
        base=lambda w: default_gguf(w.model, ".base") + ".json",
        base_gguf=lambda w: ancient(default_gguf(w.model, ".base")),
        questions_identity="work/{model}/questions.json",
        questions=lambda w: ancient(spec(w.model).smoke.questions),
        llama_cpp="work/llama_cpp.json",
    output:
        report=report(
            "reports/{model}.smoke.json",
            caption="../report/smoke.rst",
            category="Answers",
            labels={"model": "{model}", "shows": "held-out questions, before and after tuning"},
        ),
    log:
        "logs/{model}/smoke_test.log",
    benchmark:
        "logs/{model}/smoke_test.jsonl"
    wildcard_constraints:
        model="|".join(ASKED) or "(?!)",
    conda:
        "../envs/llama_cpp.yaml"
    threads: 8
    resources:
        mem_mb=lambda w: estimate.answer_needs(spec(w.model), spec(w.model).default_quant).mem_mb,
        disk_mb=lambda w: estimate.answer_needs(spec(w.model), spec(w.model).default_quant).disk_mb,
        runtime=lambda w: estimate.answer_needs(spec(w.model), spec(w.model).default_quant).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("smoke_test.py"),
        code=code_digest("smoke_test.py"),
        settings=lambda w: as_options(spec(w.model).smoke),
        llama_cpp=llama_cpp_options(),
    shell:
        "{params.python} {params.script:q}"
        " --tuned {input.tuned_gguf:q}"
        " --base {input.base_gguf:q}"
        " {params.settings}"
        " --output {output.report:q}"
        " {params.llama_cpp}"
        " --log {log:q}"


rule check_documents:
    """Check documents and the questions about them before anything long starts, and write down which they are."""
    input:
        questions=lambda w: spec(w.model).rag.questions,
        documents=rag_documents,
    output:
        identity="work/{model}/documents.json",
    log:
        "logs/{model}/check_documents.log",
    benchmark:
        "logs/{model}/check_documents.jsonl"
    wildcard_constraints:
        model="|".join(WITH_DOCUMENTS) or "(?!)",
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
        script=script("check_documents.py"),
        code=code_digest("check_documents.py"),
        documents=lambda w: spec(w.model).rag.documents,
        passage_characters=lambda w: spec(w.model).rag.passage_characters,
    shell:
        "{params.python} {params.script:q}"
        " --questions {input.questions:q}"
        " --documents {params.documents:q}"
        " --passage-characters {params.passage_characters}"
        " --output {output.identity:q}"
        " --log {log:q}"


rule answer_from_documents:
    """Ask the model questions with and without passages of documents."""
    input:
        manifest=lambda w: default_gguf(w.model) + ".json",
        gguf=lambda w: ancient(default_gguf(w.model)),
        identity="work/{model}/documents.json",
        questions=lambda w: ancient(spec(w.model).rag.questions),
        documents=lambda w: ancient(rag_documents(w)),
        llama_cpp="work/llama_cpp.json",
    output:
        report=report(
            "reports/{model}.rag.json",
            caption="../report/rag.rst",
            category="Answers",
            labels={"model": "{model}", "shows": "questions answered from documents"},
        ),
    log:
        "logs/{model}/answer_from_documents.log",
    benchmark:
        "logs/{model}/answer_from_documents.jsonl"
    wildcard_constraints:
        model="|".join(WITH_DOCUMENTS) or "(?!)",
    conda:
        "../envs/llama_cpp.yaml"
    threads: 8
    resources:
        mem_mb=lambda w: estimate.answer_needs(spec(w.model), spec(w.model).default_quant).mem_mb,
        disk_mb=lambda w: estimate.answer_needs(spec(w.model), spec(w.model).default_quant).disk_mb,
        runtime=lambda w: estimate.answer_needs(spec(w.model), spec(w.model).default_quant).runtime,
        gpu=0,
        gpu_mem_mb=0,
    params:
        python=interpreter,
        script=script("answer_from_documents.py"),
        code=code_digest("answer_from_documents.py"),
        name=ollama_name,
        system=system_option,
        messages=ollama_messages,
        settings=lambda w: as_options(spec(w.model).rag),
        llama_cpp=llama_cpp_options(),
    shell:
        "{params.python} {params.script:q}"
        " --gguf {input.gguf:q}"
        " --name {params.name:q}"
        " {params.system}"
        " --messages {params.messages:q}"
        " {params.settings}"
        " --output {output.report:q}"
        " {params.llama_cpp}"
        " --log {log:q}"
