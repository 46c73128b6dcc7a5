"""What an experiment shows: tables, figures, report, and what MLflow has of it."""

import csv
import os
from pathlib import Path

from ssd_lit.config import ConfigError, load_resolved
from ssd_lit.paths import data_dir, results_of
from ssd_lit.pipeline.tracking import charts_of
from ssd_lit.run import Run
from ssd_lit.support.locks import exclusive
from ssd_lit.tracking.spool import Spool


def summarise(exp_dir: Path) -> str:
    from ssd_lit.report.downstream import write_downstream
    from ssd_lit.report.tables import write_arms, write_summary

    experiment = load_resolved(exp_dir / "experiment.yaml")
    with exclusive(exp_dir, "summarise"):
        if experiment.downstream is not None:
            write_downstream(exp_dir, experiment.downstream_runs())
        write_arms(exp_dir, experiment.runs())
        return str(write_summary(exp_dir, experiment.runs()))


def figures(exp_dir: Path) -> str:
    from ssd_lit.report.figures import write_figures

    with exclusive(exp_dir, "figures"):
        written = write_figures(exp_dir, load_resolved(exp_dir / "experiment.yaml"))
    return f"{len(written)} files in {exp_dir / 'figures'}"


def report(exp_dir: Path) -> str:
    from ssd_lit.report.page import write_report
    from ssd_lit.report.tables import check_summary
    from ssd_lit.support.provenance import provenance
    from ssd_lit.tracking.delivery import REPORT_SECONDS, try_for

    experiment = load_resolved(exp_dir / "experiment.yaml")
    results = results_of(exp_dir, experiment.data)
    with exclusive(exp_dir, "report"):
        check_summary(exp_dir, experiment.runs())
        charts = charts_of(exp_dir / "runs" / run.name for run in experiment.runs())
        path = write_report(exp_dir, experiment, data_dir(results, experiment.data), provenance(), charts)
        failed = try_for(REPORT_SECONDS, lambda: _send_experiment(exp_dir))
    if failed:
        print(f"{failed}; `ssd-lit send {exp_dir}` sends the report and what else waits", flush=True)
    return str(path) if charts is None else f"{path}; charts at {charts}"


def send(place: Path) -> str:
    """Tell MLflow what it has not got yet of a run, or of an experiment's runs with the report."""
    from ssd_lit.tracking.delivery import send_runs

    if (place / "experiment.yaml").exists():
        count = _send_experiment(place)
    elif (place / "config.yaml").exists():
        count = send_runs(Run.open(place).results, [place])
    else:
        raise ConfigError(f"{place}: neither an experiment (experiment.yaml) nor a run (config.yaml)")
    return f"points of {count} runs were waiting"


def _send_experiment(exp_dir: Path) -> int:
    """Send what waits in the runs of an experiment, and its report if there is one; returns the number of runs."""
    from ssd_lit.tracking.delivery import send_report, send_runs

    experiment = load_resolved(exp_dir / "experiment.yaml")
    results = results_of(exp_dir, experiment.data)
    run_dirs = [exp_dir / "runs" / run.name for run in experiment.runs()]
    count = send_runs(results, run_dirs)
    if (exp_dir / "report.html").exists():
        figures = sorted(path for path in (exp_dir / "figures").iterdir() if not path.name.startswith("."))
        files = {None: [exp_dir / "report.html", exp_dir / "summary.csv"], "figures": figures}
        known = [Spool(folder).record.run_id for folder in run_dirs if Spool.exists(folder)]
        send_report(results, experiment.experiment, files, _arms_table(exp_dir), next(iter(known), None))
    return count


def _arms_table(exp_dir: Path) -> dict[str, dict[str, list[str]]]:
    """arms.csv as a table for MLflow, if it was written."""
    path = exp_dir / "arms.csv"
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        heading, *rows = csv.reader(file)
    return {"arms": {name: [row[column] for row in rows] for column, name in enumerate(heading)}}


def verify(folder: Path) -> str:
    """Say of everything in a run or experiment whether it matches; ConfigError if something does not."""
    from ssd_lit.pipeline.verify import verify as verify_folder

    looked_at, mismatches = verify_folder(folder, print)
    if mismatches:
        raise ConfigError(f"{mismatches} of {looked_at} things do not match")
    return f"all {looked_at} things match"


def store(results: Path) -> str:
    from ssd_lit.tracking.store import masked, ready_store

    return masked(ready_store(results))


def ui(results: Path, port: int) -> str:
    import socket

    from ssd_lit.tracking.store import connect, masked, reason, serve, tracking_uri
    from ssd_lit.tracking.view import chart_link

    if tracking_uri(results).startswith(("http:", "https:")):
        raise ConfigError(f"MLFLOW_TRACKING_URI is a server with a UI of its own: open {masked(tracking_uri(results))}")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ConfigError(f"port {port} is taken; give another with --port")
    try:
        experiments = connect(results).search_experiments()
    except Exception as error:  # of many types, from the database
        raise ConfigError(f"MLflow at {masked(tracking_uri(results))}: {reason(error)}") from None
    for experiment in experiments:
        if experiment.name != "Default":  # MLflow's own, without runs
            print(f"{experiment.name}: {chart_link(experiment.experiment_id, port)}", flush=True)
    command = serve(results, port)
    print(f"MLflow UI: http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    os.execvp(command[0], command)
