# Input functions of rules/imatrix.smk.


def imatrix_source(wildcards):
    """The file whose importance matrix is computed; on the direct path no 16-bit one is needed for it."""
    if PATHS.imatrix_source(wildcards.model, wildcards.base) == "q8_0":
        return f"models/{wildcards.model}{wildcards.base}.q8_0.gguf"
    return quantize_source(wildcards)


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
