# Input functions of rules/gguf.smk.


def checkpoint_folder(wildcards, input):
    """The checkpoint that a 16-bit GGUF is made from."""
    return base_folder(wildcards, input) if wildcards.base else f"models/{wildcards.model}/merged"


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


def checkpoint_manifest(wildcards):
    return (
        f"bases/{wildcards.model}/MANIFEST.json" if wildcards.base else f"models/{wildcards.model}/merged/MANIFEST.json"
    )


def merged_folder(wildcards):
    """The merged folder, so that it is kept until it is converted; its manifest tells when it changed."""
    return [] if wildcards.base else ancient(f"models/{wildcards.model}/merged")


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


def chosen_file(wildcards):
    return type_file(wildcards) if wildcards.quant == AUTO else []


def quant_option(wildcards):
    return f"--chosen={chosen_file(wildcards)}" if chosen_file(wildcards) else f"--quant={wildcards.quant}"


def budget_options(wildcards):
    """What the file may take, as options of choose_type.py."""
    model = spec(wildcards.model)
    budget = model.quantize.budget
    if budget.file is not None:
        return f"--file={budget.file}"
    cache = cache_bytes(estimate.shape_of(model), model.ollama.parameters.get("num_ctx", CONTEXT))
    return f"--gpu-memory={budget.gpu_memory} --cache={cache}"


def imatrix_file(wildcards):
    return f"models/{wildcards.model}{wildcards.base}.imatrix.gguf"
