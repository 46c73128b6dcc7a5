"""Loss, speed and cost of training, at every logged step."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from ssd_lit.config import RunConfig
from ssd_lit.layout import Totals
from ssd_lit.models.flops import PEAK_FLOPS, Costs
from ssd_lit.training.module import Pretraining
from ssd_lit.training.phase_switch import PhaseSwitch
from ssd_lit.training.schedule import Phase
from ssd_lit.training.top_k import top_k_at


class Meter(Callback):
    """Logs the loss over the steps since the last logged one, tokens a second, training FLOPs, seconds and MFU.

    It also logs before every checkpoint and at the end of a phase, so that a checkpoint never holds half-filled
    sums: a run that is interrupted logs the same points.
    """

    def __init__(self, phase: Phase, config: RunConfig, start: Totals, costs: Costs, switch: PhaseSwitch):
        self.last: dict[str, float] = {}
        """The values logged last."""
        self._phase = phase
        self._config = config
        self._start = start
        self._costs = costs
        self._switch = switch
        self._flops = 0.0
        self._every = (config.training.log_every, config.training.checkpoint_every)
        self._peak: float | None = None
        self._since = 0.0
        self._steps = 0

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        if module.device.type == "cuda" and module.config.training.precision == "bf16":
            self._peak = PEAK_FLOPS.get(torch.cuda.get_device_name(module.device))
        self._flops = phase_flops(self._config, self._phase, self._costs, trainer.global_step)
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        self._since -= time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        self._since += time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        step_flops = phase_flops(self._config, self._phase, self._costs, step, since=step - 1)
        self._flops += step_flops
        self._steps += 1
        if not (trainer.should_stop or any(step % every == 0 for every in self._every)):
            return
        loss = module.take_train_loss()
        now = time.perf_counter()
        step_tokens = self._config.training.batch_size * self._config.data.sequence_length
        rate = self._steps * step_tokens / (now - self._since)
        self._steps, self._since = 0, now
        self.last = {
            "train/loss": loss,
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/tokens_per_second": rate,
            "train/flops": self._start.flops + self._flops,
            "train/seconds": self._start.seconds + self._switch.elapsed(),
        }
        if self._peak is not None:
            self.last["train/mfu"] = rate * step_flops / step_tokens / (self._peak * trainer.world_size)
        module.record(self.last)


def phase_flops(config: RunConfig, phase: Phase, costs: Costs, step: int, since: int | None = None) -> float:
    """Training FLOPs of a phase up to the global step `step`, from its first step or from `since` on."""
    steps = range(phase.first_step if since is None else since, step)
    if phase.mode == "dense":
        blocks = len(steps) * costs.dense()
    else:
        copies = config.method == "upcycle"
        blocks = sum(costs.sparse(config.moe, top_k_at(config, one), copies=copies) for one in steps)
    return config.training.batch_size * blocks
