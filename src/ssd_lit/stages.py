"""The stages of the DAG: each finds its inputs by the layout, does its work and says in a few words what came."""

import argparse
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_lit.config import (
    ConfigError,
    RunConfig,
    dump,
    load_analysis,
    load_data,
    load_downstream,
    load_evaluation,
    load_experiment,
    load_resolved,
    load_run,
)
from ssd_lit.files import sha256, write_sealed, write_text
from ssd_lit.gpus import take_gpus
from ssd_lit.holding import alone
from ssd_lit.layout import (
    PhaseRecord,
    Totals,
    data_dir,
    measured_inputs,
    phase_dir,
    phase_inputs,
    read_chain,
    snapshots,
    work_dir,
    write_configs,
)
from ssd_lit.stopping import Stopped

if TYPE_CHECKING:
    from ssd_lit.tracking import RunTracker
    from ssd_lit.training.schedule import Phase

DONE_ALREADY = "it was done already; remove its phase.json to run it again"


def configs(args: argparse.Namespace) -> str:
    from ssd_lit.data.downstream import check_downstream
    from ssd_lit.data.sources import check_sources

    experiment = load_experiment(args.experiment)
    check_sources(experiment.data.sources)
    if experiment.downstream is not None:
        check_downstream(experiment.downstream)
    runs = write_configs(experiment, args.results)
    return f"{len(runs)} runs: {', '.join(run.name for run in runs)}"


def prepare(args: argparse.Namespace) -> str:
    from ssd_lit.data.documents import prepare_documents

    with alone(args.data_dir, "prepare"):
        card = prepare_documents(load_data(args.data_dir / "config.yaml"), args.data_dir / "documents", print)
    return ", ".join(f"{name} {split['documents']:,} documents" for name, split in card["splits"].items())


def tokenizer(args: argparse.Namespace) -> str:
    from ssd_lit.data.tokenizer import load_tokenizer, train_tokenizer

    config = load_data(args.data_dir / "config.yaml").tokenizer
    with alone(args.data_dir, "tokenizer"):
        train_tokenizer(config, args.data_dir / "documents", args.data_dir / "tokenizer")
    return f"{load_tokenizer(args.data_dir / 'tokenizer').get_vocab_size():,} entries"


def encode(args: argparse.Namespace) -> str:
    from ssd_lit.data.encode import encode_documents

    config = load_data(args.data_dir / "config.yaml")
    folder = args.data_dir
    with alone(folder, "encode"):
        index = encode_documents(
            folder / "documents",
            folder / "tokenizer",
            folder / "tokens",
            config.sequence_length,
            print,
            held_out=config.held_out,
        )
    return ", ".join(f"{name} {split['tokens']:,} tokens" for name, split in index["splits"].items())


def train(args: argparse.Namespace) -> str:
    """Train one phase; a phase that is done already stays as it is."""
    from ssd_lit.training.phase import close_phase, train_phase
    from ssd_lit.training.sharing import adopt_warmup
    from ssd_lit.training.trainer import is_first_process

    _check_mode(args.phase, "dense", "sparse")
    run_dir, config = args.run_dir, _run_config(args.run_dir)
    tokens = _tokens(run_dir, config)
    _take_machine(args, config, config.training.devices)
    if not is_first_process():
        phase, history = _open_phase(run_dir, config, args.phase)
        try:
            train_phase(run_dir, config, phase, history, tokens, recorder=None)
        except Stopped:
            # The first process answers for all; Lightning would kill it, were the status of another not 0.
            return "stopped with the first process"
        return "trained beside the first process, which keeps the records"

    def work(phase: "Phase", history: list[PhaseRecord], tracker: "RunTracker") -> PhaseRecord:
        if phase.index == 0 and config.shares_warmup is not None:
            return adopt_warmup(run_dir, run_dir.parent / config.shares_warmup, phase, tracker)
        train_phase(run_dir, config, phase, history, tokens, tracker)
        return close_phase(run_dir, config, phase, history, tokens)

    record = _run_phase(run_dir, config, args.phase, work)
    if record is None:
        return DONE_ALREADY
    return f"steps {record.first_step} to {record.last_step}, ended by {record.ended_by}; next: {record.next or 'none'}"


