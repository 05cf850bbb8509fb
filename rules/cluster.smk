# What a cluster's scheduler is told beside the needs, and asked before anything is run; no rules.
from lib.slurm import cluster_cards, longest_minutes, smallest_card, why_refused

try:
    CARDS = cluster_cards(os.environ.get("MODELMILL_GPUS", ""))
except ModelmillError as error:
    raise WorkflowError(str(error)) from None
GPU_PARTITION = os.environ.get("MODELMILL_GPU_PARTITION")


def tell_scheduler(step):
    """
    Have a rule ask for more time on every retry, and with its cards for their model and partition.

    The attempt is Snakemake's count of them; in a run without retries nothing changes.
    """
    needs = dict(step.resources.items())

    def value(name, wildcards, context):
        return needs[name].evaluate(wildcards, **context).value if name in needs else None

    def runtime(wildcards, **context):
        partition = slurm_partition(wildcards, **context)
        return min(value("runtime", wildcards, context) * context["attempt"], partition_minutes(partition))

    def gpu_model(wildcards, **context):
        if "gpu_model" in needs or not value("gpu", wildcards, context):
            return value("gpu_model", wildcards, context)
        return smallest_card(CARDS, value("gpu_mem_mb", wildcards, context))

    def slurm_partition(wildcards, **context):
        takes_card = value("gpu", wildcards, context)
        return GPU_PARTITION if takes_card and GPU_PARTITION else value("slurm_partition", wildcards, context)

    # A value of None leaves the resource out.
    for resource in (runtime, gpu_model, slurm_partition):
        step.resources[resource.__name__] = resource


def partition_minutes(partition):
    """The longest time that may be asked for; a plan that is only shown says what is needed."""
    return longest_minutes(partition) if is_slurm() else float("inf")


def is_slurm():
    return workflow.executor_plugin is not None and workflow.executor_plugin.name == "slurm"


# In a workflow that uses this one as a module there are others, too.
for STEP in workflow.rules:
    if Path(STEP.snakefile).parent == Path(workflow.current_basedir) and "runtime" in STEP.resources:
        tell_scheduler(STEP)


def refuse_unfit_jobs():
    """Refuse a run on a Slurm cluster that would take only some of its jobs."""
    if PROJECT.force or not is_slurm():
        return
    needed = [job for job in workflow.dag.needrun_jobs() if not job.is_local]
    submitted = sorted({workflow.dag.get_job_group(job) or job for job in needed}, key=submission_name)
    refused = [(job, reason) for job in submitted if (reason := refusal(job))]
    if refused:
        told = ["Slurm does not take these jobs of the plan (nothing was run):"]
        told += [f"{submission_name(job)} ({submission_needs(job)}): {reason}" for job, reason in refused]
        told += ["see README.md for partitions and models of GPUs; --config force=true runs it all the same"]
        raise WorkflowError("\n  ".join(told))


def refusal(job):
    """Why a job would not be taken, asked with the very command that the executor submits it with."""
    from snakemake_executor_plugin_slurm.submit_string import get_submit_command
    from snakemake_executor_plugin_slurm.utils import set_gres_string

    asked = job.resources
    if CARDS and asked.get("gpu") and not asked.get("gpu_model"):
        return f"no card of MODELMILL_GPUS ({', '.join(CARDS)}) has that memory"
    executor = workflow.scheduler._executor
    place = {
        "run_uuid": "modelmill-asks",
        "slurm_logfile": os.devnull,
        "comment_str": "",
        "account": next(executor.get_account_arg(job)),
        "partition": executor.get_partition_arg(job),
        "workdir": workflow.workdir_init,
    }
    command = get_submit_command(job, place, settings=workflow.executor_settings)
    return why_refused(command + set_gres_string(job))


def submission_name(job):
    """What is submitted as one job: a job, or a group of them."""
    return " + ".join(map(job_name, sorted(job.jobs, key=str))) if job.is_group() else job_name(job)


def submission_needs(job):
    asked = job.resources
    words = [f"{asked.mem_mb / 1000:.1f} GB of RAM", f"{job.threads} CPUs", f"{asked.runtime} minutes"]
    if asked.get("gpu"):
        model = f" ({asked.gpu_model})" if asked.get("gpu_model") else ""
        words.append(f"{asked.gpu} × {asked.gpu_mem_mb / 1000:.1f} GB of GPU{model}")
    return f"needs {', '.join(words)}"
