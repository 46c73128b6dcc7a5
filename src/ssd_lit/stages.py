"""The stages of the DAG: each finds its inputs by the layout, does its work and says in a few words what came."""

import argparse
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from ssd_lit.config import (
    ConfigError,
    RunConfig,
    dump,
    load_analysis,
    load_data,
    load_downstream,
    load_evaluation,
    load_experiment,
    load_run,
)
from ssd_lit.files import read_json, write_json, write_text
from ssd_lit.layout import (
    PhaseRecord,
    Totals,
    data_dir,
    phase_dir,
    read_chain,
    snapshots,
    work_dir,
    write_configs,
)

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

    card = prepare_documents(load_data(args.data_dir / "config.yaml"), args.data_dir / "documents", print)
    return ", ".join(f"{name} {split['documents']:,} documents" for name, split in card["splits"].items())


def tokenizer(args: argparse.Namespace) -> str:
    from ssd_lit.data.tokenizer import load_tokenizer, train_tokenizer

    config = load_data(args.data_dir / "config.yaml").tokenizer
    train_tokenizer(config, args.data_dir / "documents", args.data_dir / "tokenizer")
    return f"{load_tokenizer(args.data_dir / 'tokenizer').get_vocab_size():,} entries"


def encode(args: argparse.Namespace) -> str:
    from ssd_lit.data.encode import encode_documents

    config = load_data(args.data_dir / "config.yaml")
    folder = args.data_dir
    index = encode_documents(
        folder / "documents", folder / "tokenizer", folder / "tokens", config.sequence_length, print
    )
    return ", ".join(f"{name} {split['tokens']:,} tokens" for name, split in index["splits"].items())


