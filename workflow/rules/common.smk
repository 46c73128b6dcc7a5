# The experiment: read and checked before anything runs, resolved into one config file for each run.
import sys
from pathlib import Path

from ssd_lit.config import ConfigError, load_experiment
from ssd_lit.data.downstream import check_downstream
from ssd_lit.data.sources import check_sources
from ssd_lit.layout import FIRST_MODE, PhaseRecord, data_dir, phase_name, run_dir, write_configs
from ssd_lit.reporting.names import caption_name, figure_names

# A scheduler that stops a job signals every process of it: the shell and the log wait for the stage to end by itself.
shell.prefix("set -euo pipefail; trap : TERM USR1; keep() {{ trap '' TERM USR1; exec tee \"$@\"; }}; ")

RESULTS = Path(config.get("results", "results"))


def experiment_file():
    """configs/NAME.yaml for `--config experiment=NAME`, or the file itself if a path is given."""
    name = str(config.get("experiment", "default"))
    return Path(name) if name.endswith((".yaml", ".yml")) else Path("configs") / f"{name}.yaml"


try:
    EXPERIMENT = load_experiment(experiment_file())
    DATA = data_dir(RESULTS, EXPERIMENT.data)
    if not (DATA / "documents").exists():
        check_sources(EXPERIMENT.data.sources)
    if EXPERIMENT.downstream is not None:
        check_downstream(EXPERIMENT.downstream)
except ConfigError as error:
    sys.exit(f"ssd_lit: {error}")

RUNS = {run.name: run for run in write_configs(EXPERIMENT, RESULTS)}
HERE = RESULTS / EXPERIMENT.experiment
SUMMARY, ARMS_TABLE, REPORT = HERE / "summary.csv", HERE / "arms.csv", HERE / "report.html"
FIGURES = figure_names(EXPERIMENT)
ANALYSES = [] if EXPERIMENT.analysis is None else expand(HERE / "runs/{run}/analysis/analysis.json", run=RUNS)
DOWNSTREAM, DOWNSTREAM_TABLE = [], []
if EXPERIMENT.downstream is not None:
    TRIED = [run.name for run in EXPERIMENT.tried_runs()]
    DOWNSTREAM = expand(HERE / "runs/{run}/downstream/downstream.json", run=TRIED)
    DOWNSTREAM_TABLE = [HERE / "downstream.csv"]

# As many runs work side by side as have room; how many threads one takes decides its bits, so its config says.
THREADS = {name: run.training.threads for name, run in RUNS.items()}

# A run of many phases is a long chain of jobs: where cores are few, it goes first.
PRIORITY = {name: 10 if run.method == "ssd" else 5 if run.method == "dense" else 0 for name, run in RUNS.items()}


wildcard_constraints:
    run="|".join(RUNS),
    index=r"\d\d",
    mode="dense|sparse",


def phases_of(run, before=None):
    """Phases of a run that are done, by asking each for the next; waits in the DAG for one that is not."""
    done, mode = [], FIRST_MODE[RUNS[run].method]
    while mode is not None and len(done) != before:
        place = {"run": run, "index": f"{len(done):02d}"}
        match mode:
            case "moefy":
                record = checkpoints.moefy.get(**place).output.record
            case "router":
                record = checkpoints.route.get(**place).output.record
            case _:
                record = checkpoints.train.get(**place, mode=mode).output.record
        done.append(Path(record).parent)
        mode = PhaseRecord.read(Path(record)).next
    return done


def phase_before(wildcards):
    """The phase that a phase goes on from; for the first, that of another run, if it depends on one."""
    index, run = int(wildcards.index), RUNS[wildcards.run]
    if index:
        return phases_of(run.name, before=index)[-1] / "last.ckpt"
    if run.shares_warmup:
        return phases_of(run.shares_warmup, before=1)[-1] / "last.ckpt"
    other = run.starts_from or run.matches
    return phases_of(other)[-1] / "last.ckpt" if other else []


def final_phase(wildcards):
    return phases_of(wildcards.run)[-1] / "last.ckpt"