def moefy(args: argparse.Namespace) -> str:
    """MoEfy a checkpoint; a phase that is done already stays as it is."""
    from ssd_lit.training.moefication import moefy_phase

    _check_mode(args.phase, "moefy")
    run_dir, config = args.run_dir, load_run(args.run_dir / "config.yaml")
    _take_machine(args, config)

    def work(phase: "Phase", history: list[PhaseRecord], _: "RunTracker") -> PhaseRecord:
        return moefy_phase(run_dir, config, phase, history, _tokens(run_dir, config), _starting_point(run_dir, config))

    record = _run_phase(run_dir, config, args.phase, work)
    return DONE_ALREADY if record is None else f"{config.moe.experts} experts a layer; next: {record.next or 'none'}"


def route(args: argparse.Namespace) -> str:
    """Train the routers of a MoEfied model; a phase that is done already stays as it is."""
    from ssd_lit.training.router_phase import train_routers

    _check_mode(args.phase, "router")
    run_dir, config = args.run_dir, load_run(args.run_dir / "config.yaml")
    _take_machine(args, config)

    def work(phase: "Phase", history: list[PhaseRecord], tracker: "RunTracker") -> PhaseRecord:
        return train_routers(run_dir, config, phase, history, _tokens(run_dir, config), tracker)

    record = _run_phase(run_dir, config, args.phase, work)
    return DONE_ALREADY if record is None else f"{config.moe.router_steps} steps in {record.seconds:.1f} s"


def evaluate(args: argparse.Namespace) -> str:
    from ssd_lit.evaluation.run import evaluate_run, outcome

    run_dir, config = args.run_dir, load_run(args.run_dir / "config.yaml")
    _take_machine(args, config)
    chain = read_chain(run_dir, config.method)
    with alone(run_dir, "evaluate"), _tracker(run_dir, config, "evaluate", None) as tracker:
        shutil.rmtree(run_dir / "work", ignore_errors=True)
        settings = load_evaluation(run_dir / "evaluation.yaml")
        found = evaluate_run(run_dir, config, settings, chain, _tokens(run_dir, config))
        told = outcome(found)
        tracker.outcome(told, run_step=chain[-1].last_step)
        inputs = _evaluated(run_dir, config, chain, "evaluation.yaml")
        write_sealed(run_dir / "evaluation.json", {**found, **inputs})
    perplexities = {mode: told.get(f"eval/perplexity_{mode}") for mode in ("dense", "sparse")}
    return ", ".join(f"{mode} perplexity {value:.2f}" for mode, value in perplexities.items() if value is not None)


def analyse(args: argparse.Namespace) -> str:
    from ssd_lit.evaluation.analysis import analyse_run

    run_dir, config = args.run_dir, load_run(args.run_dir / "config.yaml")
    _take_machine(args, config)
    chain, folder = read_chain(run_dir, config.method), data_dir(_results(run_dir), config.data)
    with alone(run_dir, "analyse"), _tracker(run_dir, config, "analyse", None) as tracker:
        settings = load_analysis(run_dir / "analysis.yaml")
        found = analyse_run(run_dir, config, settings, chain, folder / "tokens", folder / "tokenizer")
        layers = found["experts"]["layers"] if found["experts"] else []
        means = {
            f"analysis/{name}": sum(layer[name] for layer in layers) / len(layers)
            for name in ("load_entropy", "dead_experts", "routing_recall")
            if layers
        }
        tracker.outcome(means, run_step=chain[-1].last_step)
        inputs = _evaluated(run_dir, config, chain, "analysis.yaml")
        digests = {name: sha256(run_dir / "analysis" / name) for name in found["written"]}
        write_sealed(run_dir / "analysis" / "analysis.json", {**found, **inputs, "digests": digests})
    return ", ".join(found["written"]) or f"nothing to write: {'; '.join(sorted(set(found['left_out'].values())))}"


