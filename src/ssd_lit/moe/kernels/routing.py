"""Scores and the choice of experts in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@torch.library.custom_op("ssd_lit::route", mutates_args=())
def route(x: Tensor, directions: Tensor, k: int) -> Tensor:
    """The k experts whose directions [E, D] have the largest dot products with each token x [T, D] -> [T, k] int64.

    Products are exact to float32, whatever the dtype of x; of equal scores the lower expert comes first.
    """
    x = x.contiguous()
    n_tokens, d_model = x.shape
    n_experts = len(directions)
    chosen = torch.empty(n_tokens, k, dtype=torch.int64, device=x.device)
    few = n_tokens <= 64
    tokens, inner = (16, 256) if few else (64, 64)
    _route[(triton.cdiv(n_tokens, tokens),)](
        x, directions, chosen, n_tokens,
        D=d_model, E=n_experts, K=k, PADDED=max(16, triton.next_power_of_2(n_experts)),
        TOKENS=tokens, INNER=min(inner, max(16, triton.next_power_of_2(d_model))), BFLOAT=x.dtype == torch.bfloat16,
        num_warps=4,
    )  # fmt: skip
    return chosen


@route.register_fake
def _(x: Tensor, directions: Tensor, k: int) -> Tensor:
    return x.new_empty(len(x), k, dtype=torch.int64)


@triton.jit
def _route(
    x, directions, chosen, n_tokens,
    D: tl.constexpr, E: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr,
    TOKENS: tl.constexpr, INNER: tl.constexpr, BFLOAT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < n_tokens
    expert = tl.arange(0, PADDED)
    inner = tl.arange(0, INNER)
    row_at = x + token.to(tl.int64)[:, None] * D + inner[None, :]
    direction_at = directions + expert[None, :] * D + inner[:, None]
    scores = tl.zeros([TOKENS, PADDED], tl.float32)
    for d in range(0, D, INNER):
        left = inner < D - d
        a = tl.load(row_at + d, mask=there[:, None] & left[None, :], other=0.0)
        b = tl.load(direction_at + d, mask=(expert < E)[None, :] & left[:, None], other=0.0).to(tl.float32)
        if BFLOAT:
            # Three terms of bfloat16 hold all bits of a float32: their products with x are exact.
            high = b.to(tl.bfloat16)
            rest = b - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            scores = tl.dot(a, low, scores)
            scores = tl.dot(a, middle, scores)
            scores = tl.dot(a, high, scores)
        else:
            scores = tl.dot(a.to(tl.float32), b, scores, input_precision="ieee")
    scores = tl.where((expert < E)[None, :], scores, float("-inf"))
    for k in tl.static_range(K):
        best = tl.argmax(scores, axis=1)
        tl.store(chosen + token * K + k, best.to(tl.int64), mask=there)
        scores = tl.where(expert[None, :] == best[:, None], float("-inf"), scores)
