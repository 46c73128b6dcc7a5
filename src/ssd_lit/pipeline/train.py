"""`ssd-lit train`: trains and measures a run up to the end of one of its stages, in one process."""

import gc
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssd_lit.config import ConfigError, RunConfig, change_run, dump, load_analysis, load_run, parse_changes
from ssd_lit.paths import checkpoint_path, phase_dir, snapshot_path, snapshots, stage_path
from ssd_lit.pipeline.measure import measure
from ssd_lit.pipeline.resources import on_all_devices
from ssd_lit.pipeline.tracking import charts_of, tracker_of
from ssd_lit.records import PhaseRecord, StageRecord, close_stage, noting_end
from ssd_lit.run import Run
from ssd_lit.stages import MEASUREMENTS, stage_of
from ssd_lit.support import signals
from ssd_lit.support.devices import reserve_gpus
from ssd_lit.support.files import read_json_checked, remove, whole_file, write_if_changed, write_json_checked
from ssd_lit.support.locks import exclusive
from ssd_lit.support.processes import Others, Place, check_number, leading, this_process, wait_for_first
from ssd_lit.tracking.client import RunTracker
from ssd_lit.tracking.metrics_log import read_metrics


def train(
    folder: Path,
    *,
    settings: Sequence[str] = (),
    until: str | None = None,
    start: str | None = None,
    threads: int | None = None,
) -> str:
    """Complete a run, or its stages up to `until`; returns a one-line summary.

    Keeps what is done and recorded. `settings` such as training.steps=100 change the run's config first: what was made
    from others is made again. `start`, a stage or a phase such as 05-sparse, is done again with all that follows
    it. Raises ConfigError for a name that the run does not have, ValueError if another run that it needs is not done,
    `Preempted` on a signal, after saving the state.
    """
    place = this_process()
    if not place.is_first:
        return _train_beside_first(folder, place, until, threads)
    with leading(place) as others:
        return _train_as_first(folder, place, others, settings, until, start, threads)


def _train_as_first(
    folder: Path,
    place: Place,
    others: Others,
    settings: Sequence[str],
    until: str | None,
    start: str | None,
    threads: int | None,
) -> str:
    """Complete a run in the process that keeps its records."""
    run = Run.open(folder)
    if settings:
        run = replace(run, config=_changed_config(folder, settings))
    last = until or run.stages[-1]
    if last not in run.stages:
        raise ConfigError(f"--until {last}: run {run.config.name} has no such stage; allowed: {', '.join(run.stages)}")
    stages, config = run.stages[: run.stages.index(last) + 1], run.config
    run = _with_matched_steps(run)
    with exclusive(run.folder, f"train to {last}"), noting_end(run.folder, "train"):
        first = None if start is None else _first_phase(run, start, stages)
        if settings:  # not before all that was asked for is known to be possible
            write_if_changed(run.folder / "config.yaml", dump(config))
        resume_step = _remove_stale(run)
        if first is not None and resume_step is None:  # else all is made anew
            resume_step = _remove_from(run, first)
        _restore_stage_records(run)
        missing = [stage for stage in stages if not run.is_done(stage)]
        training = [stage for stage in missing if stage in run.training_stages]
        if any(on_all_devices(run.config, stage) for stage in training):
            check_number(place, run.config.training.nodes, run.config.training.devices)
        if training:
            take_machine(run, threads, run.config.training.devices)
            _train(run, training, resume_step, others)
        if run.is_done(run.training_stages[-1]):
            shutil.rmtree(run.folder / "work", ignore_errors=True)
        summaries = [_summary(run)] if training else []
        for stage in (stage for stage in missing if stage in MEASUREMENTS):
            take_machine(run, threads)
            gc.collect()  # trainers and models are in reference cycles; the next ones need the memory
            summaries.append(measure(run, stage))
    _tell_charts(run, summaries)
    return "; ".join(summaries) if missing else "all stages were done already"


def measure_run(folder: Path, measurement: str, *, threads: int | None = None) -> str:
    """Measure the final model of a run, unless done already. Raises ValueError if the run has none yet."""
    run = Run.open(folder)
    settings = run.folder / MEASUREMENTS[measurement][0]
    if not settings.exists():
        raise ConfigError(f"{settings}: not found; the experiment has no such measurement of this run")
    with exclusive(run.folder, measurement), noting_end(run.folder, measurement):
        _restore_stage_records(run)
        if run.is_done(measurement):
            return "done already"
        take_machine(run, threads)
        summary = measure(run, measurement)
    _tell_charts(run, [summary])
    return summary


def _tell_charts(run: Run, done: Sequence[str]) -> None:
    """Tell where the charts of a run are, if what was `done` is the last of it."""
    charts = charts_of([run.folder])
    if done and charts is not None and all(map(run.is_done, run.stages)):
        print(f"{run.config.name}: charts at {charts}", flush=True)