def downstream(args: argparse.Namespace) -> str:
    """Try a model on other tasks; ended on its way, it goes on with the fine-tuning that was not done."""
    from ssd_lit.evaluation.downstream import means, try_downstream

    run_dir, config = args.run_dir, load_run(args.run_dir / "config.yaml")
    _take_machine(args, config)
    chain, folder = read_chain(run_dir, config.method), data_dir(_results(run_dir), config.data)
    here = run_dir / "downstream"
    with alone(run_dir, "downstream"), _tracker(run_dir, config, "downstream", None) as tracker:
        settings = load_downstream(run_dir / "downstream.yaml")
        found = try_downstream(
            run_dir, config, settings, chain, folder / "tokens", folder / "tokenizer", here / "pieces"
        )
        told = means(found)
        tracker.outcome(told, run_step=chain[-1].last_step)
        inputs = _evaluated(run_dir, config, chain, "downstream.yaml")
        write_sealed(here / "downstream.json", {**found, **inputs})
        shutil.rmtree(here / "pieces", ignore_errors=True)
    named = [f"{name.removeprefix('downstream/')} {value:.3f}" for name, value in told.items()]
    return ", ".join(named) or "; ".join(found["left_out"].values())


def summarise(args: argparse.Namespace) -> str:
    from ssd_lit.reporting.arms_table import write_arms
    from ssd_lit.reporting.downstream import write_downstream
    from ssd_lit.reporting.summary import write_summary

    experiment = load_resolved(args.exp_dir / "experiment.yaml")
    with alone(args.exp_dir, "summarise"):
        if experiment.downstream is not None:
            write_downstream(args.exp_dir, experiment.tried_runs())
        write_arms(args.exp_dir, experiment.runs())
        return str(write_summary(args.exp_dir, experiment.runs()))


def figures(args: argparse.Namespace) -> str:
    from ssd_lit.reporting.figures import write_figures

    with alone(args.exp_dir, "figures"):
        written = write_figures(args.exp_dir, load_resolved(args.exp_dir / "experiment.yaml"))
    return f"{len(written)} files in {args.exp_dir / 'figures'}"


def report(args: argparse.Namespace) -> str:
    from ssd_lit.provenance import provenance
    from ssd_lit.reporting.report import write_report
    from ssd_lit.reporting.summary import check_summary
    from ssd_lit.tracking import REPORT_SECONDS, try_for

    experiment = load_resolved(args.exp_dir / "experiment.yaml")
    results = args.exp_dir.absolute().parent
    with alone(args.exp_dir, "report"):
        check_summary(args.exp_dir, experiment.runs())
        path = write_report(args.exp_dir, experiment, data_dir(results, experiment.data), provenance())
        failed = try_for(REPORT_SECONDS, lambda: _send_experiment(args.exp_dir))
    if failed:
        print(f"{failed}; `ssd-lit send {args.exp_dir}` sends the report and what else waits", flush=True)
    return str(path)


def send(args: argparse.Namespace) -> str:
    """Tell MLflow what it has not got yet of a run, or of an experiment's runs with the report."""
    from ssd_lit.tracking import send_runs

    if (args.place / "experiment.yaml").exists():
        count = _send_experiment(args.place)
    elif (args.place / "config.yaml").exists():
        count = send_runs(_results(args.place), [args.place])
    else:
        raise ConfigError(f"{args.place}: neither an experiment (experiment.yaml) nor a run (config.yaml)")
    return f"points of {count} runs were waiting"


