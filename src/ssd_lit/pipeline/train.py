"""`ssd-lit train`: a run, from where it stands to the end of one of its stages, in one process."""

import gc
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssd_lit.config import ConfigError, change_run, dump, load_analysis, load_run, parse_changes
from ssd_lit.paths import checkpoint_path, phase_dir, snapshot_path, snapshots, stage_path
from ssd_lit.pipeline.measure import measure
from ssd_lit.records import MEASUREMENTS, PhaseRecord, StageRecord, close_stage, stage_of
from ssd_lit.run import Run
from ssd_lit.support import signals
from ssd_lit.support.devices import reserve_gpus
from ssd_lit.support.files import read_json_checked, whole_file, write_if_changed, write_json_checked
from ssd_lit.support.locks import exclusive
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
    """Take a run on to its end, or to the end of the stage `until`.

    What is done and stands on record stays as it is. `settings` such as training.steps=100 change the run's config
    first: what was made from others is made anew. `start`, a stage or a phase such as 05-sparse, is done anew with
    all that follows it. Raises ConfigError for a name that the run does not have, ValueError for what it needs of
    another run and is not done, `Preempted` where a signal asked for it; the state is then saved.
    """
    if settings and _is_first_process():
        _change_config(folder, settings)
    run = Run.open(folder)
    last = until or run.stages[-1]
    if last not in run.stages:
        raise ConfigError(f"--until {last}: run {run.config.name} has no such stage; allowed: {', '.join(run.stages)}")
    wanted = run.stages[: run.stages.index(last) + 1]
    run = _with_matched_steps(run)
    if not _is_first_process():
        take_machine(run, threads, run.config.training.devices)
        return _train_beside(run, wanted)
    with exclusive(run.folder, f"train to {last}"):
        resume_step = _forget_what_is_stale(run) if start is None else _begin_anew(run, start)
        _restore_stage_records(run)
        missing = [stage for stage in wanted if not run.is_done(stage)]
        training = [stage for stage in missing if stage in run.training_stages]
        if training:
            take_machine(run, threads, run.config.training.devices)
            _train(run, training, resume_step)
        if run.is_done(run.training_stages[-1]):
            shutil.rmtree(run.folder / "work", ignore_errors=True)
        told = []
        for stage in (stage for stage in missing if stage in MEASUREMENTS):
            take_machine(run, threads)
            gc.collect()  # trainers and models hold each other; the next ones need the room
            told.append(measure(run, stage))
    if not missing:
        return "all of it was done already"
    return "; ".join([*([_outcome(run)] if training else []), *told])


def measure_run(folder: Path, measurement: str, *, threads: int | None = None) -> str:
    """Measure the final model of a run, unless that was done. Raises ValueError if the run has none yet."""
    run = Run.open(folder)
    settings = run.folder / MEASUREMENTS[measurement][0]
    if not settings.exists():
        raise ConfigError(f"{settings}: not found; the experiment does not ask for it")
    with exclusive(run.folder, measurement):
        _restore_stage_records(run)
        if run.is_done(measurement):
            return "it was done already"
        take_machine(run, threads)
        return measure(run, measurement)


def take_machine(run: Run, threads: int | None, processes: int = 1) -> None:
    """The threads and algorithms that a run's config gives its stages, and a GPU for each process that works on it."""
    import torch

    training = run.config.training
    reserve_gpus(processes)
    if training.deterministic:
        # Read when the GPU is first used; torch asks for it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(training.deterministic)
    # For finding reads of what was never written; nothing of ours does that.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_num_threads(max(1, (threads or training.threads) // processes))


def _change_config(folder: Path, settings: Sequence[str]) -> None:
    """Write other settings into a run's config.yaml.

    Raises ConfigError for settings that are wrong, or that would change the first phase that other runs take over.
    """
    with exclusive(folder, "settings"):
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
        write_if_changed(folder / "config.yaml", dump(changed))


def _is_first_process() -> bool:
    """Whether this process keeps the records; false in those that Lightning starts for further devices."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _train(run: Run, missing: list[str], resume_step: int | None) -> None:
    """Do the training stages that are not done, in order."""
    from ssd_lit.support.provenance import stage_provenance

    provenance = stage_provenance(run.config, run.tokens_digest)
    with RunTracker.of(run, missing[0], resume_step) as tracker:
        # From here on the recorded points are those of these inputs.
        write_json_checked(run.folder / "work" / "made_from.json", run.made_from())
        while missing:
            stage = missing[0]
            tracker.begin(stage)
            if stage == "warmup" and run.config.shares_warmup is not None:
                _adopt_warmup(run, tracker)
            elif stage == "moefy":
                from ssd_lit.training.checkpoint import starting_point
                from ssd_lit.training.moefication import moefy_checkpoint

                moefy_checkpoint(run, starting_point(run), provenance)
            elif stage == "route":
                from ssd_lit.training.routers import train_routers

                train_routers(run, tracker, provenance)
            else:
                from ssd_lit.training.fit import train as fit

                fit(run, [one for one in missing if one != "route"][-1], tracker, provenance)
            remaining = [one for one in missing if not run.is_done(one)]
            if remaining == missing:
                raise ConfigError(f"{stage}: its result does not match what it was made from")
            missing = remaining
        for stage in (one for one in run.training_stages if run.is_done(one)):
            _tell(run, stage, tracker)


def _train_beside(run: Run, wanted: tuple[str, ...]) -> str:
    """The part of a process that works on a further device."""
    from ssd_lit.training.fit import train as fit

    training = [stage for stage in wanted if stage in run.training_stages and stage != "route"]
    try:
        fit(run, training[-1], recorder=None, provenance={})
    except signals.Preempted:
        # The first process answers for all; Lightning would kill it, were the status of another not 0.
        return "stopped with the first process"
    return "trained beside the first process, which keeps the records"


def _with_matched_steps(run: Run) -> Run:
    """The run with the steps that another run's FLOPs pay for, where it is to match them."""
    if run.config.matches is None:
        return run
    from ssd_lit.training.schedule import with_steps_for

    spent = run.other(run.config.matches).chain()[-1].total
    return replace(run, config=with_steps_for(run.config, spent.flops, run.vocab))


