"""The one LightningModule of all phases."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric, SumMetric

from ssd_lit.config import RunConfig
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.training.optim import build_optimizer, build_scheduler

Batch = dict[str, Tensor]


class Pretraining(LightningModule):
    """A language model, its optimiser and its losses; the mode is set on `model` before a phase begins.

    Random numbers (dropout) are drawn anew for every step from (seed, step, rank), as the data is: a run that
    was interrupted draws the same ones, on any number of processes, with nothing to save.
    """

    def __init__(self, config: RunConfig, model: LanguageModel):
        super().__init__()
        self.config = config
        self.model = model
        # Torchmetrics adds up over all processes when a value is computed.
        self.train_loss = MeanMetric()
        self.train_tokens = SumMetric()
        self.validation_loss = MeanMetric()
        # The loss inside the compiled region: logits of a large vocabulary need never exist as a whole.
        self._loss = torch.compile(model.loss) if config.training.compile else model.loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        entropy = [self.config.seed, self.global_step, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = self._loss(batch["inputs"], batch["targets"])
        self.train_loss.update(loss.detach(), weight=batch["targets"].numel())
        self.train_tokens.update(batch["targets"].numel())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.model.loss(batch["inputs"], batch["targets"])
        self.validation_loss.update(loss, weight=batch["targets"].numel())

    def on_validation_epoch_end(self) -> None:
        loss = self.validation_loss.compute()
        self.validation_loss.reset()
        self.record({"validation/loss": loss.item(), "validation/perplexity": loss.exp().item()})

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config.optim)
        scheduler = build_scheduler(optimizer, self.config.optim, self.config.training.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def record(self, values: dict[str, float]) -> None:
        """Log `values` at the number of optimiser steps done, once for all processes."""
        assert self.trainer.logger is not None
        self.trainer.logger.log_metrics(values, step=self.global_step)
