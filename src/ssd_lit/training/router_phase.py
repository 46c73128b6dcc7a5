"""Training the routers of a finished model: it touches no other weight."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm import tqdm

from ssd_lit.config import RunConfig
from ssd_lit.data.datamodule import TokenData
from ssd_lit.data.objectives import Batch, build_objective
from ssd_lit.models.flops import forward_costs
from ssd_lit.models.hooks import ffn_inputs
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.paths import checkpoint_path
from ssd_lit.records import PhaseRecord, Totals, close_stage
from ssd_lit.run import Run
from ssd_lit.support.provenance import timed
from ssd_lit.training.checkpoint import build_model, load_beside_routers, read_checkpoint, weights_of, write_checkpoint
from ssd_lit.training.logger import Recorder, RecorderLogger
from ssd_lit.training.router_loss import contributions, router_loss
from ssd_lit.training.schedule import next_phase
from ssd_lit.training.trainer import quiet


def train_routers(run: Run, recorder: Recorder, provenance: dict[str, object]) -> PhaseRecord:
    """Train a router for every layer of the MoEfied model, and put phase and stage on record; returns the former.

    All other weights are those of the stage before; the checkpoint holds weights only. The FLOPs are those of the
    model's forward passes and of the routers' own, the steps are not steps of the run.
    """
    began, config = time.perf_counter(), run.config
    before, *_ = (stage for stage in reversed(run.training_stages) if stage != "route")
    history = run.phases()[: run.stage(before).phase + 1]
    phase = next_phase(config, history)
    assert phase is not None, "a run at its end has no router to train"
    model = build_model(config, run.vocab, router=config.moe.posthoc_router, read_weights=False)
    load_beside_routers(model, read_checkpoint(run.checkpoint(before)))
    for ffn in model.ffns:
        ffn.router.init_trainable(ffn.gating_weight)
    objective = build_objective(model.objective_name, run.vocab)
    data = TokenData.of_run(config, run.tokens, objective.noise_per_token)
    fitting = RouterFitting(config, model, objective, history[-1].last_step)
    with quiet():
        _trainer(config, recorder, run.folder / "work").fit(fitting, data)
    # The loss is a mean over tokens of finite outputs of a frozen model: only the routers can leave the numbers.
    if not all(p.isfinite().all() for p in fitting.model.parameters()):
        raise ValueError(f"{config.name} {phase.name}: the routers' weights are not finite; lower moe.router_lr")
    write_checkpoint(checkpoint_path(run.folder, "route"), {"state_dict": weights_of(model.cpu())})

    costs = forward_costs(config.model, config.moe, run.vocab, config.data.sequence_length)
    blocks = config.moe.router_steps * config.training.batch_size
    tokens = blocks * config.data.sequence_length
    routers = sum(2.0 * p.numel() for ffn in model.ffns for p in ffn.router.parameters() if p.ndim == 2)
    spent = Totals(flops=blocks * costs.dense() / 3 + 3 * tokens * routers, seconds=time.perf_counter() - began)
    record = phase.record(config, history, history[-1].total, spent, "router trained", [])
    record = replace(record, inputs=run.made_from(), provenance=timed(provenance, time.time() - spent.seconds))
    record.write(run.folder)
    close_stage(run.folder, "route", record)
    return record


class RouterFitting(LightningModule):
    """The routers of a frozen model, fitted to what its experts really contribute."""

    def __init__(self, config: RunConfig, model: LanguageModel, objective: Any, run_step: int):
        super().__init__()
        self.model = model
        self._config = config
        self._objective = objective
        self._run_step = run_step

    def configure_optimizers(self) -> Any:
        self.model.requires_grad_(False)
        routers = [p.requires_grad_() for ffn in self.model.ffns for p in ffn.router.parameters()]
        optimizer = torch.optim.AdamW(routers, lr=self._config.moe.router_lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self._config.moe.router_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        generator = torch.Generator(self.device).manual_seed(self._config.seed + self.global_step)
        shape = (*batch["inputs"].shape, self._objective.noise_per_token)
        found: Batch = self._objective(batch, torch.rand(*shape, generator=generator, device=self.device))
        return found

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        seen = ffn_inputs(self.model, batch)
        kind = self._config.moe.posthoc_router
        assert kind is not None
        losses = [
            router_loss(ffn.router(x.float()), contributions(ffn, x.float(), kind), kind)
            for ffn, x in zip(self.model.ffns, seen, strict=True)
        ]
        loss = torch.stack(losses).mean()
        if self.global_step % self._config.training.log_every == 0:
            assert self.trainer.logger is not None
            self.trainer.logger.log_metrics({"router/loss": loss.item()}, step=self._run_step + self.global_step)
        return loss


class _Bar(Callback):
    """A progress bar on a terminal."""

    def __init__(self, run: str, steps: int):
        self._bar = tqdm(desc=f"{run} router", total=steps, unit="step", disable=None)

    def on_train_batch_end(self, *_: Any) -> None:
        self._bar.update()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._bar.close()


def _trainer(config: RunConfig, recorder: Recorder, folder: Path) -> Trainer:
    return Trainer(
        max_steps=config.moe.router_steps,
        devices=1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=RecorderLogger(recorder),
        callbacks=[_Bar(config.name, config.moe.router_steps)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