def _forget_what_is_stale(run: Run) -> int | None:
    """Remove all that was made from something else than there is now.

    Returns 0, the step up to which its points count, if the run begins anew; None if it goes on.
    """
    inputs, begun = run.made_from(), run.folder / "work" / "made_from.json"
    # All that there are, not the chain: another method's phases have other names.
    records = [PhaseRecord.read(path) for path in run.folder.glob("phases/*/phase.json")]
    if begun.exists() and read_json_checked(begun) == inputs and not records:
        return None
    if records and all(record.inputs == inputs for record in records):
        return None
    _remove(run, index=0, first_step=0)
    return 0


def _begin_anew(run: Run, start: str) -> int:
    """Remove what was made at and behind a stage or a phase; returns the step at which it began.

    Raises ConfigError if there is no such phase, or if no checkpoint from before it was kept.
    """
    phases, config = run.phases(), run.config
    places = {stage_of(config.method, record.index, record.mode): record.index for record in reversed(phases)}
    places |= {record.name: record.index for record in phases}
    if start not in places:
        raise ConfigError(
            f"--from {start}: run {config.name} has not come there; allowed: {', '.join(places) or 'none'}"
        )
    index = places[start]
    done = [stage for stage in run.training_stages if run.is_done(stage) and run.has_checkpoint(stage)]
    kept = [-1, *(run.stage(stage).phase for stage in done)]
    kept += [r.index for r in phases if (phase_dir(run.folder, r.index, r.mode) / "weights.ckpt").exists()]
    if index - 1 not in kept:
        raise ConfigError(
            f"--from {start}: no checkpoint from before it was kept; training.keep_phases keeps them, and without it "
            f"allowed: {', '.join(place for place, first in places.items() if first - 1 in kept)}"
        )
    first_step = phases[index].first_step
    _remove(run, index, first_step)
    return first_step


def _remove(run: Run, index: int, first_step: int) -> None:
    """Remove the phases from `index` on, which began at `first_step`, and all that was made from them.

    Measurements stay, and count as stale.
    """
    for folder in run.folder.glob("phases/*-*"):
        if int(folder.name.partition("-")[0]) >= index:
            shutil.rmtree(folder)
    kept = {path.stem for path in run.folder.glob("stages/*.json") if StageRecord.read(path).phase < index}
    for path in [*run.folder.glob("stages/*.json"), *run.folder.glob("checkpoints/*.ckpt")]:
        if path.stem not in kept:
            path.unlink()
    shutil.rmtree(run.folder / "work", ignore_errors=True)
    for step, snapshot in snapshots(run.folder):
        if step > first_step:
            snapshot.unlink()


def _restore_stage_records(run: Run) -> None:
    """Write anew the records of stages that are done: a workflow removes them when it plans the stage once more."""
    phases = run.phases()
    for stage in run.training_stages:
        mine = [record for record in phases if stage_of(run.config.method, record.index, record.mode) == stage]
        path = checkpoint_path(run.folder, stage)
        if not mine or stage_path(run.folder, stage).exists() or not path.exists():
            continue
        from ssd_lit.training.checkpoint import SWITCH_STATE, read_checkpoint

        last = mine[-1]
        state = read_checkpoint(path, mapped=True)["callbacks"][SWITCH_STATE]
        if (state["inputs"], state["phase"]) == (run.made_from(), last.index + 1):
            close_stage(run.folder, stage, last)
            print(f"{stage}: its result stands in the run's records, and stays", flush=True)


def _adopt_warmup(run: Run, tracker: RunTracker) -> None:
    """Take over the warm-up of another run, with curves and snapshots; the checkpoint stays where it is.

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


def _tell(run: Run, stage: str, tracker: RunTracker) -> None:
    """Tell MLflow what a training stage came to."""
    mine = [one for one in run.phases() if stage_of(run.config.method, one.index, one.mode) == stage]
    totals = {name: sum(getattr(one, name) for one in mine) for name in ("steps", "tokens", "flops", "seconds")}
    tracker.finish(stage, totals, {"phases": str(len(mine)), "ended_by": mine[-1].ended_by})


def _outcome(run: Run) -> str:
    last = run.phases()[-1]
    return f"{last.total.steps:,} steps in {last.index + 1} phases, the last ended by {last.ended_by}"
