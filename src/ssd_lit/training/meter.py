"""Loss, speed and cost of training, at every logged step."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from ssd_lit.config import RunConfig
from ssd_lit.layout import Totals
from ssd_lit.models.flops import PEAK_FLOPS, training_flops
from ssd_lit.moe.ffn import Mode
from ssd_lit.training.module import Pretraining
from ssd_lit.training.schedule import Phase


class Meter(Callback):
    """Logs the loss over the steps since the last logged one, tokens a second, training FLOPs and MFU.

    It also logs before every checkpoint and at the end of a phase, so that a checkpoint never holds half-filled
    sums: a run that is interrupted logs the same points.
    """

    def __init__(self, phase: Phase, config: RunConfig, start: Totals, flops_per_token: float):
        self.last: dict[str, float] = {}
        """The values logged last."""
        self._first_step = phase.first_step
        self._every = (config.training.log_every, config.training.checkpoint_every)
        self._start_flops = start.flops
        self._step_flops = flops_per_token * config.training.batch_size * config.data.sequence_length
        self._flops_per_token = flops_per_token
        self._peak: float | None = None
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        if module.device.type == "cuda" and module.config.training.precision == "bf16":
            self._peak = PEAK_FLOPS.get(torch.cuda.get_device_name(module.device))
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        self._since -= time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        self._since += time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if not (trainer.should_stop or any(step % every == 0 for every in self._every)):
            return
        loss = module.train_loss.compute().item()
        tokens = module.train_tokens.compute().item()
        module.train_loss.reset()
        module.train_tokens.reset()
        now = time.perf_counter()
        rate = tokens / (now - self._since)
        self._since = now
        self.last = {
            "train/loss": loss,
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/tokens_per_second": rate,
            "train/flops": self._start_flops + (step - self._first_step) * self._step_flops,
        }
        if self._peak is not None:
            self.last["train/mfu"] = rate * self._flops_per_token / (self._peak * trainer.world_size)
        module.record(self.last)


def phase_flops(config: RunConfig, phase: Phase, vocab_size: int) -> float:
    """Training FLOPs of one token in that phase."""
    mode: Mode = "sparse" if phase.mode == "sparse" else "dense"
    return training_flops(config.model, config.moe, mode, vocab_size=vocab_size, context=config.data.sequence_length)