def take_machine(run: Run, threads: int | None, processes: int = 1) -> None:
    """Set the threads and the determinism of a run's config, and reserve a GPU for each of its `processes`."""
    import torch

    training = run.config.training
    if this_process().started_by is None:
        reserve_gpus(processes)
    if training.deterministic:
        # Read when the GPU is first used; torch requires it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(training.deterministic)
    # The filling is for finding reads of uninitialised memory; there are none here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(max(1, (threads or training.threads) // processes))


def _changed_config(folder: Path, settings: Sequence[str]) -> RunConfig:
    """A run's config with other settings.

    Raises ConfigError for settings that are wrong, or that would change the first phase that other runs take over.
    """
    run, asked = load_run(folder / "config.yaml"), folder / "analysis.yaml"
    try:
        changed = change_run(run, parse_changes(settings), load_analysis(asked) if asked.exists() else None)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.yaml'}: {error}") from None
    if changed.warmup() != run.warmup():
        for other in sorted(folder.absolute().parent.glob("*/config.yaml")):
            if load_run(other).shares_warmup == run.name:
                raise ConfigError(
                    f"{folder / 'config.yaml'}: {other.parent.name} takes over this run's first phase, which these "
                    "settings change; change them for the whole experiment, with `ssd-lit configs`"
                )
    return changed


def _train(run: Run, missing: list[str], resume_step: int | None, others: Others) -> None:
    """Do the `missing` training stages in order; the `others` take part in training steps."""
    from ssd_lit.support.provenance import stage_provenance

    provenance = stage_provenance(run.config.seed, run.tokens_digest)
    with tracker_of(run, missing[0], resume_step) as tracker:
        # The points recorded from here on are of these inputs.
        write_json_checked(run.folder / "work" / "made_from.json", run.made_from())
        while missing:
            stage = missing[0]
            tracker.begin(stage)
            if stage == "warmup" and run.config.shares_warmup is not None:
                _adopt_warmup(run, tracker)
            elif stage == "route":
                from ssd_lit.training.routers import train_routers

                train_routers(run, tracker, provenance)
            elif not on_all_devices(run.config, stage):
                from ssd_lit.training.checkpoint import starting_point
                from ssd_lit.training.moefication import moefy_checkpoint

                moefy_checkpoint(run, starting_point(run), provenance)
            else:
                from ssd_lit.training.fit import train as fit

                others.train()
                fit(run, [name for name in missing if name != "route"][-1], tracker, provenance)
            remaining = [name for name in missing if not run.is_done(name)]
            if remaining == missing:
                raise ConfigError(f"{stage}: its result does not match its inputs")
            missing = remaining
        for stage in filter(run.is_done, run.training_stages):
            _finish(run, stage, tracker)


def _train_beside_first(folder: Path, place: Place, until: str | None, threads: int | None) -> str:
    """Take part in the training, if there is any."""
    from ssd_lit.training.fit import train as fit

    if not wait_for_first(place):
        return "there was nothing to train"
    run = Run.open(folder)
    check_number(place, run.config.training.nodes, run.config.training.devices)
    run = _with_matched_steps(run)
    take_machine(run, threads, run.config.training.devices)
    last = until or run.stages[-1]
    training = [name for name in run.training_stages if name != "route"]
    try:
        fit(run, last if last in training else training[-1], recorder=None, provenance={})
    except signals.Preempted:
        # The exit status is the first process's; Lightning would kill that if another's were not 0.
        return "stopped with the first process"
    return "trained with the first process, which writes the records"


def _with_matched_steps(run: Run) -> Run:
    """The run with the steps that another run's FLOPs pay for, if its config matches FLOPs."""
    if run.config.matches is None:
        return run
    from ssd_lit.training.schedule import with_steps_for

    spent = run.other(run.config.matches).chain()[-1].total
    return replace(run, config=with_steps_for(run.config, spent.flops, run.vocab))


def _remove_stale(run: Run) -> int | None:
    """Remove the run's results if they were made from other inputs than the current ones.

    Returns 0, the step up to which its points count, if the run starts again; None if it resumes.
    """
    inputs, made_from = run.made_from(), run.folder / "work" / "made_from.json"
    # All records, not only the chain's: another method's phases have other names.
    records = [PhaseRecord.read(path) for path in run.folder.glob("phases/*/phase.json")]
    if made_from.exists() and read_json_checked(made_from) == inputs and not records:
        return None
    if records and all(record.inputs == inputs for record in records):
        return None
    _remove(run, index=0, first_step=0)
    return 0


