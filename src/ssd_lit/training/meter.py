"""Loss, speed and cost of training, at every logged step."""

from typing import Any

import torch
from lightning.pytorch import Trainer

from ssd_lit.models.flops import PEAK_FLOPS, Costs
from ssd_lit.training.module import Pretraining
from ssd_lit.training.phase_switch import PhaseCallback, PhaseSwitch
from ssd_lit.training.schedule import Phase, phase_flops


class ThroughputLogger(PhaseCallback):
    """Logs the loss over the steps since the last logged one, tokens a second, training FLOPs, seconds and MFU.

    It logs at the end of a phase too, so that no point is of two phases.
    """

    def __init__(self, switch: PhaseSwitch, costs: Costs):
        self.last: dict[str, float] = {}
        """The values logged last."""
        self._switch = switch
        self._config = switch.run.config
        self._costs = costs
        self._flops = 0.0
        """Those of the phase."""
        self._peak: float | None = None
        self._since = 0.0
        """Seconds of the phase at the last logged step."""
        self._steps = 0

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        if module.device.type == "cuda" and self._config.training.precision == "bf16":
            self._peak = PEAK_FLOPS.get(torch.cuda.get_device_name(module.device))

    def on_phase_start(self, trainer: Trainer, module: Pretraining, phase: Phase) -> None:
        self._flops = phase_flops(self._config, phase, self._costs, trainer.global_step)
        self._since, self._steps = self._switch.elapsed(), 0

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        step, phase, training = trainer.global_step, self._switch.phase, self._config.training
        step_flops = phase_flops(self._config, phase, self._costs, step, since=step - 1)
        self._flops += step_flops
        self._steps += 1
        if self._switch.ended_by is None and step % training.log_every:
            return
        loss = module.take_train_loss()
        now = self._switch.elapsed()
        step_tokens = training.batch_size * self._config.data.sequence_length
        rate = self._steps * step_tokens / (now - self._since)
        self._steps, self._since = 0, now
        self.last = {
            "train/loss": loss,
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/tokens_per_second": rate,
            "train/flops": self._switch.before.flops + self._flops,
            "train/seconds": self._switch.before.seconds + now,
        }
        if self._peak is not None:
            self.last["train/mfu"] = rate * step_flops / step_tokens / (self._peak * trainer.world_size)
        module.record(self.last)
