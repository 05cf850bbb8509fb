# Input functions of rules/quality.smk.


def quantized_types(wildcards):
    """The types that a model is built in, those in 16 bits left out."""
    return [quant for quant in spec(wildcards.model).quantize.types if quant in QUANTIZED_TYPES]


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
