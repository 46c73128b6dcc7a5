"""One training phase of a run: one Lightning `fit`, from the previous phase's checkpoint to its own."""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from ssd_lit.config import RunConfig
from ssd_lit.data.blocks import load_index
from ssd_lit.data.module import TokenData
from ssd_lit.files import whole_file
from ssd_lit.layout import PhaseRecord, Totals, phase_dir
from ssd_lit.models.language_model import LanguageModel
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


def train_phase(
    run_dir: Path,
    config: RunConfig,
    phase: Phase,
    history: list[PhaseRecord],
    tokens_dir: Path,
    recorder: Recorder,
) -> PhaseRecord:
    """Train the phase to its end and write its last.ckpt; returns what phase.json is to say.

    Starts from the phase's own rolling checkpoint if it was interrupted, else from the checkpoint of the phase
    before, else from fresh weights.
    """
    index = load_index(tokens_dir)
    flops_per_token = phase_flops(config, phase, index["vocab_size"])
    start = history[-1].total if history else Totals()
    before = phase_dir(run_dir, history[-1].index, history[-1].mode) / "last.ckpt" if history else None
    rolling = work_dir(run_dir, phase) / "rolling.ckpt"
    rolling.parent.mkdir(parents=True, exist_ok=True)

    state = read_checkpoint(rolling)["callbacks"][SWITCH_STATE] if rolling.exists() else None
    if state is None or state["ended_by"] is None:
        model = build_model(config, vocab_size=index["vocab_size"], end_of_text=index["eos_id"])
        if before is not None:
            load_weights(model, read_checkpoint(before))
        model.set_mode("sparse" if phase.mode == "sparse" else "dense")
        # Before the first step there is no optimiser state to go on from, only weights.
        resume = rolling if rolling.exists() else before if start.steps else None
        _fit(model, config, phase, start, tokens_dir, recorder, rolling, resume, flops_per_token)
        state = read_checkpoint(rolling)["callbacks"][SWITCH_STATE]

    with whole_file(phase_dir(run_dir, phase.index, phase.mode) / "last.ckpt") as part:
        shutil.copyfile(rolling, part)
    steps = read_checkpoint(rolling)["global_step"] - phase.first_step
    tokens = steps * config.training.batch_size * config.data.sequence_length
    spent = Totals(
        steps=steps,
        sparse_steps=steps if phase.mode == "sparse" else 0,
        tokens=tokens,
        flops=tokens * flops_per_token,
        seconds=state["seconds"],
    )
    return finished(config, phase, history, start, spent, state["ended_by"], state["similarity"])


def work_dir(run_dir: Path, phase: Phase) -> Path:
    """Where a phase keeps what it needs to go on after an interruption; gone once the phase is done."""
    return run_dir / "work" / phase.name


def _fit(
    model: LanguageModel,
    config: RunConfig,
    phase: Phase,
    start: Totals,
    tokens_dir: Path,
    recorder: Recorder,
    rolling: Path,
    resume: Path | None,
    flops_per_token: float,
) -> None:
    training = config.training
    meter = Meter(phase, config, start, flops_per_token)
    data = TokenData(
        tokens_dir,
        batch_size=training.batch_size,
        validation_blocks=training.validation_blocks,
        seed=config.seed,
        workers=training.workers,
    )
    with _quiet():
        trainer = Trainer(
            # The phase switch ends the phase, and nothing else.
            max_epochs=-1,
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
        trainer.fit(Pretraining(config, model), data, ckpt_path=resume, weights_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back Lightning's greetings, its advice on settings that we chose, and warnings that only it can heed."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*")
        warnings.filterwarnings("ignore", message=".*has no `__len__`.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of an old name in torch
        yield
