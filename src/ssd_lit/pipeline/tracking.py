"""What MLflow is told of a run beside its numbers, and where its pages show them."""

from collections.abc import Iterable
from pathlib import Path

from ssd_lit.config import load_resolved
from ssd_lit.config.experiment import cells
from ssd_lit.report.palette import styles_of
from ssd_lit.run import Run
from ssd_lit.support.provenance import git_commit
from ssd_lit.tracking.client import About, RunTracker
from ssd_lit.tracking.spool import Spool
from ssd_lit.tracking.store import store_name
from ssd_lit.tracking.view import chart_link


def tracker_of(run: Run, stage: str, resume_step: int | None = None) -> RunTracker:
    """The tracker of a stage of a run."""
    return RunTracker(
        run.folder, run.config, run.results, stage=stage, data_digest=run.tokens_digest[:36], commit=git_commit(),
        resume_step=resume_step, about=_about(run),
    )  # fmt: skip


def charts_of(run_dirs: Iterable[Path]) -> str | None:
    """The link to the charts of the runs' experiment in the present store; None if it holds none of them yet."""
    for folder in run_dirs:
        record = Spool(folder).record if Spool.exists(folder) else None
        if record is not None and record.experiment and record.store == store_name():
            return chart_link(record.experiment)
    return None


def _about(run: Run) -> About | None:
    """From the experiment's config, in which its arms have an order; None for a run without one."""
    path = run.folder.parent.parent / "experiment.yaml"
    if not path.exists():
        return None
    experiment, config = load_resolved(path), run.config
    arms = {name: values for key, arm in experiment.arms.items() for name, (_, values) in cells(key, arm).items()}
    if config.arm not in arms:
        return None
    return About(
        description=f"{config.label}: method {config.method}, seed {config.seed}. {experiment.description}",
        colour=styles_of(arms)[config.arm].colour,
        question=experiment.description,
    )
