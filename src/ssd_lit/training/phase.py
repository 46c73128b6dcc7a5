"""One training phase of a run: one Lightning `fit`, from the previous phase's checkpoint to its own."""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from ssd_lit.config import RunConfig
from ssd_lit.data.blocks import load_index
from ssd_lit.data.module import TokenData
from ssd_lit.files import whole_file
from ssd_lit.layout import PhaseRecord, Totals, phase_dir
from ssd_lit.training.activation_monitor import ActivationMonitor
from ssd_lit.training.checkpoint import SWITCH_STATE, build_model, load_weights, read_checkpoint
from ssd_lit.training.logger import Recorder, RecorderLogger
from ssd_lit.training.meter import Meter, phase_flops
from ssd_lit.training.module import Pretraining
from ssd_lit.training.phase_switch import PhaseSwitch
from ssd_lit.training.progress import Progress
from ssd_lit.training.records import finished
from ssd_lit.training.rolling_checkpoint import RollingCheckpoint
from ssd_lit.training.schedule import Phase

PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}


def is_first_process() -> bool:
    """Whether this process keeps the records; false in those that Lightning starts for a run's other devices."""
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]


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
    if rolling.exists() and _switch_state(rolling)["ended_by"] is not None:
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
    with _quiet():
        _trainer(config, phase, meter, recorder, rolling).fit(
            Pretraining(config, model), _data(config, tokens_dir), ckpt_path=resume, weights_only=True
        )


def close_phase(
    run_dir: Path, config: RunConfig, phase: Phase, history: list[PhaseRecord], tokens_dir: Path
) -> PhaseRecord:
    """Write the last.ckpt of a phase that was trained to its end; returns what phase.json is to say."""
    rolling = rolling_checkpoint(run_dir, phase)
    with whole_file(phase_dir(run_dir, phase.index, phase.mode) / "last.ckpt") as part:
        shutil.copyfile(rolling, part)
    state = _switch_state(rolling)
    steps = read_checkpoint(rolling)["global_step"] - phase.first_step
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


def _switch_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_checkpoint(checkpoint)["callbacks"][SWITCH_STATE]
    return state


def _spent_before(history: list[PhaseRecord]) -> Totals:
    return history[-1].total if history else Totals()


def _data(config: RunConfig, tokens_dir: Path) -> TokenData:
    training = config.training
    return TokenData(
        tokens_dir,
        batch_size=training.batch_size,
        validation_blocks=training.validation_blocks,
        seed=config.seed,
        workers=training.workers,
    )


def _trainer(config: RunConfig, phase: Phase, meter: Meter, recorder: Recorder | None, rolling: Path) -> Trainer:
    training = config.training
    if torch.cuda.is_available() and training.devices > torch.cuda.device_count():
        raise ValueError(f"training.devices {training.devices}: this machine has {torch.cuda.device_count()} GPUs")
    return Trainer(
        # The phase switch ends the phase, and nothing else.
        max_epochs=-1,
        devices=training.devices,
        # No buffer changes within a phase, and a validation may be longer in one process than in another.
        strategy=DDPStrategy(broadcast_buffers=False) if training.devices > 1 else "auto",
        precision=PRECISION[training.precision],
        gradient_clip_val=config.optim.grad_clip,
        val_check_interval=training.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=RecorderLogger(recorder),
        callbacks=[
            # In this order at the end of a step: decide, measure, show, and save what is then known.
            PhaseSwitch(phase, config),
            meter,
            ActivationMonitor(training.log_every),
            Progress(config.name, phase, meter),
            RollingCheckpoint(rolling, training.checkpoint_every, training.validate_every),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=rolling.parent,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back Lightning's greetings, its advice on settings that we chose, and warnings that only it can heed."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*")
        warnings.filterwarnings("ignore", message=".*has no `__len__`.*")
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # older releases of torch know no other name
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of an old name in torch
        yield
