"""Training the post-hoc routers of a finished model, all other weights frozen."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ssd_lit.config import MoEConfig
from ssd_lit.data.blocks import StepBatchSampler, TokenBlocks
from ssd_lit.data.objectives import build_objective, in_pieces
from ssd_lit.models.flops import forward_costs
from ssd_lit.models.hooks import ffn_inputs
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.models.memory import blocks_at_once
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.names import PosthocRouter
from ssd_lit.paths import checkpoint_path
from ssd_lit.records import PhaseRecord, Totals, close_stage
from ssd_lit.run import Run
from ssd_lit.support.provenance import timed
from ssd_lit.training.checkpoint import (
    SWITCH_STATE,
    build_model,
    load_beside_routers,
    read_checkpoint,
    weights_of,
    write_checkpoint,
)
from ssd_lit.training.schedule import next_phase

if TYPE_CHECKING:
    from ssd_lit.training.logger import Recorder

Example = tuple[Tensor, Tensor]
"""Inputs of an FFN [T, D] and what its experts contribute to them [T, E]."""


def train_routers(run: Run, recorder: "Recorder", provenance: dict[str, object]) -> PhaseRecord:
    """Train a router for every layer of the MoEfied model; writes the records of phase and stage, returns the former.

    All other weights are those of the stage before; the checkpoint holds weights only. The FLOPs count the model's
    forward passes and the routers' training. The steps do not count as steps of the run.
    """
    began, config = time.perf_counter(), run.config
    before, *_ = (stage for stage in reversed(run.training_stages) if stage != "route")
    history = run.phases()[: run.stage(before).phase + 1]
    phase = next_phase(config, history)
    assert phase is not None, "a run at its end has no router to train"
    model = build_model(config, run.vocab, router=config.moe.posthoc_router, read_weights=False)
    load_beside_routers(model, read_checkpoint(run.checkpoint(before)))
    model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
    at_once = blocks_at_once(config, run.vocab)
    losses = fit_routers(
        model.ffns, _examples(run, model, at_once), config.moe, pieces=config.training.batch_size // at_once
    )
    steps = tqdm(losses, desc=f"{config.name} router", total=config.moe.router_steps, unit="step", disable=None)
    for step, loss in enumerate(steps):
        if step % config.training.log_every == 0:
            recorder.log(history[-1].last_step + step, {"router/loss": loss.item()})
    # The frozen model's outputs are finite: only the routers can diverge.
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"{config.name} {phase.name}: the routers' weights are not finite; lower moe.router_lr")
    state = {SWITCH_STATE: {"inputs": run.made_from(), "phase": phase.index + 1}}
    write_checkpoint(checkpoint_path(run.folder, "route"), {"state_dict": weights_of(model.cpu()), "callbacks": state})

    costs = forward_costs(config.model, config.moe, run.vocab, config.data.sequence_length)
    flops = config.moe.router_steps * config.training.batch_size * costs.router_training()
    spent = Totals(flops=flops, seconds=time.perf_counter() - began)
    record = phase.record(config, history, history[-1].total, spent, "router trained", [])
    record = replace(record, inputs=run.made_from(), provenance=timed(provenance, time.time() - spent.seconds))
    record.write(run.folder)
    close_stage(run.folder, "route", record)
    return record


def fit_routers(
    ffns: Sequence[ExpertFFN], examples: Iterable[Sequence[Example]], moe: MoEConfig, *, pieces: int = 1
) -> Iterator[Tensor]:
    """Train the routers of some FFNs for `moe.router_steps` steps; yields the loss of every step.

    An element of `examples` has one `Example` for every FFN; the batch of a step is so many `pieces` of them, of as
    many tokens each.
    """
    kind = moe.posthoc_router
    assert kind is not None, "there is no router to train"
    for ffn in ffns:
        ffn.router.init_trainable(ffn.gating_weight)
    parameters = [p.requires_grad_() for ffn in ffns for p in ffn.router.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=moe.router_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, moe.router_steps)
    following = iter(examples)
    for _ in range(moe.router_steps):
        optimizer.zero_grad()
        total = torch.zeros((), device=parameters[0].device)
        for piece in itertools.islice(following, pieces):
            losses = [router_loss(ffn.router(x), target, kind) for ffn, (x, target) in zip(ffns, piece, strict=True)]
            loss = torch.stack(losses).mean() / pieces
            loss.backward()
            total += loss.detach()
        optimizer.step()
        schedule.step()
        yield total


@torch.no_grad()
def contributions(ffn: ExpertFFN, x: Tensor, kind: PosthocRouter) -> Tensor:
    """What each expert contributes to tokens x [T, D], as [T, E].

    `mass_mlp` and `centers`: its fraction of the token's activation mass (MoEfication, arXiv 2110.01786, section 3.3).
    `norm_mlp`: the L2 norm of its output (D2DMoE, arXiv 2310.04361, section 3.2), in units of the mean over tokens and
    experts.
    """
    if kind == "norm_mlp":
        norms = ffn.output_norms(x)
        return norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)
    mass = ffn.activation_mass(x)
    return mass / mass.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)


def router_loss(scores: Tensor, contributed: Tensor, kind: PosthocRouter) -> Tensor:
    """Loss of scores [T, E] against contributions [T, E]: mean squared error for `norm_mlp`, else cross-entropy."""
    if kind == "norm_mlp":
        return F.mse_loss(scores, contributed)
    return F.cross_entropy(scores.clamp_min(1e-6).log(), contributed)


def _examples(run: Run, model: LanguageModel, at_once: int) -> Iterator[list[Example]]:
    """The examples of every step, without end, from the training split's first batch on, of so many blocks at once.

    The frozen model computes them in the precision in which it was trained.
    """
    config, kind = run.config, run.config.moe.posthoc_router
    assert kind is not None
    objective = build_objective(model.objective_name, run.vocab)
    blocks = TokenBlocks(run.tokens, "train")
    device = model.ffns[0].w_in.device
    for step, places in enumerate(StepBatchSampler(len(blocks), config.training.batch_size, config.seed)):
        rows = torch.utils.data.default_collate(blocks.__getitems__(places))
        batch = {name: x.to(device) for name, x in rows.items()}
        generator = torch.Generator(device).manual_seed(config.seed + step)
        noise = torch.rand(*batch["inputs"].shape, objective.noise_per_token, generator=generator, device=device)
        for piece in in_pieces(objective(batch, noise), at_once):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.training.precision == "bf16"):
                inputs = ffn_inputs(model, piece)
                made = [contributions(ffn, x, kind) for ffn, x in zip(model.ffns, inputs, strict=True)]
            yield [(x.float(), contributed.float()) for x, contributed in zip(inputs, made, strict=True)]
