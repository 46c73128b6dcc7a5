"""What a run has to do next, by what lies in its folder."""

from pathlib import Path

from ssd_lit.config import RunConfig
from ssd_lit.data.blocks import load_index
from ssd_lit.files import read_sealed
from ssd_lit.layout import FIRST_MODE, PhaseRecord, data_dir, measured_inputs, phase_dir, phase_inputs

STAGE = {"dense": "train", "sparse": "train", "moefy": "moefy", "router": "route"}
"""The stage that does a phase, by its mode."""

MEASUREMENTS = {
    "evaluate": ("evaluation.yaml", "evaluation.json"),
    "analyse": ("analysis.yaml", "analysis/analysis.json"),
    "downstream": ("downstream.yaml", "downstream/downstream.json"),
}
"""The stages behind the last phase, in order: what each is told by, and what it writes."""


def next_stage(run_dir: Path, config: RunConfig) -> list[str] | None:
    """The first stage of the run whose result is not there, as arguments of `ssd-lit`; None if all are.

    A result counts only if it was made from the config, the tokens and the weights that there are now. Raises
    ValueError for a damaged record, or if a run that this one builds on is not done.
    """
    tokens = load_index(data_dir(run_dir.absolute().parents[2], config.data) / "tokens")["digest"]
    history: list[PhaseRecord] = []
    mode: str | None = FIRST_MODE[config.method]
    while mode is not None:
        folder = phase_dir(run_dir, len(history), mode)
        record = _record(folder)
        if record is None or record.inputs != phase_inputs(run_dir, config, history, tokens):
            return [STAGE[mode], str(run_dir), folder.name]
        history.append(record)
        mode = record.next
    for stage, (settings, result) in MEASUREMENTS.items():
        wanted = (run_dir / settings).exists()
        if wanted and _measured_from(run_dir / result) != measured_inputs(run_dir, history, settings, tokens):
            return [stage, str(run_dir)]
    return None


def _record(folder: Path) -> PhaseRecord | None:
    whole = all((folder / name).exists() for name in ("phase.json", "last.ckpt"))
    return PhaseRecord.read(folder / "phase.json") if whole else None


def _measured_from(path: Path) -> object:
    return read_sealed(path).get("inputs") if path.exists() else None
