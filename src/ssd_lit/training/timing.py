"""Seconds of a training step in either mode, measured on random tokens before there is any text."""

import statistics
import time
from collections.abc import Callable

import torch

from ssd_lit.config import RunConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.data.objectives import Batch, build_objective
from ssd_lit.models.flops import forward_costs
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.models.memory import largest_micro_batch
from ssd_lit.moe.names import Mode
from ssd_lit.training.checkpoint import build_model
from ssd_lit.training.optim import build_optimizer

CPU_FLOPS = 2.5e11
"""FLOPs of a timed piece without a GPU, a few seconds, where the time of a step grows with its tokens."""
WARMUP = 2


def step_seconds(config: RunConfig, vocab: VocabInfo, mode: Mode, repeats: int) -> float:
    """Seconds of a device's part of a training step: all pieces of its batch, clipping and AdamW.

    The median of so many pieces, after two that compile, and on a GPU record CUDA graphs. Leaves out what several
    devices tell each other, loading, validation and checkpoints.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    model = build_model(config, vocab).to(device)
    for ffn in model.ffns:
        ffn.router.on_permuted(ffn.gating_weight)
    model.train_as(config.training)
    model.set_mode(mode, config.moe.top_k if mode == "sparse" else None)
    blocks = _blocks(config, vocab)
    batch = _random_batch(config, vocab, model, blocks, device)
    optimizer = build_optimizer(model, config.optim)

    def piece() -> None:
        bf16 = config.training.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            loss = model.loss(batch)
        loss.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()

    seconds: list[tuple[float, float]] = []
    for _ in range(WARMUP + repeats):
        seconds.append((_seconds(piece, cuda), _seconds(update, cuda)))
        optimizer.zero_grad()
    pieces, updates = ([pair[i] for pair in seconds[WARMUP:]] for i in (0, 1))
    torch.compiler.reset()  # CUDA graphs hold memory
    return config.training.local_batch_size / blocks * statistics.median(pieces) + statistics.median(updates)


def _blocks(config: RunConfig, vocab: VocabInfo) -> int:
    """Blocks of the timed piece: on a GPU those of a piece in training."""
    whole = config.training.micro_batch_size or config.training.local_batch_size
    if torch.cuda.is_available():
        if config.training.micro_batch_size is not None:
            return whole
        return largest_micro_batch(config, vocab, torch.cuda.get_device_properties(0).total_memory)
    costs = forward_costs(config.model, config.moe, vocab, config.data.sequence_length)
    return min(whole, max(1, int(CPU_FLOPS // costs.dense())))


def _random_batch(
    config: RunConfig, vocab: VocabInfo, model: LanguageModel, blocks: int, device: torch.device
) -> Batch:
    objective = build_objective(model.objective_name, vocab)
    length = config.data.sequence_length
    tokens = torch.randint(vocab.vocab_size, (blocks, length + 1), device=device)
    noise = torch.rand(blocks, length, objective.noise_per_token, device=device)
    return objective({"inputs": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}, noise)


def _seconds(work: Callable[[], None], cuda: bool) -> float:
    start = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
