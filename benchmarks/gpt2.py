"""GPT-2 at the sizes that training is measured at, as the benchmarks build and step it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssd_lit.config import ModelConfig, MoEConfig, OptimConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.data.objectives import Batch
from ssd_lit.models.flops import PEAK_FLOPS, Costs, forward_costs
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.names import Activation
from ssd_lit.training.optim import build_optimizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Shape:
    """A model and the batch that it is trained on."""

    layers: int
    d_model: int
    heads: int
    batch: int
    sequence: int = 1024
    vocabulary: int = 50304

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.sequence

    def model(self, activation: Activation = "relu") -> ModelConfig:
        return ModelConfig(
            layers=self.layers, d_model=self.d_model, heads=self.heads, d_ff=4 * self.d_model, activation=activation
        )

    @property
    def vocab(self) -> VocabInfo:
        return VocabInfo(self.vocabulary, eos_id=0)

    def costs(self, moe: MoEConfig) -> Costs:
        return forward_costs(self.model(), moe, self.vocab, self.sequence)


SHAPES = {
    "small": Shape(layers=12, d_model=768, heads=12, batch=24),
    "medium": Shape(layers=24, d_model=1024, heads=16, batch=24),
    "1.3b": Shape(layers=24, d_model=2048, heads=16, batch=16),
    "2.7b": Shape(layers=32, d_model=2560, heads=20, batch=8),
    "6.7b": Shape(layers=32, d_model=4096, heads=32, batch=8),
    # That of configs/sizes/h100.yaml.
    "30m": Shape(layers=8, d_model=512, heads=8, batch=64, sequence=512, vocabulary=32000),
    # For trying the scripts on a CPU.
    "tiny": Shape(layers=2, d_model=64, heads=2, batch=4, sequence=64, vocabulary=512),
}


def build(shape: Shape, moe: MoEConfig, activation: Activation = "relu") -> LanguageModel:
    """A model with fresh weights on the device, whose neurons are experts as they stand."""
    torch.manual_seed(0)
    with DEVICE:
        model = LanguageModel(shape.model(activation), moe, shape.vocab, context=shape.sequence)
    for ffn in model.ffns:
        ffn.router.on_permuted(ffn.gating_weight)
    return model


def random_batch(shape: Shape) -> Batch:
    """Random tokens on the device."""
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.sequence + 1), device=DEVICE)
    return {"inputs": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def autocast() -> AbstractContextManager[Any]:
    """bfloat16 over float32 weights on the GPU, float32 elsewhere."""
    return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False) if DEVICE.type == "cuda" else nullcontext()


def stepper(model: LanguageModel, batch: Batch) -> Callable[[], Tensor]:
    """One whole step of training on the batch: compiled layers, backward pass, clipping, AdamW; returns the loss."""
    optimizer = build_optimizer(model, OptimConfig())
    model.compile_layers()

    def step() -> Tensor:
        with autocast():
            loss = model.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def mfu(flops: float, seconds: float) -> float | None:
    """Fraction of the GPU's dense bf16 peak; None where that is not known."""
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name()) if DEVICE.type == "cuda" else None
    return None if peak is None else flops / seconds / peak


def gibibytes() -> float | None:
    """Peak memory of tensors on the GPU since it was last reset."""
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None


def forget_peak() -> None:
    """Begin anew with measuring peak memory."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def shown(value: float | None, form: str) -> str:
    """A figure, or a dash where it could not be measured."""
    return "-" if value is None else format(value, form)
