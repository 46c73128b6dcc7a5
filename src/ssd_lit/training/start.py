"""Where the training of a run goes on: found from its records and checkpoints."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ssd_lit.paths import phase_dir, previous_checkpoint, rolling_checkpoint
from ssd_lit.records import PhaseRecord, Totals
from ssd_lit.run import Run
from ssd_lit.training.checkpoint import SWITCH_STATE, read_checkpoint


class Start(NamedTuple):
    """What a training process goes on from."""

    history: list[PhaseRecord]
    """The phases behind it."""
    checkpoint: Path | None = None
    """The state of the run there; None before there is any."""
    step: int = 0
    """The steps of the run that are done in it."""


def starting_point(run: Run) -> Start:
    """The farthest that a run has come: its rolling checkpoint, a phase that was kept, or the end of a stage.

    What was made from anything else than there is now does not count. A damaged checkpoint is named and removed, and
    the one before it taken.
    """
    phases, inputs = run.phases(), run.made_from()
    done = [stage for stage in run.training_stages if run.is_done(stage) and run.has_checkpoint(stage)]
    start = Start([])
    if done:
        record = run.stage(done[-1])
        start = Start(phases[: record.phase + 1], run.checkpoint(done[-1]), record.step)
    for path in _own_checkpoints(run, phases):
        try:
            content = read_checkpoint(path, mapped=True)
        except ValueError as error:
            path.unlink()
            print(f"{str(error).partition(';')[0]}; going on from what was before it", flush=True)
            continue
        state = content["callbacks"][SWITCH_STATE]
        if state["inputs"] == inputs and len(start.history) <= state["phase"] <= len(phases):
            return Start(phases[: state["phase"]], path, content["global_step"])
    return start


def spent_elsewhere(run: Run) -> Totals:
    """What the run whose final model this one starts from had spent."""
    return Totals() if run.config.parent_run is None else run.other(run.config.parent_run).chain()[-1].total


def _own_checkpoints(run: Run, phases: list[PhaseRecord]) -> Iterator[Path]:
    """Those within stages, the newest first."""
    rolling = rolling_checkpoint(run.folder)
    kept = [phase_dir(run.folder, record.index, record.mode) / "weights.ckpt" for record in reversed(phases)]
    yield from (path for path in (rolling, previous_checkpoint(rolling), *kept) if path.exists())
