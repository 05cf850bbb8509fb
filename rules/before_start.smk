# What is checked once the jobs of a run are known, before the first of them; no rules.
from snakemake.io import is_flagged

from lib.locks import writer_of


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
        for job in needed_jobs()
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
