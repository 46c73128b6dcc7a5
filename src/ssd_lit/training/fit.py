"""The training of a run: one Lightning `fit` for all its phases."""

import logging
import multiprocessing
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from ssd_lit.config import RunConfig
from ssd_lit.data.datamodule import TokenData
from ssd_lit.data.objectives import build_objective
from ssd_lit.models.flops import Costs, forward_costs
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.backends import Activation, choose_backend, fastest_backend
from ssd_lit.run import Run
from ssd_lit.support.signals import Preempted
from ssd_lit.training.activation_monitor import ActivationMonitor
from ssd_lit.training.checkpoint import build_model, load_weights, read_checkpoint, spent_elsewhere, starting_point
from ssd_lit.training.checkpointing import Checkpoints, RollingCheckpoint, Snapshots
from ssd_lit.training.logger import Recorder, RecorderLogger, StageReporter
from ssd_lit.training.module import Pretraining
from ssd_lit.training.non_finite import NonFinite
from ssd_lit.training.phase_switch import PhaseSwitch
from ssd_lit.training.switch_loss import SwitchLossLogger
from ssd_lit.training.throughput import Progress, ThroughputLogger

PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}


def build_trainer(run: Run, switch: PhaseSwitch, costs: Costs, recorder: Recorder | None) -> Trainer:
    """The trainer of a run; `switch` ends the training.

    Fitting starts a process for each further device. Raises ValueError if the machine has too few GPUs.
    """
    config, training = run.config, run.config.training
    if torch.cuda.is_available() and training.devices > torch.cuda.device_count():
        raise ValueError(f"training.devices {training.devices}: this machine has {torch.cuda.device_count()} GPUs")
    meter = ThroughputLogger(switch, costs)
    snapshots = [Snapshots(run.folder, training.snapshot_every)] if training.snapshot_every else []
    return Trainer(
        max_epochs=-1,  # only the phase switch ends the training
        devices=training.devices,
        # No buffer changes in a step, and a validation may be longer in one process than in another.
        strategy=DDPStrategy(broadcast_buffers=False) if training.devices > 1 else "auto",
        # A cluster gives a stage one task, which Lightning would take for the number of processes.
        plugins=[LightningEnvironment(), switch.checkpoints.writer],
        precision=PRECISION[training.precision],
        gradient_clip_val=config.optim.grad_clip,
        val_check_interval=training.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=RecorderLogger(recorder),
        callbacks=[
            # The order at the end of a step: decide whether the phase ends, measure, check, show, save. A phase that
            # ends is validated after the step; there too the switch comes first and saving last.
            switch,
            ActivationMonitor(config.name, training.log_every),
            NonFinite(switch),
            SwitchLossLogger(switch),
            meter,
            Progress(switch, meter),
            *([StageReporter(switch, recorder)] if recorder is not None else []),
            *snapshots,
            RollingCheckpoint(switch.checkpoints, training),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run.folder / "work",
    )


@contextmanager
def silence_lightning() -> Iterator[None]:
    """Silence Lightning's start-up messages, its advice on settings, and warnings that only Lightning can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*")
        warnings.filterwarnings("ignore", message=".*has no `__len__`.*")
        warnings.filterwarnings("ignore", message=".*overridden `on_after_batch_transfer`.*")  # overridden on purpose
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # older torch has no other name for it
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning uses an old name in torch
        yield


def train(run: Run, until: str, recorder: Recorder | None, provenance: dict[str, object]) -> PhaseSwitch:
    """Train a run from its latest state to the end of the stage `until`; returns its phase switch.

    All records and checkpoints are on the disk on return. Only the first process needs a recorder.
    """
    config, start = run.config, starting_point(run)
    model = build_model(config, run.vocab, read_weights=start.checkpoint is None, draw_weights=start.checkpoint is None)
    if start.checkpoint is not None and not start.step:
        # Before the run's own first step there are only weights to load, no optimiser state.
        load_weights(model, read_checkpoint(start.checkpoint))
    objective = build_objective(model.objective_name, run.vocab)
    elsewhere = spent_elsewhere(run)
    # Reads on from the data position of the run that this one starts from, in the same order.
    data = TokenData.of_run(config, run.tokens, objective.noise_per_token, skipped_steps=elsewhere.steps)
    costs = forward_costs(config.model, config.moe, run.vocab, config.data.sequence_length)
    backend = _backend(config, model)
    if config.method != "dense":
        print(f"{config.name}: sparse FFNs are computed by {backend}", flush=True)
    switch = PhaseSwitch(run, start.history, elsewhere, until, costs, Checkpoints(run), provenance)
    with silence_lightning():
        trainer = build_trainer(run, switch, costs, recorder)
        resume = start.checkpoint if start.step else None
        try:
            trainer.fit(Pretraining(config, model, objective), data, ckpt_path=resume, weights_only=True)
        except Preempted:
            if trainer.strategy.launcher is not None:
                # The signal came while the processes of further devices waited for this one to begin.
                trainer.strategy.launcher.kill(signal.SIGTERM)
            raise
        finally:
            for worker in multiprocessing.active_children():
                # Data workers ignore the SIGTERM that schedulers send to all, and Python would wait for them.
                worker.kill()
                worker.join()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # The measurements that follow run in this process only.
        torch.distributed.destroy_process_group()
    torch.compiler.reset()
    return switch


def _backend(config: RunConfig, model: LanguageModel) -> str:
    """The name of the backend that training uses, for `auto` the fastest for its batches.

    Raises ValueError for one that this machine cannot run, before any phase is trained.
    """
    ffn, name = model.ffns[0], config.moe.backend
    activation = Activation(ffn.activation, ffn.hidden_dropout.p)
    tokens = config.training.batch_size // config.training.devices * config.data.sequence_length
    x = torch.empty(
        tokens, 0,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
    )  # fmt: skip
    choose_backend(name, x, activation, gate_bias=ffn.b_gate is not None)
    return f"{fastest_backend(x, activation, gate_bias=ffn.b_gate is not None)} (auto)" if name == "auto" else name
