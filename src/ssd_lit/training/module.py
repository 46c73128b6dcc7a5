"""The LightningModule of all phases."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from ssd_lit.config import RunConfig
from ssd_lit.data.objectives import IGNORED, Batch, Objective, in_pieces
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.permutation import whole
from ssd_lit.training.data_parallel import GradientSums, WholeModels
from ssd_lit.training.optim import NonFiniteGuard, build_optimizer, build_scheduler, leave_out_if
from ssd_lit.training.schedule import Phase, top_k_at, trained_k
from ssd_lit.training.sharding import Shards, shard
from ssd_lit.training.weighted_mean import WeightedMean

LOSS_SUMS = "train_loss_sums"
"""Checkpoint key of the sums of the training loss since its last logged point, a row a process."""


class Pretraining(LightningModule):
    """A language model, its optimiser and its losses; `begin_phase` sets the mode of a phase.

    Random numbers (hidden tokens, dropout) are seeded with (seed, step, rank) at every step, as the data is: a resumed
    run draws the same ones, on any number of processes, and a checkpoint holds no generator state.

    A process computes its part of the batch in pieces of `micro_batch_size` blocks, whose gradients are added up: each
    piece has as many targets as any other.
    """

    def __init__(self, config: RunConfig, model: LanguageModel, objective: Objective, micro_batch_size: int):
        super().__init__()
        self.config = config
        self.model = model
        self.micro_batch_size = micro_batch_size
        self._pieces = config.training.local_batch_size // micro_batch_size
        self._sums: GradientSums | None = None
        self._phase = Phase(0, "dense", 0)
        model.train_as(config.training)
        self.guard = NonFiniteGuard(1 if config.training.non_finite == "stop" else config.training.non_finite_limit)
        self._objective = objective
        self._train_loss = WeightedMean()
        self._validation_loss = WeightedMean()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, Shards):
            assert self.device_mesh is not None
            shard(self.model, self.device_mesh["data_parallel"])

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

    def begin_phase(self, phase: Phase) -> None:
        """Run in the mode of the phase that begins."""
        self._phase = phase
        self._set_mode_of_phase()

    def _set_mode_of_phase(self) -> None:
        """Run in the phase's mode, of the schedule's k, whatever single steps do."""
        if self._phase.mode == "sparse":
            self.model.set_mode("sparse", top_k_at(self.config, self.global_step))
        else:
            self.model.set_mode("dense")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._set_mode_of_step(self.global_step)

    def _set_mode_of_step(self, step: int) -> None:
        k = trained_k(self.config, self._phase, step)
        if k is not None:
            self.model.set_mode("sparse", k)
        if k is None or self.model.ffns[0].chooses_all:
            # All experts are the same function, which is compiled for dense phases already.
            self.model.set_mode("dense")

    def on_fit_start(self) -> None:
        if self._adds_up:
            self._sums = GradientSums(self.model)

    @property
    def _adds_up(self) -> bool:
        """Whether this module adds gradients up over the processes: not where the strategy does."""
        return isinstance(self.trainer.strategy, WholeModels)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        pieces = in_pieces(batch, self.micro_batch_size)
        parts = len(pieces) * (self.trainer.world_size if self._adds_up else 1)
        self._count_choices(pieces)
        language = losses = torch.zeros((), device=self.device)
        for place, piece in enumerate(pieces):
            loss, gate = self._losses(piece)
            total = self._total(loss, gate)
            language = language + loss.detach() / len(pieces)
            losses = losses + total.detach() / len(pieces)
            # A loss that is not finite gives NaN gradients in all processes.
            part = total * (1.0 + 0.0 * total.detach()) / parts
            if place < len(pieces) - 1:
                self._back(part, first=place == 0)
        if self._sums is not None:
            self._sums.begin()
        # One step that is not finite must not hide the loss of all others.
        finite = language.isfinite()
        self._train_loss.update(torch.where(finite, language, 0.0), _targets(batch) * finite)
        return {"loss": part, "batch_loss": losses}

    def _back(self, loss: Tensor, *, first: bool) -> None:
        """The backward pass of a piece before the last one."""
        with torch.autocast(self.device.type, enabled=False):
            loss.backward()
        if first and self.config.training.compile and self.device.type == "cuda":
            # These gradients lie in the memory of a CUDA graph, which the next piece writes again.
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()

    def on_after_backward(self) -> None:
        # What follows, monitors or a validation, is of the phase.
        self._set_mode_of_phase()
        if self._sums is not None:
            self._sums.finish()

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Nothing: Lightning calls it after the backward passes of all pieces but the last."""

    @torch.no_grad()
    def _count_choices(self, pieces: list[Batch]) -> None:
        """Count the choices of a learned router over all pieces, for the load-balancing loss of each of them.

        A forward pass with the random numbers of the one that follows.
        """
        if len(pieces) == 1 or self.config.moe.router != "gate":
            return
        for ffn in self.model.ffns:
            ffn.load = None
        choices = []
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            for piece in pieces:
                self._losses(piece)
                choices.append(torch.stack([ffn.choices for ffn in self.model.ffns if ffn.choices is not None]))
        for ffn, load in zip(self.model.ffns, torch.stack(choices).mean(dim=0), strict=True):
            ffn.load = load

    def losses_again(self, step: int) -> Iterator[Tensor]:
        """The loss of each piece of a step's batch, with the same random numbers and the current weights.

        Never compiled; gradients are those of this process alone.
        """
        batch = self.trainer.datamodule.train_batch(step)  # type: ignore[attr-defined]
        self._set_mode_of_step(step)
        posed = self._posed({name: x.to(self.device) for name, x in batch.items()}, step)
        for piece in in_pieces(posed, self.micro_batch_size):
            with torch.compiler.set_stance("force_eager"):
                total = self._total(*self._losses(piece))
            yield total

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
        parameters = self.trainer.precision_plugin.main_params(optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val))
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
        # Not worth a compilation: validation is a small part of a run.
        with torch.compiler.set_stance("force_eager"):
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
            sums = checkpoint[LOSS_SUMS]
            if len(sums) != self.trainer.world_size:
                # Written by another number of processes: the first counts for all.
                sums = torch.cat([sums.sum(dim=0, keepdim=True), sums.new_zeros(self.trainer.world_size - 1, 2)])
            self._train_loss.go_on_from(sums[self.global_rank])

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
