"""One training phase of a run: one Lightning `fit`, from the previous phase's checkpoint to its own."""

import shutil
from pathlib import Path

from ssd_lit.config import RunConfig
from ssd_lit.data.blocks import load_index
from ssd_lit.data.module import TokenData
from ssd_lit.files import whole_file
from ssd_lit.layout import PhaseRecord, Totals, phase_dir
from ssd_lit.training.checkpoint import SWITCH_STATE, build_model, load_weights, read_checkpoint
from ssd_lit.training.logger import Recorder
from ssd_lit.training.meter import Meter, phase_flops
from ssd_lit.training.module import Pretraining
from ssd_lit.training.records import finished
from ssd_lit.training.schedule import Phase
from ssd_lit.training.trainer import build_trainer, quiet


def train_phase(
    run_dir: Path,
    config: RunConfig,
    phase: Phase,
    history: list[PhaseRecord],
    tokens_dir: Path,
    recorder: Recorder | None,
) -> None:
    """Train the phase to its end, which its rolling checkpoint then holds.

    Starts from the phase's own rolling checkpoint if it was interrupted, else from the checkpoint of the phase
    before, else from fresh weights. Only the first process needs a recorder.
    """
    rolling = rolling_checkpoint(run_dir, phase)
    if rolling.exists() and read_checkpoint(rolling)["callbacks"][SWITCH_STATE]["ended_by"] is not None:
        return
    index = load_index(tokens_dir)
    start = _spent_before(history)
    before = phase_dir(run_dir, history[-1].index, history[-1].mode) / "last.ckpt" if history else None
    model = build_model(config, vocab_size=index["vocab_size"], end_of_text=index["eos_id"])
    if before is not None:
        load_weights(model, read_checkpoint(before))
    model.set_mode("sparse" if phase.mode == "sparse" else "dense")
    # Before the first step there is no optimiser state to go on from, only weights.
    resume = rolling if rolling.exists() else before if start.steps else None
    meter = Meter(phase, config, start, phase_flops(config, phase, index["vocab_size"]))
    data = TokenData(
        tokens_dir,
        batch_size=config.training.batch_size,
        validation_blocks=config.training.validation_blocks,
        seed=config.seed,
        workers=config.training.workers,
    )
    with quiet():
        trainer = build_trainer(config, phase, meter, recorder, rolling)
        trainer.fit(Pretraining(config, model), data, ckpt_path=resume, weights_only=True)


def close_phase(
    run_dir: Path, config: RunConfig, phase: Phase, history: list[PhaseRecord], tokens_dir: Path
) -> PhaseRecord:
    """Write the last.ckpt of a phase that was trained to its end; returns what phase.json is to say."""
    rolling = rolling_checkpoint(run_dir, phase)
    with whole_file(phase_dir(run_dir, phase.index, phase.mode) / "last.ckpt") as part:
        shutil.copyfile(rolling, part)
    checkpoint = read_checkpoint(rolling)
    state = checkpoint["callbacks"][SWITCH_STATE]
    steps = checkpoint["global_step"] - phase.first_step
    tokens = steps * config.training.batch_size * config.data.sequence_length
    spent = Totals(
        steps=steps,
        sparse_steps=steps if phase.mode == "sparse" else 0,
        tokens=tokens,
        flops=tokens * phase_flops(config, phase, load_index(tokens_dir)["vocab_size"]),
        seconds=state["seconds"],
    )
    return finished(config, phase, history, _spent_before(history), spent, state["ended_by"], state["similarity"])


def work_dir(run_dir: Path, phase: Phase) -> Path:
    """Where a phase keeps what it needs to go on after an interruption; gone once the next stage begins."""
    return run_dir / "work" / phase.name


def rolling_checkpoint(run_dir: Path, phase: Phase) -> Path:
    """What a phase goes on from after an interruption."""
    return work_dir(run_dir, phase) / "rolling.ckpt"


def _spent_before(history: list[PhaseRecord]) -> Totals:
    return history[-1].total if history else Totals()
