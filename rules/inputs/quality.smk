# Input functions of rules/quality.smk.


def quantized_types(wildcards):
    """The types that a model is built in, those in 16 bits and `auto` left out."""
    return [quant for quant in spec(wildcards.model).quantize.types if quant in QUANTIZED_TYPES]


def judged_types(wildcards):
    """The types that limits are for, as options of check_quality.py."""
    if type_file(wildcards):
        return f"--chosen={type_file(wildcards)}"
    return f"--types {' '.join(quantized_types(wildcards))}"


def type_file(wildcards):
    """What tells which type `auto` stands for."""
    return f"work/{wildcards.model}/type.json" if spec(wildcards.model).quantize.is_auto else []


def matrices_of(wildcards):
    """What the importance matrices are computed from, in words."""
    model = spec(wildcards.model)
    own, general = model.quantize.imatrix, model.quality.general_text
    described = own and ("training data" if own.of_training else Path(own.text).name)
    return Matrices(described, general and Path(general).name)


def merges_file(wildcards):
    return f"work/{wildcards.model}/quality.merges.json" if spec(wildcards.model).quality.base_weights else []


def merges_needs(wildcards):
    return estimate.compare_merges_needs(spec(wildcards.model), PROJECT.hardware)


def tuning_file(wildcards):
    return f"work/{wildcards.model}/quality.tuning.json" if spec(wildcards.model).holds_out else []


def tuning_needs(wildcards):
    return estimate.measure_tuning_needs(spec(wildcards.model), PROJECT.hardware)


def compared_files(wildcards):
    """The files that are compared; those of which one is to be chosen are made for it alone, one after the other."""
    model = spec(wildcards.model)
    if model.quantize.is_auto:
        return []
    return [f"models/{wildcards.model}.{quant}.gguf" for quant in model.compared_types]


def compared_matrix(wildcards):
    """The model's importance matrix, where types are made with it for the comparison."""
    model = spec(wildcards.model)
    made = model.quantize.is_auto and any(map(model.quantize.uses_imatrix, model.quantize.candidates))
    return [imatrix_file(tuned(wildcards))] if made else []


def compared_options(wildcards):
    """What is compared: these files, and those that are made for it."""
    types, matrices = spec(wildcards.model).compared_types, matrices_of(wildcards)
    files = dict(zip(types, compared_files(wildcards)))
    words = [f"--imatrix={file}" for file in compared_matrix(wildcards)] + ["--types"]
    for quant in types:
        own = f"{quant}={files[quant]}" if files else quant
        words += [own, *(f"{quant}{variant}" for variant in matrices.variants(quant) if variant)]
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
