"""Backends of the sparse FFN. All give the same outputs and gradients; they differ in speed."""

import torch
from torch import Tensor

from ssd_lit.moe import kernels
from ssd_lit.moe.backends.decode_cpu import decode_cpu
from ssd_lit.moe.backends.grouped import grouped, loop
from ssd_lit.moe.backends.interface import Activation, Backend, Experts
from ssd_lit.moe.backends.reference import masked
from ssd_lit.moe.kernels import quack as products

__all__ = [
    "BACKENDS",
    "NAMES",
    "Activation",
    "Backend",
    "Experts",
    "choose_backend",
    "fastest_backend",
    "obstacle_of_quack",
]

BACKENDS: dict[str, Backend] = {"masked": masked, "loop": loop, "grouped": grouped, "decode_cpu": decode_cpu}
"""Backends in plain torch, which run anywhere."""

NAMES = ("auto", *BACKENDS, "fused", "decode_gpu", "quack")
"""All names; the last three are kernels, imported only where they can run."""

FEW_TOKENS = {"cpu": 8, "cuda": 1}
"""Up to this number of tokens the decode backends are fastest (benchmarks/ffn.py, ffn_float32.py)."""

MANY_NUMBERS = 2**20
"""From this size of a float32 input on, the fused kernels are faster on a GPU than products with all neurons."""

MANY_TOKENS, WIDE = 4096, 2048
"""From this number of tokens on, QuACK's products are faster than the fused kernels, for an FFN that has a gate or is
at least so wide (benchmarks/ffn.py, training_step.py)."""


def choose_backend(
    name: str, x: Tensor, experts: Experts, activation: Activation, *, weighted: bool = False, ragged: bool = False
) -> Backend:
    """Returns the backend of that name, or the fastest one for x [T, D] if the name is `auto`.

    Raises ValueError for kernels that cannot run here.
    """
    if name == "auto":
        name = fastest_backend(x, experts, activation, weighted=weighted, ragged=ragged)
    if name in BACKENDS:
        return BACKENDS[name]
    if not kernels.runs_on(x):
        raise ValueError(f"backend {name!r}: needs a CUDA device and triton; allowed here are {', '.join(BACKENDS)}")
    if experts.b_gate is not None:
        raise ValueError(f"backend {name!r}: knows no bias of a gate; allowed here are {', '.join(BACKENDS)}")
    if name == "quack" and (obstacle := obstacle_of_quack(x, experts, activation, weighted=weighted)):
        raise ValueError(f"backend 'quack': {obstacle}; take 'fused'")
    from ssd_lit.moe.backends.decode_gpu import decode_gpu
    from ssd_lit.moe.backends.fused import fused
    from ssd_lit.moe.backends.quack import quack

    return {"fused": fused, "decode_gpu": decode_gpu, "quack": quack}[name]


def fastest_backend(
    x: Tensor, experts: Experts, activation: Activation, *, weighted: bool = False, ragged: bool = False
) -> str:
    """The backend of `auto` for x [T, D], by its device, dtype and number of tokens, as measured in benchmarks/.

    On the CPU decode_cpu for a few tokens, else the loop. On a GPU kernels, which lack dropout of activations and the
    bias of a gate; but for a small input in float32, where a few large products take less time than many launches.
    """
    few = len(x) <= FEW_TOKENS[x.device.type] and not torch.is_grad_enabled()
    if not x.is_cuda:
        # decode_cpu reads the choice of experts on the host, which breaks a compiled graph.
        return "decode_cpu" if few and not torch.compiler.is_compiling() else "loop"
    if not kernels.runs_on(x) or activation.dropout or experts.b_gate is not None:
        # With dynamic k, grouped waits for the number of pairs, which a CUDA graph cannot.
        return "grouped" if x.dtype == torch.bfloat16 and not ragged else "masked"
    if few:
        return "decode_gpu"
    large = len(x) >= MANY_TOKENS and (experts.w_gate is not None or experts.w_in.shape[2] >= WIDE)
    if large and obstacle_of_quack(x, experts, activation, weighted=weighted) is None:
        return "quack"
    return "masked" if x.dtype == torch.float32 and x.numel() < MANY_NUMBERS else "fused"


def obstacle_of_quack(x: Tensor, experts: Experts, activation: Activation, *, weighted: bool) -> str | None:
    """Why QuACK cannot compute these inputs, if so."""
    gated, (_, neurons, width) = experts.w_gate is not None, experts.w_in.shape
    if not products.runs_here(x.device):
        return "needs a Hopper GPU and the extra quack"
    if x.dtype.itemsize != 2:
        return f"computes in two bytes, given {x.dtype}"
    if activation.name not in (products.GATED_ACTIVATIONS if gated else products.ACTIVATIONS):
        return f"does not know the activation {activation.name}"
    if weighted or activation.dropout or (gated and experts.b_in is not None):
        return "knows no weights of experts, no dropout of activations and no bias beside a gate"
    if neurons % 8 or width % 8:
        return f"needs sizes that 8 divides, given a width of {width} and experts of {neurons} neurons"
    return None
