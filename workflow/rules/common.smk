# The experiment: read and checked before anything runs.
import sys
from pathlib import Path

from ssd_lit.config import ConfigError
from ssd_lit.paths import write_configs
from ssd_lit.pipeline.plan import Plan, experiment_of
from ssd_lit.pipeline.resources import DATA_CORES, NAMES, launcher, limit
from ssd_lit.report.figures import figures_of

# Who stops a job signals every process of it: the shell and the log wait for the stage to end by itself.
# Snakemake removes a job's log when it starts it again; under a second name beside it the file stays, and grows.
PREFIX = (
    "set -euo pipefail; trap : TERM USR1 INT; "
    'keep() {{ trap \'\' TERM USR1 INT; local all; all=$(dirname -- "$1")/.$(basename -- "$1"); touch -- "$all"; '
    'ln -f -- "$all" "$1" || true; exec tee -a -- "$1"; }}; '
)
# Slurm queues a job again whose stage was stopped (75). It would do that to a cancelled one, which runs no more.
REQUEUE = (
    'requeue() {{ if [ "$1" = 75 ] && [ -n "$(squeue -h -j "$SLURM_JOB_ID" -t RUNNING)" ]; then '
    'scontrol requeue "$SLURM_JOB_ID"; fi; }}; [ -z "${{SLURM_JOB_ID-}}" ] || trap \'requeue $?\' EXIT; '
)
shell.prefix(PREFIX + REQUEUE if workflow.remote_exec else PREFIX)

RESULTS = Path(str(config.get("results", "results")))

try:
    if {"{", "}"} & set(str(RESULTS)):
        raise ConfigError(f"results {str(RESULTS)!r}: Snakemake takes braces for wildcards; name another folder")
    EXPERIMENT = experiment_of(config)
    PLAN = Plan(EXPERIMENT, RESULTS)
except ConfigError as error:
    sys.exit(f"ssd_lit: {error}")

JOBS = config.get("jobs", "stages")
DATA, HERE = PLAN.data, PLAN.here
SUMMARY, ARMS_TABLE, REPORT = HERE / "summary.csv", HERE / "arms.csv", HERE / "report.html"
DOWNSTREAM_TABLE = [] if EXPERIMENT.downstream is None else [HERE / "downstream.csv"]
CAPTIONS = {name: f"{kind.title}. {kind.caption}" for name, kind in figures_of(EXPERIMENT).items()}
GPU_SHARE = config.get("gpu_share", 1)

# As many runs work side by side as have room on the GPUs, if there are any. `--resources gpu=N` is stronger. While this
# is read the executor is not known; those of a cluster are given no cores.
if not workflow.remote_exec and workflow.resource_settings.cores is not None:
    for name, total in limit(GPU_SHARE).items():
        if name not in workflow.global_resources:
            workflow.register_resource(name, total)

# As many runs work side by side as have room; how many threads one takes decides its bits, so its config says.
THREADS = {name: run.training.threads for name, run in PLAN.configs.items()}

# A run of many stages is a long chain of jobs: where cores are few, it goes first.
PRIORITY = {
    name: 10 if run.method == "ssd" else 5 if run.method == "dense" else 0 for name, run in PLAN.configs.items()
}


wildcard_constraints:
    run="|".join(PLAN.configs),


def on_cluster():
    """Whether jobs go to a cluster: in the process that submits them, and in those that it starts there."""
    return workflow.remote_exec or workflow.non_local_exec


def asked(stage):
    """What the job of a stage asks for, by name; of a whole run for the stage `run`."""

    def resource(name):
        return lambda wildcards: PLAN.resources(wildcards.run, stage, uses_gpu=GPU_SHARE > 0, cluster=on_cluster()).get(
            name
        )

    return {name: resource(name) for name in NAMES}


def anew(stage):
    """`--from STAGE` where Snakemake was told to force the stage: what is done stays as it is otherwise."""

    def option(wildcards):
        settings = workflow.dag_settings
        asked = {*settings.forcerun, *(settings.targets if settings.forcetargets else [])}
        forced = settings.forceall or asked & {stage, str(PLAN.stage(wildcards.run, stage))}
        # The job of a scheduler forces its one target, whatever was asked for.
        return f"--from {stage}" if forced and not workflow.remote_exec else ""

    return option
