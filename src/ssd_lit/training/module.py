"""The one LightningModule of all phases."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from ssd_lit.config import RunConfig
from ssd_lit.data.objectives import IGNORED, Batch, Objective
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.training.optim import build_optimizer, build_scheduler
from ssd_lit.training.running_mean import RunningMean
from ssd_lit.training.top_k import top_k_at

LOSS_SUMS = "train_loss_sums"
"""Key of a checkpoint: what went into the next point of the training loss, a row a process."""


class Pretraining(LightningModule):
    """A language model, its optimiser and its losses; the mode is set on `model` before a phase begins.

    Random numbers (hidden tokens, dropout) are drawn anew for every step from (seed, step, rank), as the data is: a
    run that was interrupted draws the same ones, on any number of processes, with nothing to save.
    """

    def __init__(self, config: RunConfig, model: LanguageModel, objective: Objective):
        super().__init__()
        self.config = config
        self.model = model
        self._objective = objective
        self._train_loss = RunningMean()
        self._validation_loss = RunningMean()
        self._loss = self._losses
        if config.training.compile:
            # The loss inside the compiled region: logits of a large vocabulary need never exist as a whole.
            self._loss = torch.compile(self._losses)
            # One graph for every k of a schedule: beyond its limit torch would go on without compiling.
            dynamo = torch._dynamo.config
            dynamo.recompile_limit = max(dynamo.recompile_limit, config.moe.experts + 1)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """What the model is to read and to predict; the blocks' own noise in validation, fresh noise in training."""
        noise = batch.pop("noise", None)
        if self.trainer.training:
            entropy = [self.config.seed, self.global_step, self.global_rank]
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
        if noise is None:
            noise = torch.rand(*batch["inputs"].shape, self._objective.draws, device=self.device)
        return self._objective(batch, noise)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.model.ffns[0].mode == "sparse":
            self.model.set_mode("sparse", top_k_at(self.config, self.global_step))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, gate = self._loss(batch)
        self._train_loss.update(loss, _targets(batch))
        if gate is None:
            return loss
        moe = self.config.moe
        return loss + moe.balance_weight * gate[0] + moe.z_weight * gate[1]

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The loss, and the two of a learned router."""
        loss = self.model.loss(batch)
        return loss, self.model.gate_losses() if self.config.moe.router == "learned" else None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip for a fused optimizer, which may unscale gradients itself; bf16 scales none.
        assert gradient_clip_val is not None
        torch.nn.utils.clip_grad_norm_(self.trainer.precision_plugin.main_params(optimizer), gradient_clip_val)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # Lightning would keep them through the next forward pass, where memory is needed most.
        self.trainer.optimizers[0].zero_grad()

    def take_train_loss(self) -> float:
        """The mean loss over all targets since the last call, of all processes; waits for the device."""
        return self._take(self._train_loss).item()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._validation_loss.update(self.model.loss(batch), _targets(batch))

    def on_validation_epoch_end(self) -> None:
        loss = self._take(self._validation_loss)
        self.record({"validation/loss": loss.item(), "validation/perplexity": loss.exp().item()})

    def _take(self, mean: RunningMean) -> Tensor:
        found: Tensor = mean.compute()
        mean.reset()
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A run may be asked to stop between two points of the loss.
        sums = self.trainer.strategy.all_gather(self._train_loss.sums())
        checkpoint[LOSS_SUMS] = sums.reshape(-1, 2).cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if LOSS_SUMS in checkpoint:
            self._train_loss.go_on_from(checkpoint[LOSS_SUMS][self.global_rank])

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config.optim)
        scheduler = build_scheduler(optimizer, self.config.optim, self.config.training.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def record(self, values: dict[str, float]) -> None:
        """Log `values` at the number of optimiser steps done, once for all processes."""
        assert self.trainer.logger is not None
        self.trainer.logger.log_metrics(values, step=self.global_step)


def _targets(batch: Batch) -> Tensor:
    """How many targets count."""
    return (batch["targets"] != IGNORED).sum()
