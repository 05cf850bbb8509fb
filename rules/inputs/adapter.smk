# Input functions of rules/adapter.smk.


def method_reason(wildcards, input):
    return spec(wildcards.model).adapter.train.method_reason


def adapter_folder(wildcards, input):
    """Where the adapter is that is taken; no recorded parameter, since its files are recorded as inputs."""
    return spec(wildcards.model).adapter.path


def held_out_data(wildcards):
    return spec(wildcards.model).adapter.train.eval_data or []


def held_out_option(wildcards):
    return shlex.join(f"--eval-data={file}" for file in [held_out_data(wildcards)] if file)


def division_options(wildcards):
    """What decides how training data are cut and divided, as options of render_data.py."""
    train = spec(wildcards.model).adapter.train
    options = [f"--max-length={train.max_length}"]
    options += [f"--eval-data={train.eval_data}"] if train.eval_data else []
    # Nothing is drawn where nothing is held out, and another seed then reruns nothing.
    options += [f"--eval-fraction={train.eval_fraction}", f"--seed={train.seed}"] if train.eval_fraction else []
    return shlex.join(options)