def _send_experiment(exp_dir: Path) -> int:
    """Send what waits in the runs of an experiment, and its report if there is one; returns the number of runs."""
    from ssd_lit.tracking import send_report, send_runs

    experiment = load_resolved(exp_dir / "experiment.yaml")
    results = exp_dir.absolute().parent
    count = send_runs(results, [exp_dir / "runs" / run.name for run in experiment.runs()])
    if (exp_dir / "report.html").exists():
        figures = sorted((exp_dir / "figures").iterdir())
        files = {None: [exp_dir / "report.html", exp_dir / "summary.csv"], "figures": figures}
        send_report(results, experiment.experiment, files)
    return count


def verify(args: argparse.Namespace) -> str:
    """Say of everything in a run or experiment whether it matches; ConfigError if something does not."""
    from ssd_lit.verify import verify as verify_folder

    looked_at, mismatches = verify_folder(args.folder, print)
    if mismatches:
        raise ConfigError(f"{mismatches} of {looked_at} things do not match")
    return f"all {looked_at} things match"


def store(args: argparse.Namespace) -> str:
    from ssd_lit.tracking import ensure_store, masked, tracking_uri

    ensure_store(args.results)
    return masked(tracking_uri(args.results))


def ui(args: argparse.Namespace) -> str:
    import socket

    from ssd_lit.tracking import serve

    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", args.port)) == 0:
            raise ConfigError(f"port {args.port} is taken; give another with --port")
    command = serve(args.results, args.port)
    print(f"MLflow UI: http://127.0.0.1:{args.port} (Ctrl-C ends it)", flush=True)
    os.execvp(command[0], command)


def _run_phase(
    run_dir: Path,
    config: RunConfig,
    name: str,
    work: Callable[["Phase", list[PhaseRecord], "RunTracker"], PhaseRecord],
) -> PhaseRecord | None:
    """Do the work of a phase under the run's lock and write its record last; None if it is done already."""
    with alone(run_dir, name):
        phase, history = _open_phase(run_dir, config, name)
        done = phase_dir(run_dir, phase.index, phase.mode)
        folder = work_dir(run_dir, phase.index, phase.mode)
        begun = _holds(folder / "config.yaml", dump(config))
        # Whoever held the run until now may have done the phase, but by another config, and a workflow that did not
        # know of it may have removed one of the files.
        if all((done / file).exists() for file in ("phase.json", "last.ckpt")) and (begun or not folder.exists()):
            return None
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)
            _forget_later_snapshots(run_dir, phase)
        _forget_others(run_dir, phase.index)
        with _tracker(run_dir, config, phase.name, None if begun else phase.first_step) as tracker:
            # From here on the recorded points beyond the phase's first step are those of this config.
            write_text(folder / "config.yaml", dump(config))
            origin = _origin(run_dir, config, history)
            record = replace(work(phase, history, tracker), weights=sha256(done / "last.ckpt"), **origin)
            tracker.outcome(
                {"steps": record.steps, "tokens": record.tokens, "flops": record.flops, "seconds": record.seconds},
                {"mode": record.mode, "ended_by": record.ended_by},
            )
        record.write(done / "phase.json")
    return record


def _take_machine(args: argparse.Namespace, config: RunConfig, processes: int = 1) -> None:
    """The threads and algorithms that the run's config gives a stage, and a GPU for each process that works on it."""
    import torch

    take_gpus(processes)
    if config.training.deterministic:
        # Read when the GPU is first used; torch asks for it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.training.deterministic)
    # For finding reads of what was never written; nothing of ours does that.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(max(1, (args.threads or config.training.threads) // processes))


def _run_config(run_dir: Path) -> RunConfig:
    """The config of a run, with the steps that another run's FLOPs pay for where it is to match them."""
    config = load_run(run_dir / "config.yaml")
    if config.matches is None:
        return config
    from ssd_lit.data.blocks import load_index
    from ssd_lit.data.objectives import Specials
    from ssd_lit.training.budget import with_steps_for

    other = run_dir.parent / config.matches
    spent = read_chain(other, load_run(other / "config.yaml").method)[-1].total
    return with_steps_for(config, spent.flops, Specials.of(load_index(_tokens(run_dir, config))))