def train(args: argparse.Namespace) -> str:
    """Train one phase; a phase that is done already stays as it is."""
    import torch

    from ssd_lit.training.phase import close_phase, train_phase
    from ssd_lit.training.sharing import adopt_warmup
    from ssd_lit.training.trainer import is_first_process

    run_dir, config = args.run_dir, _run_config(args.run_dir)
    tokens = _tokens(run_dir, config)
    torch.set_num_threads(max(1, args.threads // config.training.devices))
    if not is_first_process():
        phase, history = _open_phase(run_dir, config, args.phase)
        train_phase(run_dir, config, phase, history, tokens, recorder=None)
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
    import torch

    from ssd_lit.training.moefication import moefy_phase

    torch.set_num_threads(args.threads)
    run_dir, config = args.run_dir, load_run(args.run_dir / "config.yaml")

    def work(phase: "Phase", history: list[PhaseRecord], _: "RunTracker") -> PhaseRecord:
        return moefy_phase(run_dir, config, phase, history, _tokens(run_dir, config), _starting_point(run_dir, config))

    record = _run_phase(run_dir, config, args.phase, work)
    return DONE_ALREADY if record is None else f"{config.moe.experts} experts a layer; next: {record.next or 'none'}"


def route(args: argparse.Namespace) -> str:
    """Train the routers of a MoEfied model; a phase that is done already stays as it is."""
    import torch

    from ssd_lit.training.router_phase import train_routers

    torch.set_num_threads(args.threads)
    run_dir, config = args.run_dir, load_run(args.run_dir / "config.yaml")

    def work(phase: "Phase", history: list[PhaseRecord], tracker: "RunTracker") -> PhaseRecord:
        return train_routers(run_dir, config, phase, history, _tokens(run_dir, config), tracker)

    record = _run_phase(run_dir, config, args.phase, work)
    return DONE_ALREADY if record is None else f"{config.moe.router_steps} steps in {record.seconds:.1f} s"


def evaluate(args: argparse.Namespace) -> str:
    import torch

    from ssd_lit.evaluation.run import evaluate_run

    torch.set_num_threads(args.threads)
    run_dir, config = args.run_dir, load_run(args.run_dir / "config.yaml")
    chain = read_chain(run_dir, config.method)
    with _alone(run_dir), _tracker(run_dir, config, "evaluate", None) as tracker:
        shutil.rmtree(run_dir / "work", ignore_errors=True)
        settings = load_evaluation(run_dir / "evaluation.yaml")
        found = evaluate_run(run_dir, config, settings, chain, _tokens(run_dir, config))
        modes = {mode: found[f"loss_{mode}"] for mode in ("dense", "sparse") if found[f"loss_{mode}"] is not None}
        tracker.outcome(
            {f"eval/loss_{mode}": loss for mode, loss in modes.items()}
            | {f"eval/perplexity_{mode}": math.exp(loss) for mode, loss in modes.items()}
            | ({} if found["active_neurons"] is None else {"eval/active_neurons": found["active_neurons"]}),
            run_step=chain[-1].last_step,
        )
    write_json(run_dir / "evaluation.json", found)
    return ", ".join(f"{mode} perplexity {math.exp(loss):.2f}" for mode, loss in modes.items())


def analyse(args: argparse.Namespace) -> str:
    import torch

    from ssd_lit.evaluation.analysis import analyse_run

    torch.set_num_threads(args.threads)
    run_dir, config = args.run_dir, load_run(args.run_dir / "config.yaml")
    chain, folder = read_chain(run_dir, config.method), data_dir(_results(run_dir), config.data)
    with _alone(run_dir), _tracker(run_dir, config, "analyse", None) as tracker:
        settings = load_analysis(run_dir / "analysis.yaml")
        found = analyse_run(run_dir, config, settings, chain, folder / "tokens", folder / "tokenizer")
        layers = found["experts"]["layers"] if found["experts"] else []
        means = {
            f"analysis/{name}": sum(layer[name] for layer in layers) / len(layers)
            for name in ("load_entropy", "dead_experts", "routing_recall")
            if layers
        }
        tracker.outcome(means, run_step=chain[-1].last_step)
    write_json(run_dir / "analysis" / "analysis.json", found)
    return ", ".join(found["written"]) or f"nothing to write: {'; '.join(sorted(set(found['left_out'].values())))}"


def downstream(args: argparse.Namespace) -> str:
    """Try a model on other tasks; ended on its way, it goes on with the fine-tuning that was not done."""
    import torch

    from ssd_lit.evaluation.downstream import means, try_downstream

    torch.set_num_threads(args.threads)
    run_dir, config = args.run_dir, load_run(args.run_dir / "config.yaml")
    chain, folder = read_chain(run_dir, config.method), data_dir(_results(run_dir), config.data)
    here = run_dir / "downstream"
    with _alone(run_dir), _tracker(run_dir, config, "downstream", None) as tracker:
        settings = load_downstream(run_dir / "downstream.yaml")
        found = try_downstream(
            run_dir, config, settings, chain, folder / "tokens", folder / "tokenizer", here / "pieces"
        )
        told = means(found)
        tracker.outcome(told, run_step=chain[-1].last_step)
        write_json(here / "downstream.json", found)
        shutil.rmtree(here / "pieces", ignore_errors=True)
    named = [f"{name.removeprefix('downstream/')} {value:.3f}" for name, value in told.items()]
    return ", ".join(named) or "; ".join(found["left_out"].values())


def summarise(args: argparse.Namespace) -> str:
    from ssd_lit.reporting.downstream import write_downstream
    from ssd_lit.reporting.summary import write_summary

    experiment = load_experiment(args.exp_dir / "experiment.yaml")
    if experiment.downstream is not None:
        write_downstream(args.exp_dir, experiment.runs())
    return str(write_summary(args.exp_dir, experiment.runs()))


def figures(args: argparse.Namespace) -> str:
    from ssd_lit.reporting.figures import write_figures

    written = write_figures(args.exp_dir, load_experiment(args.exp_dir / "experiment.yaml"))
    return f"{len(written)} files in {args.exp_dir / 'figures'}"


def report(args: argparse.Namespace) -> str:
    from ssd_lit.provenance import provenance
    from ssd_lit.reporting.report import write_report
    from ssd_lit.tracking import log_report

    experiment = load_experiment(args.exp_dir / "experiment.yaml")
    results = args.exp_dir.resolve().parent
    path = write_report(args.exp_dir, experiment, data_dir(results, experiment.data), provenance())
    log_report(results, experiment.experiment, [path, args.exp_dir / "summary.csv"])
    log_report(results, experiment.experiment, sorted((args.exp_dir / "figures").iterdir()), "figures")
    return str(path)


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


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Hold the run's lock: an earlier workflow that was killed may have left a stage of this run at work."""
    lock = FileLock(run_dir / ".lock")
    while True:
        try:
            lock.acquire(timeout=30)
            break
        except Timeout:
            print(f"{run_dir}: another process works on this run; waiting for it", flush=True)
    try:
        yield
    finally:
        lock.release()


def _run_phase(
    run_dir: Path,
    config: RunConfig,
    name: str,
    work: Callable[["Phase", list[PhaseRecord], "RunTracker"], PhaseRecord],
) -> PhaseRecord | None:
    """Do the work of a phase under the run's lock and write its record last; None if it is done already."""
    with _alone(run_dir):
        phase, history = _open_phase(run_dir, config, name)
        record_file = phase_dir(run_dir, phase.index, phase.mode) / "phase.json"
        if record_file.exists():
            return None
        folder = work_dir(run_dir, phase.index, phase.mode)
        begun = _holds(folder / "config.yaml", dump(config))
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)
            _forget_later_snapshots(run_dir, phase)
        _forget_others(run_dir, phase.index)
        with _tracker(run_dir, config, phase.name, None if begun else phase.first_step) as tracker:
            # From here on the recorded points beyond the phase's first step are those of this config.
            write_text(folder / "config.yaml", dump(config))
            record = work(phase, history, tracker)
            tracker.outcome(
                {"steps": record.steps, "tokens": record.tokens, "flops": record.flops, "seconds": record.seconds},
                {"mode": record.mode, "ended_by": record.ended_by},
            )
        record.write(record_file)
    return record


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
    if not number.isdigit():
        raise ConfigError(f"phase {name!r}: expected a number and a mode, such as 02-sparse")
    history = read_chain(run_dir, config.method, before=int(number))
    phase = next_phase(config, history)
    if phase is None or phase.name != name:
        raise ConfigError(f"phase {name!r}: run {config.name} goes on with {phase.name if phase else 'no phase'}")
    return phase, history


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


def _tracker(run_dir: Path, config: RunConfig, stage: str, resume_step: int | None) -> "RunTracker":
    from ssd_lit.provenance import git_commit
    from ssd_lit.tracking import RunTracker

    digest = read_json(_tokens(run_dir, config) / "index.json")["digest"]
    return RunTracker(
        run_dir, config, _results(run_dir),
        stage=stage, data_digest=digest[:36], commit=git_commit(), resume_step=resume_step,
    )  # fmt: skip


def _tokens(run_dir: Path, config: RunConfig) -> Path:
    return data_dir(_results(run_dir), config.data) / "tokens"


def _results(run_dir: Path) -> Path:
    return run_dir.resolve().parents[2]
