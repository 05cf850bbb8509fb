# Config, specs and the input functions that rules of several files have; no rules.
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

from snakemake.exceptions import WorkflowError

# Relative to the working directory, so that no path of this machine reaches a command or a parameter.
ROOT = os.path.relpath(Path(workflow.current_basedir) / "..")
sys.path.insert(0, f"{ROOT}/scripts")

from lib import estimate, heatmap_estimate
from lib.budget import AUTO
from lib.checkpoint import is_side_file
from lib.cli import usable_cores
from lib.code import code_digest
from lib.config import as_yaml, put_over
from lib.config_file import read_config_file, repeated_keys
from lib.decisions import merge_decisions, training_decisions, type_decisions
from lib.documents import document_files
from lib.errors import ModelmillError
from lib.heatmap_spec import LABELS
from lib.jsonfile import digest_json
from lib.locks import join_runs
from lib.options import as_options
from lib.quant_types import QUANTIZED_TYPES, SOURCE_TYPES
from lib.quality_report import Matrices
from lib.quantize_path import JOIN, QuantizePaths
from lib.resource_report import report_resources
from lib.sizes import CONTEXT, cache_bytes
from lib.spec import resolve_project
from lib.targets import (
    ADAPTER,
    evaluated,
    explain_target,
    final_files,
    model_names,
    passed_file,
    report_files,
    wrong_targets,
)
from lib.typed import plain

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

# Of merging and building directly: a cluster gives what their rules say, and here they take the cores that there are.
THREADS = estimate.THREADS if workflow.non_local_exec else usable_cores()
RESOURCES = ("mem_mb", "disk_mb", "runtime", "gpu", "gpu_mem_mb")

# Said in the plan; a job's own log says it as well.
if workflow.output_settings.dryrun:
    # What jobs ask for, not what a limit (`--resources`) leaves of it.
    for name in RESOURCES:
        workflow.global_resources[name] = None
    for decisions in (training_decisions(PROJECT), merge_decisions(PROJECT, PATHS), type_decisions(PROJECT)):
        for line in decisions.values():
            print(line, file=sys.stderr)


wildcard_constraints:
    model=model_names(PROJECT),
    base=r"(\.base)?",
    source="|".join(SOURCE_TYPES),
    quant="|".join([*QUANTIZED_TYPES, AUTO]),
    suffix="|".join(["", re.escape(ADAPTER), *(rf"\.{quant}" for quant in (*SOURCE_TYPES, *QUANTIZED_TYPES, AUTO))]),


def spec(model):
    """The resolved model of that name, of either kind."""
    return PROJECT.model(model)


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


def llama_cpp_options():
    """Which llama.cpp, as options of the scripts that use it."""
    chosen = PROJECT.llama_cpp
    options = {f"--llama-cpp-{name}": getattr(chosen, name) for name in ("version", "sha256", "commit", "path")}
    given = [f"{option}={value}" for option, value in options.items() if value is not None]
    return shlex.join([*given, *(f"--llama-cpp-cmake-flag={flag}" for flag in chosen.cmake_flags)])


def default_gguf(model, base=""):
    """The GGUF file of a model's default type."""
    return f"models/{model}{base}.{spec(model).default_quant}.gguf"


def adapter_manifest(wildcards):
    return f"adapters/{wildcards.model}/MANIFEST.json" if spec(wildcards.model).adapter else []


def quantize_source(wildcards):
    return f"models/{wildcards.model}{wildcards.base}.{spec(wildcards.model).source_type}.gguf"


def tuned(wildcards):
    """The wildcards of a model's own files, for rules that have none for its base."""
    return SimpleNamespace(model=wildcards.model, base="")


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


def modelfile_gguf(wildcards):
    """The weights of a Modelfile: with an adapter beside them those of the base."""
    if wildcards.suffix == ADAPTER:
        return default_gguf(wildcards.model, ".base")
    suffix = wildcards.suffix or f".{spec(wildcards.model).default_quant}"
    return f"models/{wildcards.model}{suffix}.gguf"


def modelfile_adapter(wildcards):
    return [f"models/{wildcards.model}{ADAPTER}.gguf"] if wildcards.suffix == ADAPTER else []


def questions_options(wildcards):
    """The held-out questions that a registered model is asked."""
    smoke = spec(wildcards.model).smoke
    return shlex.join([f"--questions={smoke.questions}", f"--max-tokens={smoke.max_tokens}"]) if smoke else ""


def rag_documents(wildcards):
    return [str(file) for file in document_files(Path(spec(wildcards.model).rag.documents))]


def explain_wrong_target(wildcards):
    # Not an exception of Snakemake's: it would show a traceback of this function to the user.
    sys.exit(explain_target(wildcards.wrong, PROJECT))


include: "inputs/base.smk"
include: "inputs/adapter.smk"
include: "inputs/gguf.smk"
include: "inputs/imatrix.smk"
include: "inputs/heatmap.smk"
include: "inputs/quality.smk"