def _open_phase(run_dir: Path, config: RunConfig, name: str) -> tuple["Phase", list[PhaseRecord]]:
    """The phase of that name and the records of those before it; ValueError if the run has no such phase."""
    from ssd_lit.training.schedule import next_phase

    number = name.split("-")[0]
    if not number.isdecimal():
        raise ConfigError(f"phase {name!r}: expected a number and a mode, such as 02-sparse")
    history = read_chain(run_dir, config.method, before=int(number))
    phase = next_phase(config, history)
    if phase is None or phase.name != name:
        raise ConfigError(f"phase {name!r}: run {config.name} goes on with {phase.name if phase else 'no phase'}")
    return phase, history


def _check_mode(phase: str, *modes: str) -> None:
    """Raise ConfigError if the phase of that name is one for another stage."""
    mode = phase.partition("-")[2]
    if mode not in modes:
        raise ConfigError(f"phase {phase!r}: this stage is for phases such as 02-{modes[-1]}")


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


def _forget_others(run_dir: Path, index: int) -> None:
    """Remove what followed from an earlier run of the phase that begins now, and the work of all other phases.

    A phase keeps its work until the next stage begins: killed before Snakemake knows that it is done, it need not
    train again.
    """
    for folder in (run_dir / "phases").glob("*-*"):
        if int(folder.name.split("-")[0]) > index:
            shutil.rmtree(folder)
    for folder in (run_dir / "work").glob("*-*"):
        if int(folder.name.split("-")[0]) != index:
            shutil.rmtree(folder)


def _forget_later_snapshots(run_dir: Path, phase: "Phase") -> None:
    for step, snapshot in snapshots(run_dir):
        if step > phase.first_step:
            snapshot.unlink()


def _starting_point(run_dir: Path, config: RunConfig) -> tuple[Path, Totals] | None:
    """The final checkpoint of the run that this one starts from, and what it has spent."""
    if config.starts_from is None:
        return None
    other = run_dir.parent / config.starts_from
    last = read_chain(other, load_run(other / "config.yaml").method)[-1]
    return phase_dir(other, last.index, last.mode) / "last.ckpt", last.total


def _origin(run_dir: Path, config: RunConfig, history: list[PhaseRecord]) -> dict[str, Any]:
    """What the next phase is made from, and by what."""
    from ssd_lit.data.blocks import load_index
    from ssd_lit.provenance import stage_provenance

    tokens = load_index(_tokens(run_dir, config))["digest"]
    return {"inputs": phase_inputs(run_dir, config, history, tokens), "provenance": stage_provenance(config, tokens)}


def _evaluated(run_dir: Path, config: RunConfig, chain: list[PhaseRecord], settings: str) -> dict[str, Any]:
    """What was measured, with which settings, and by what."""
    from ssd_lit.data.blocks import load_index
    from ssd_lit.provenance import stage_provenance

    tokens = load_index(_tokens(run_dir, config))["digest"]
    return {"inputs": measured_inputs(run_dir, chain, settings, tokens), "provenance": stage_provenance(config, tokens)}


def _tracker(run_dir: Path, config: RunConfig, stage: str, resume_step: int | None) -> "RunTracker":
    from ssd_lit.data.blocks import load_index
    from ssd_lit.provenance import git_commit
    from ssd_lit.tracking import RunTracker

    digest = load_index(_tokens(run_dir, config))["digest"]
    return RunTracker(
        run_dir, config, _results(run_dir),
        stage=stage, data_digest=digest[:36], commit=git_commit(), resume_step=resume_step,
    )  # fmt: skip


def _tokens(run_dir: Path, config: RunConfig) -> Path:
    return data_dir(_results(run_dir), config.data) / "tokens"


def _results(run_dir: Path) -> Path:
    # Not resolved: an experiment's folder may be a link to another disk.
    return run_dir.absolute().parents[2]
