"""Scores and the choice of experts without torch's top-k, which takes longer than the experts of a narrow model.

Shape letters: T tokens, D model width, E experts, K experts a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssd_lit.moe.kernels import early_launch

FEW = 64
"""Up to so many tokens, programs share the scores of one token instead of computing those of many."""


@torch.library.custom_op("ssd_lit::route", mutates_args=())
def route(x: Tensor, directions: Tensor, k: int) -> Tensor:
    """The k experts whose directions [E, D] have the largest dot products with each token x [T, D] -> [T, k] int64.

    Products are exact to float32, whatever the dtype of x; of equal scores the lower expert comes first.
    """
    x = x.contiguous()
    n_tokens, d = x.shape
    experts = len(directions)
    chosen = torch.empty(n_tokens, k, dtype=torch.int64, device=x.device)
    if n_tokens <= FEW:
        scores = torch.empty(n_tokens, experts, dtype=torch.float32, device=x.device)
        inner = min(4096, triton.next_power_of_2(d))
        early = early_launch(x)
        _scores[(n_tokens, experts)](x, directions, scores, D=d, E=experts, INNER=inner, **early)
        padded = triton.next_power_of_2(experts)
        _select[(n_tokens,)](scores, chosen, E=experts, K=k, PADDED=padded, num_warps=1, **early)
        return chosen
    padded, tokens = max(16, triton.next_power_of_2(experts)), 16 if n_tokens <= 2048 else 64
    inner = min(64, max(16, triton.next_power_of_2(d)))
    _route[(triton.cdiv(n_tokens, tokens),)](
        x, directions, chosen, n_tokens,
        D=d, E=experts, K=k, PADDED=padded, TOKENS=tokens, INNER=inner, BFLOAT=x.dtype == torch.bfloat16,
    )  # fmt: skip
    return chosen


@route.register_fake
def _(x: Tensor, directions: Tensor, k: int) -> Tensor:
    return x.new_empty(len(x), k, dtype=torch.int64)


@triton.jit
def _scores(x, directions, scores, D: tl.constexpr, E: tl.constexpr, INNER: tl.constexpr, PDL: tl.constexpr):
    """scores [T, E] of one token and one expert."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token, expert = tl.program_id(0), tl.program_id(1)
    inner = tl.arange(0, INNER)
    total = tl.zeros([INNER], tl.float32)
    for d in range(0, D, INNER):
        left = inner < D - d
        values = tl.load(x + token * D + d + inner, mask=left, other=0.0, cache_modifier=".cg").to(tl.float32)
        total += values * tl.load(directions + expert * D + d + inner, mask=left, other=0.0).to(tl.float32)
    tl.store(scores + token * E + expert, tl.sum(total, axis=0))


@triton.jit
def _select(scores, chosen, E: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    """The K largest scores of one token."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    expert = tl.arange(0, PADDED)
    mine = tl.load(scores + token * E + expert, mask=expert < E, other=float("-inf"), cache_modifier=".cg")
    for k in tl.static_range(K):
        best = tl.argmax(mine, axis=0)
        tl.store(chosen + token * K + k, best.to(tl.int64))
        mine = tl.where(expert == best, float("-inf"), mine)


@triton.jit
def _route(
    x, directions, chosen, n_tokens,
    D: tl.constexpr, E: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr,
    TOKENS: tl.constexpr, INNER: tl.constexpr, BFLOAT: tl.constexpr,
):  # fmt: skip
    """Scores of TOKENS tokens and all experts, and the K largest of each token."""
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
