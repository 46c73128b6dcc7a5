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
SOME = 2048
"""Up to so many tokens, programs compute parts of the scores of 16 tokens: there are too few tokens for all of them."""


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
        _select[(n_tokens,)](
            scores,
            chosen,
            n_tokens,
            E=experts,
            K=k,
            PADDED=triton.next_power_of_2(experts),
            PARTS=1,
            num_warps=1,
            **early,
        )
        return chosen
    padded, wide = max(16, triton.next_power_of_2(experts)), max(16, triton.next_power_of_2(d))
    if n_tokens <= SOME:
        tokens, inner, span = 16, min(128, wide), 256
    else:
        # Scores stay in registers.
        tokens, inner, span = max(16, min(64, 2**14 // padded)), min(128 if d >= 2048 else 64, wide), d
    # Directions of many experts fill the shared memory.
    inner = max(16, min(inner, 2**13 // padded))
    parts, early = triton.cdiv(d, span), early_launch(x)
    scores = torch.empty(parts if parts > 1 else 0, n_tokens, experts, dtype=torch.float32, device=x.device)
    _route[(triton.cdiv(n_tokens, tokens), parts)](
        x, directions, chosen, scores, n_tokens,
        D=d, E=experts, K=k, PADDED=padded, TOKENS=tokens, INNER=inner, SPAN=span, PARTS=parts,
        BFLOAT=x.dtype == torch.bfloat16, num_warps=4 if padded < 256 else 8, **early,
    )  # fmt: skip
    if parts > 1:
        _select[(n_tokens,)](scores, chosen, n_tokens, E=experts, K=k, PADDED=padded, PARTS=parts, num_warps=1, **early)
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
def _select(
    scores, chosen, n_tokens,
    E: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The K largest scores of one token, of scores [PARTS, T, E] to be added up."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    expert = tl.arange(0, PADDED)
    mine = tl.where(expert < E, 0.0, float("-inf"))
    for part in tl.static_range(PARTS):
        at = scores + (part * n_tokens + token) * E + expert
        mine += tl.load(at, mask=expert < E, other=0.0, cache_modifier=".cg")
    for k in tl.static_range(K):
        best = tl.argmax(mine, axis=0)
        tl.store(chosen + token * K + k, best.to(tl.int64))
        mine = tl.where(expert == best, float("-inf"), mine)


@triton.jit
def _route(
    x, directions, chosen, parts, n_tokens,
    D: tl.constexpr, E: tl.constexpr, K: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
    INNER: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr, BFLOAT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Scores of TOKENS tokens and all experts, and the K largest of each token.

    With several PARTS, each of SPAN numbers of a token, only their scores, to parts [PARTS, T, E].
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < n_tokens
    expert = tl.arange(0, PADDED)
    inner = tl.arange(0, INNER)
    row_at = x + token.to(tl.int64)[:, None] * D + inner[None, :]
    direction_at = directions + expert[None, :] * D + inner[:, None]
    scores = tl.zeros([TOKENS, PADDED], tl.float32)
    first = tl.program_id(1) * SPAN
    for d in range(first, tl.minimum(first + SPAN, D), INNER):
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
    if PARTS > 1:
        at = parts + (tl.program_id(1) * n_tokens + token)[:, None] * E + expert[None, :]
        tl.store(at, scores, mask=there[:, None] & (expert < E)[None, :])
    else:
        scores = tl.where((expert < E)[None, :], scores, float("-inf"))
        for k in tl.static_range(K):
            best = tl.argmax(scores, axis=1)
            tl.store(chosen + token * K + k, best.to(tl.int64), mask=there)
            scores = tl.where(expert[None, :] == best[:, None], float("-inf"), scores)
