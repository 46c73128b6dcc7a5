"""The LightningModule of all phases."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from ssd_lit.config import RunConfig
from ssd_lit.data.objectives import IGNORED, Batch, Objective
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.training.optim import NonFiniteGuard, build_optimizer, build_scheduler, leave_out_if
from ssd_lit.training.schedule import top_k_at
from ssd_lit.training.weighted_mean import WeightedMean

COMPILE_MODE = "reduce-overhead"
"""Forward and backward pass become CUDA graphs: a sparse layer is a dozen short kernels, and launching them one by one
would keep the GPU waiting. Has no effect without a GPU."""
LOSS_SUMS = "train_loss_sums"
"""Checkpoint key of the sums of the training loss since its last logged point, a row a process."""


class Pretraining(LightningModule):
    """A language model, its optimiser and its losses; the mode is set on `model` before a phase begins.

    Random numbers (hidden tokens, dropout) are seeded with (seed, step, rank) at every step, as the data is: a resumed
    run draws the same ones, on any number of processes, and a checkpoint holds no generator state.
    """

    def __init__(self, config: RunConfig, model: LanguageModel, objective: Objective):
        super().__init__()
        self.config = config
        self.model = model
        self.guard = NonFiniteGuard(1 if config.training.non_finite == "stop" else config.training.non_finite_limit)
        self._objective = objective
        self._train_loss = WeightedMean()
        self._validation_loss = WeightedMean()
        self._loss = self._losses
        if config.training.compile:
            # The loss is compiled too, so that the logits of a large vocabulary need not be held as a whole.
            self._loss = torch.compile(self._losses, mode=COMPILE_MODE)
            # One graph for every k of a schedule: beyond the limit torch would run uncompiled.
            dynamo = torch._dynamo.config
            dynamo.recompile_limit = max(dynamo.recompile_limit, config.moe.experts + 1)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Inputs and targets of the objective; noise is fresh in training and the blocks' own in validation."""
        if self.trainer.training:
            return self._posed(batch, self.global_step)
        noise = batch.pop("noise", None)
        return self._objective(batch, self._noise(batch) if noise is None else noise)

    def _posed(self, batch: Batch, step: int) -> Batch:
        entropy = [self.config.seed, step, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
        return self._objective(batch, self._noise(batch))

    def _noise(self, batch: Batch) -> Tensor:
        return torch.rand(*batch["inputs"].shape, self._objective.noise_per_token, device=self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._set_top_k(self.global_step)

    def _set_top_k(self, step: int) -> None:
        if self.model.ffns[0].mode == "sparse":
            self.model.set_mode("sparse", top_k_at(self.config, step))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, gate = self._loss(batch)
        # One step that is not finite must not hide the loss of all others.
        finite = loss.detach().isfinite()
        self._train_loss.update(torch.where(finite, loss, 0.0), _targets(batch) * finite)
        total = self._total(loss, gate)
        # A loss that is not finite gives NaN gradients in all processes.
        return total * (1.0 + 0.0 * total.detach())

    def run_again(self, step: int) -> Tensor:
        """The loss of a step's batch, with the same random numbers and the current weights; never compiled."""
        batch = self.trainer.datamodule.train_batch(step)  # type: ignore[attr-defined]
        self._set_top_k(step)
        return self._total(*self._losses(self._posed({name: x.to(self.device) for name, x in batch.items()}, step)))

    def _total(self, loss: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            return loss
        moe = self.config.moe
        return loss + moe.balance_weight * gate[0] + moe.z_weight * gate[1]

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The loss, and the two auxiliary losses of a learned router."""
        loss = self.model.loss(batch)
        return loss, self.model.gate_losses() if self.config.moe.router == "gate" else None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip for a fused optimizer, which may unscale gradients itself; bf16 has no scaling.
        assert gradient_clip_val is not None
        norm = torch.nn.utils.clip_grad_norm_(self.trainer.precision_plugin.main_params(optimizer), gradient_clip_val)
        leave_out_if(self.guard.update(norm, self.global_step), self.trainer.optimizers[0])

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # Lightning would keep the gradients through the next forward pass, where memory is needed most.
        self.trainer.optimizers[0].zero_grad()

    def on_train_end(self) -> None:
        # Lightning would copy the moments to the host at the end, where nothing uses them.
        self.trainer.strategy.optimizers = []

    def take_train_loss(self) -> float:
        """The mean loss over all targets since the last call, over all processes; waits for the device."""
        return self._take(self._train_loss).item()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._validation_loss.update(self.model.loss(batch), _targets(batch))

    def on_validation_epoch_end(self) -> None:
        loss = self._take(self._validation_loss)
        self.record({"validation/loss": loss.item(), "validation/perplexity": loss.exp().item()})

    def _take(self, mean: WeightedMean) -> Tensor:
        value: Tensor = mean.compute()
        mean.reset()
        return value

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A run may stop between two logged points of the loss.
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
        """Log `values` at the current optimiser step, once for all processes."""
        assert self.trainer.logger is not None
        self.trainer.logger.log_metrics(values, step=self.global_step)


def _targets(batch: Batch) -> Tensor:
    """The number of targets that count."""
    return (batch["targets"] != IGNORED).sum()
