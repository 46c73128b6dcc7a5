"""Training and inference FLOPs, counted from shapes; a multiply-add is two.

Matrix products only: attention projections, attention scores and values over the full S x S square (as dense
kernels compute it without the causal saving), FFN, router, output head. Embedding look-ups, norms, softmax and
the clustering at a switch are left out. The backward pass counts twice the forward pass, except for the router,
which has no backward pass.
"""

from ssd_lit.config import ModelConfig, MoEConfig
from ssd_lit.moe.ffn import Mode

# Dense bf16 tensor-core peaks in FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}


def forward_flops(model: ModelConfig, *, vocab_size: int, context: int) -> float:
    """FLOPs of one token's dense forward pass."""
    d = model.d_model
    attention = 8 * d * d + 4 * context * d
    return model.layers * (attention + _ffn_flops(d, model.d_ff)) + 2 * d * vocab_size


def training_flops(model: ModelConfig, moe: MoEConfig, mode: Mode, *, vocab_size: int, context: int) -> float:
    """FLOPs of one token's forward and backward pass in that mode."""
    dense = 3 * forward_flops(model, vocab_size=vocab_size, context=context)
    if mode == "dense":
        return dense
    saved = _ffn_flops(model.d_model, model.d_ff) * (1 - moe.top_k / moe.experts)
    return dense - 3 * model.layers * saved + model.layers * router_flops(model, moe)


def router_flops(model: ModelConfig, moe: MoEConfig) -> float:
    """FLOPs of scoring all experts for one token in one layer."""
    return 2 * model.d_model * moe.experts


def _ffn_flops(d_model: int, d_ff: int) -> int:
    return 4 * d_model * d_ff
