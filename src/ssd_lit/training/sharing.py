"""A first phase that several runs have in common is trained by one of them."""

import shutil
from pathlib import Path

from ssd_lit.files import whole_file
from ssd_lit.layout import PhaseRecord, phase_dir, snapshot_path, snapshots
from ssd_lit.points import read_points
from ssd_lit.training.logger import Recorder
from ssd_lit.training.schedule import Phase


def adopt_warmup(run_dir: Path, owner: Path, phase: Phase, recorder: Recorder) -> PhaseRecord:
    """Take over the first phase of another run, checkpoint, curves and snapshots; returns its record.

    The run counts the phase's steps, FLOPs and seconds as its own: they are what it would have spent.
    """
    theirs, ours = (phase_dir(run, phase.index, phase.mode) for run in (owner, run_dir))
    record = PhaseRecord.read(theirs / "phase.json")
    with whole_file(ours / "last.ckpt") as part:
        # A copy: the workflow dates its outputs anew, which a second name of the same file would pass on to the owner.
        shutil.copyfile(theirs / "last.ckpt", part)
    for name, curve in read_points(owner / "metrics.jsonl").items():
        for step, value in curve:
            if step <= record.last_step:
                recorder.log(step, {name: value})
    for step, snapshot in snapshots(owner):
        if step <= record.last_step:
            with whole_file(snapshot_path(run_dir, step)) as part:
                shutil.copyfile(snapshot, part)
    return record