def _first_phase(run: Run, start: str, stages: Sequence[str]) -> int:
    """The index of a phase, or of the first of a stage, from which a run is to be done again.

    Raises ConfigError if there is no such phase, if it is none of the `stages` that are asked for, or if no checkpoint
    from before it was kept.
    """
    if start in MEASUREMENTS:
        raise ConfigError(f"--from {start}: trains nothing; `snakemake --forcerun {start}` measures again")
    phases, config = run.phases(), run.config
    places = {stage_of(config.method, record.index, record.mode): record.index for record in reversed(phases)}
    places |= {record.name: record.index for record in phases}
    if start not in places:
        raise ConfigError(
            f"--from {start}: run {config.name} has not reached it; allowed: {', '.join(places) or 'none'}"
        )
    index = places[start]
    if stage_of(config.method, index, phases[index].mode) not in stages:
        raise ConfigError(f"--from {start}: comes after --until {stages[-1]}")
    if any(record.inputs != run.made_from() for record in phases):
        return index  # all of them are made anew
    done = [stage for stage in run.training_stages if run.is_done(stage) and run.has_checkpoint(stage)]
    saved = [-1, *(run.stage(stage).phase for stage in done)]  # phases with a checkpoint of their end
    saved += [r.index for r in phases if (phase_dir(run.folder, r.index, r.mode) / "weights.ckpt").exists()]
    if index - 1 not in saved:
        raise ConfigError(
            f"--from {start}: no checkpoint from before it was kept; training.keep_phases keeps them, and without it "
            f"allowed: {', '.join(place for place, first in places.items() if first - 1 in saved)}"
        )
    return index


def _remove_from(run: Run, index: int) -> int:
    """Remove the results of a phase and of all after it; returns the step at which it began."""
    first_step = run.phases()[index].first_step
    _remove(run, index, first_step)
    return first_step


def _remove(run: Run, index: int, first_step: int) -> None:
    """Remove the phases from `index` on, the first of which began at `first_step`, and all that was made from them.

    Keeps measurements, which count as stale.
    """
    for folder in run.folder.glob("phases/*-*"):
        if int(folder.name.partition("-")[0]) >= index:
            shutil.rmtree(folder)
    earlier = {path.stem for path in run.folder.glob("stages/*.json") if StageRecord.read(path).phase < index}
    for path in [*run.folder.glob("stages/*.json"), *run.folder.glob("checkpoints/*.ckpt")]:
        if path.stem not in earlier:
            remove(path)
    shutil.rmtree(run.folder / "work", ignore_errors=True)
    for step, snapshot in snapshots(run.folder):
        if step > first_step:
            snapshot.unlink()


def _restore_stage_records(run: Run) -> None:
    """Restore the records of stages that are done: a workflow deletes them when it plans the stage again."""
    for stage in run.training_stages:
        records, path = _records_of(run, stage), checkpoint_path(run.folder, stage)
        if not records or stage_path(run.folder, stage).exists() or not path.exists():
            continue
        from ssd_lit.training.checkpoint import SWITCH_STATE, read_checkpoint

        last = records[-1]
        state = read_checkpoint(path, mapped=True).get("callbacks", {}).get(SWITCH_STATE)
        if state is not None and (state["inputs"], state["phase"]) == (run.made_from(), last.index + 1):
            close_stage(run.folder, stage, last)
            print(f"{stage}: done already; its record is restored", flush=True)


def _adopt_warmup(run: Run, tracker: RunTracker) -> None:
    """Copy the records, curves and snapshots of another run's warm-up; its checkpoint is read in place.

    The run counts its steps, FLOPs and seconds as its own: they are what it would have spent.
    """
    assert run.config.shares_warmup is not None
    owner = run.other(run.config.shares_warmup)
    stage, record = owner.stage("warmup"), owner.phases()[0]
    for name, curve in read_metrics(owner.folder / "metrics.jsonl").items():
        for step, value in curve:
            if step <= record.last_step:
                tracker.log(step, {name: value})
    for step, snapshot in snapshots(owner.folder):
        if step <= record.last_step:
            with whole_file(snapshot_path(run.folder, step)) as part:
                shutil.copyfile(snapshot, part)
    inputs = run.made_from()
    replace(record, inputs=inputs).write(run.folder)
    replace(stage, inputs=inputs).write(stage_path(run.folder, "warmup"))


def _finish(run: Run, stage: str, tracker: RunTracker) -> None:
    """Log the totals of a training stage to MLflow."""
    records = _records_of(run, stage)
    totals = {name: sum(getattr(r, name) for r in records) for name in ("steps", "tokens", "flops", "seconds")}
    tracker.finish(stage, totals, {"phases": str(len(records)), "ended_by": records[-1].ended_by})


def _records_of(run: Run, stage: str) -> list[PhaseRecord]:
    """The records of a stage's phases."""
    return [record for record in run.phases() if stage_of(run.config.method, record.index, record.mode) == stage]


def _summary(run: Run) -> str:
    last = run.phases()[-1]
    return f"{last.total.steps:,} steps in {last.index + 1} phases, the last ended by {last.ended_by}"
