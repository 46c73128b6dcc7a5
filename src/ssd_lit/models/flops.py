"""Training FLOPs, counted by torch on fake tensors; a multiply-add is two.

Matrix products only: attention projections, attention scores and values over the full S x S square (as dense
kernels compute it, without the causal saving), FFN, router, output head. Embedding look-ups, norms, softmax and
the clustering at a switch are left out. The backward pass counts twice the forward pass; a frozen router has none.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ssd_lit.config import ModelConfig, MoEConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.data.objectives import build_objective
from ssd_lit.models.family import family
from ssd_lit.models.hooks import ffn_inputs
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.routers import build_router

# Dense bf16 tensor-core peaks in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}


@dataclass(frozen=True)
class Costs:
    """FLOPs of one block's forward pass."""

    rest: float
    """All but FFNs and routers."""
    ffn: float
    """All FFNs in full, as before MoEfication or upcycling."""
    scores: float
    """Scoring all experts with a router of one matrix."""
    predicted: float = 0.0
    """Scoring them with the post-hoc router, if there is one."""

    def dense(self) -> float:
        """Forward and backward pass in dense mode."""
        return 3 * (self.rest + self.ffn)

    def sparse(self, moe: MoEConfig, k: int, *, upcycled: bool = False) -> float:
        """Forward and backward pass with k experts a token, slices of the FFN or copies of all of it."""
        experts = k if upcycled else k / moe.experts
        return 3 * (self.rest + experts * self.ffn) + (3 if moe.router == "gate" else 1) * self.scores

    def router_training(self) -> float:
        """A forward pass in dense mode, and forward and backward pass of the post-hoc routers."""
        return self.rest + self.ffn + 3 * self.predicted


@cache
def forward_costs(model: ModelConfig, moe: MoEConfig, vocab: VocabInfo, sequence_length: int) -> Costs:
    """FLOPs of a block of S tokens in this model."""
    # Fake tensors have a shape and a device, and no memory.
    with FakeTensorMode():
        fake = LanguageModel(model, moe, vocab, context=sequence_length, read_weights=False)
        lengths = build_objective(family(model.family).objective, vocab).lengths(sequence_length)
        inputs, targets = (torch.zeros(1, length, dtype=torch.long) for length in lengths)
        batch = {"inputs": inputs, "targets": targets}
        # Kernels with built-in masks would be counted at less than the S x S square.
        fake.backbone.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            fake(batch)
        tokens = [len(x) for x in ffn_inputs(fake, batch)]
        kind = moe.posthoc_router
        router = None if kind is None else build_router(kind, model.d_model, moe.experts, moe.router_hidden)
    weights = [sum(p.numel() for p in ffn.neuron_parameters() if p.ndim == 2) for ffn in fake.ffns]
    ffn = sum(2.0 * t * w for t, w in zip(tokens, weights, strict=True))
    scores = sum(2.0 * t * model.d_model * moe.experts for t in tokens)
    of_router = 0 if router is None else sum(p.numel() for p in router.parameters() if p.ndim == 2)
    return Costs(counter.get_total_flops() - ffn, ffn, scores, sum(2.0 * t * of_router for t in tokens))
