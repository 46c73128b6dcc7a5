"""Dynamic k: the experts whose score is near the best one's, chosen and counted on the GPU.

Shape letters: T tokens, D model width, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_lit.moe.kernels import early_launch
from ssd_lit.moe.kernels.activations import softplus
from ssd_lit.moe.kernels.routing import FEW, _scores


def route_above(x: Tensor, directions: Tensor, share: float, tally: Tensor | None) -> Tensor:
    """`select_above` of the softplus of the dot products of x [T, D] and directions [E, D], in float32."""
    chosen: Tensor = _choose(_products(x, directions), share, tally, softplus=True)
    return chosen


def select_above(scores: Tensor, share: float, tally: Tensor | None) -> Tensor:
    """The experts whose score is at least `share` of the token's best: scores [T, E] -> [T, E] int64.

    The chosen come first, in order of their number, and E fills the places behind them. The numbers of chosen experts
    and of tokens are added to tally [2] where it lies, without host synchronisation: in a CUDA graph too.
    """
    chosen: Tensor = _choose(scores.float(), share, tally, softplus=False)
    return chosen


def _products(x: Tensor, directions: Tensor) -> Tensor:
    if len(x) > FEW:
        with torch.autocast(x.device.type, enabled=False):
            return x.float() @ directions.float().T
    scores: Tensor = _few_products(x, directions)
    return scores


@torch.library.custom_op("ssd_lit::few_scores", mutates_args=())
def _few_products(x: Tensor, directions: Tensor) -> Tensor:
    """Of a few tokens, whose product is launched faster than torch's."""
    x = x.contiguous()
    (tokens, d), experts = x.shape, len(directions)
    scores = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    inner = min(4096, triton.next_power_of_2(d))
    _scores[(tokens, experts)](x, directions, scores, D=d, E=experts, INNER=inner, **early_launch(x))
    return scores


@_few_products.register_fake
def _(x: Tensor, directions: Tensor) -> Tensor:
    return x.new_empty(len(x), len(directions), dtype=torch.float32)


@torch.library.custom_op("ssd_lit::choose_above", mutates_args=("tally",))
def _choose(scores: Tensor, share: float, tally: Tensor | None, softplus: bool) -> Tensor:
    scores = scores.contiguous()
    n_tokens, experts = scores.shape
    chosen = torch.empty(n_tokens, experts, dtype=torch.int64, device=scores.device)
    padded = triton.next_power_of_2(experts)
    tokens = max(1, min(16, triton.next_power_of_2(n_tokens), 1024 // padded))  # one warp's registers hold no more
    _above[(triton.cdiv(n_tokens, tokens),)](
        scores, chosen, tally, n_tokens, share,
        E=experts, PADDED=padded, TOKENS=tokens, SOFTPLUS=softplus, COUNTED=tally is not None,
        num_warps=1,
    )  # fmt: skip
    return chosen


@_choose.register_fake
def _(scores: Tensor, share: float, tally: Tensor | None, softplus: bool) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.int64)


@triton.jit
def _above(
    scores, chosen, tally, n_tokens, share,
    E: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, SOFTPLUS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """The choice of TOKENS tokens."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, PADDED)
    there = (token < n_tokens)[:, None] & (expert < E)[None, :]
    at = token.to(tl.int64)[:, None] * E
    mine = tl.load(scores + at + expert[None, :], mask=there, other=float("-inf"))
    if SOFTPLUS:
        mine = softplus(mine)
    best = tl.maximum(tl.max(mine, axis=1), 0.0)  # zero behind the last token
    above = there & (mine >= share * best[:, None])
    number = tl.sum(above.to(tl.int32), axis=1)
    before = tl.cumsum(above.to(tl.int32), axis=1) - 1
    behind = number[:, None] + tl.cumsum((there & ~above).to(tl.int32), axis=1) - 1
    value = tl.where(above, expert[None, :], E).to(tl.int64)
    tl.store(chosen + at + tl.where(above, before, behind), value, mask=there)
    if COUNTED:
        tl.atomic_add(tally, tl.sum(number, axis=0).to(tl.int64))
        tl.atomic_add(tally + 1, tl.sum((token < n_tokens).to(tl.int64), axis=0))
