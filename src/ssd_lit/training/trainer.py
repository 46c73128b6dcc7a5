"""The Lightning trainer of a run, on one device or several."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from ssd_lit.models.flops import Costs
from ssd_lit.run import Run
from ssd_lit.training.activation_monitor import ActivationMonitor
from ssd_lit.training.checkpointing import RollingCheckpoint
from ssd_lit.training.logger import Recorder, RecorderLogger, StageTeller
from ssd_lit.training.meter import ThroughputLogger
from ssd_lit.training.non_finite import NonFinite
from ssd_lit.training.phase_switch import PhaseSwitch
from ssd_lit.training.progress import Progress
from ssd_lit.training.snapshots import Snapshots
from ssd_lit.training.switch_loss import SwitchLossLogger

PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}


def build_trainer(run: Run, switch: PhaseSwitch, costs: Costs, recorder: Recorder | None) -> Trainer:
    """The trainer of a run, which its phase switch ends.

    Fitting starts a process for each further device. Raises ValueError if the machine has too few GPUs.
    """
    config, training = run.config, run.config.training
    if torch.cuda.is_available() and training.devices > torch.cuda.device_count():
        raise ValueError(f"training.devices {training.devices}: this machine has {torch.cuda.device_count()} GPUs")
    meter = ThroughputLogger(switch, costs)
    snapshots = [Snapshots(run.folder, training.snapshot_every)] if training.snapshot_every else []
    return Trainer(
        # The phase switch ends the training, and nothing else.
        max_epochs=-1,
        devices=training.devices,
        # No buffer changes in a step, and a validation may be longer in one process than in another.
        strategy=DDPStrategy(broadcast_buffers=False) if training.devices > 1 else "auto",
        # A cluster gives a stage one task: Lightning would take that for the number of processes.
        plugins=[LightningEnvironment(), switch.checkpoints.writer],
        precision=PRECISION[training.precision],
        gradient_clip_val=config.optim.grad_clip,
        val_check_interval=training.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=RecorderLogger(recorder),
        callbacks=[
            # In this order at the end of a step: decide, measure what is sound, show, and save what is then known. A
            # phase that ends is validated behind the step; the switch then comes first again, and saving last.
            switch,
            ActivationMonitor(config.name, training.log_every),
            NonFinite(switch),
            SwitchLossLogger(switch),
            meter,
            Progress(switch, meter),
            *([StageTeller(switch, recorder)] if recorder is not None else []),
            *snapshots,
            RollingCheckpoint(switch.checkpoints, training),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run.folder / "work",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back Lightning's greetings, its advice on settings that we chose, and warnings that only it can heed."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*Checkpoint directory.*")
        warnings.filterwarnings("ignore", message=".*has no `__len__`.*")
        warnings.filterwarnings("ignore", message=".*overridden `on_after_batch_transfer`.*")  # the module's is meant
        warnings.filterwarnings("ignore", message=".*have no `validation_step`.*")  # routers are not validated
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")  # older releases of torch know no other name
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of an old name in torch
        yield
