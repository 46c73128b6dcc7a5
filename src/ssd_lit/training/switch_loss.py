"""The jump of the loss where a run switches from dense to sparse or back."""

import logging
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from ssd_lit.training.module import Pretraining
from ssd_lit.training.phase_switch import PhaseCallback, PhaseSwitch
from ssd_lit.training.schedule import Phase

log = logging.getLogger(__name__)

STEPS = 10
"""Steps before and after a switch that are compared; all steps of a shorter phase."""
ALARM = 0.1
"""Jumps larger than this fraction of the loss before the switch are warned of."""
STATE_KEY = "loss_jump"
"""Checkpoint key of the losses."""


class SwitchLossLogger(PhaseCallback):
    """Logs the mean loss of the first steps after a switch, minus that of the last steps before it.

    Waits for the device only at the step that is logged, at a switch, and where a checkpoint is written.
    """

    def __init__(self, switch: PhaseSwitch):
        self._switch = switch
        self._phase: int | None = None
        """Index of the phase of the losses."""
        self._mode = ""
        self._losses = torch.full((STEPS,), torch.nan)
        """Losses of the phase's latest steps; step n at n modulo STEPS."""
        self._before: float | None = None

    def on_phase_start(self, trainer: Trainer, module: Pretraining, phase: Phase) -> None:
        if self._phase == phase.index:
            return
        self._before = None
        if self._mode not in ("", phase.mode):
            self._before = self._reduced(trainer).nanmean().item()
        self._losses = torch.full_like(self._losses, torch.nan)
        self._phase, self._mode = phase.index, phase.mode

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, outputs: Any, *_: Any) -> None:  # type: ignore[override]
        loss: Tensor = outputs["batch_loss"]
        self._losses = self._losses.to(loss.device)
        # Of a step that is left out there is no loss to compare.
        self._losses[trainer.global_step % STEPS] = torch.where(loss.isfinite(), loss, torch.nan)
        phase, ends = self._switch.phase, self._switch.ended_by is not None
        done = trainer.global_step - phase.first_step
        if self._before is None or not (done == STEPS or (ends and done < STEPS)):
            return
        jump = self._reduced(trainer).nanmean().item() - self._before
        module.record({"switch/loss_jump": jump})
        if jump > ALARM * self._before and trainer.is_global_zero:
            log.warning(
                "%s %s: the loss jumped from %.3f to %.3f at the switch",
                self._switch.run.config.name, phase.name, self._before, self._before + jump,
            )  # fmt: skip

    def on_save_checkpoint(self, trainer: Trainer, module: Pretraining, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        losses = self._reduced(trainer).tolist()
        checkpoint[STATE_KEY] = {"phase": self._phase, "mode": self._mode, "before": self._before, "losses": losses}

    def on_load_checkpoint(self, trainer: Trainer, module: Pretraining, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        state = checkpoint.get(STATE_KEY)
        if state is not None:
            self._phase, self._mode, self._before = state["phase"], state["mode"], state["before"]
            self._losses = torch.tensor(state["losses"])

    def _reduced(self, trainer: Trainer) -> Tensor:
        losses: Tensor = trainer.strategy.reduce(self._losses.clone(), reduce_op="mean")
        return losses
