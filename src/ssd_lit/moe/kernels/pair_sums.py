"""Adding up the outputs of each token's pairs.

Shape letters: T tokens, D model width, K experts a token, N = T * K pairs.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def add_pairs(
    out: Tensor, chosen: Tensor, bias: Tensor | None, y: Tensor, *,
    n_experts: int, ragged: bool, launch: dict[str, bool], places: Tensor | None = None,
) -> None:  # fmt: skip
    """Write y [T, D]: the bias [D], if any, and each token's rows of out [N, D], in the order of `chosen` [T, K].

    `places` [N] are the rows of the pairs t * K + k; without them each pair's number is its row.
    """
    n_tokens, width = y.shape
    columns = min(1024, max(16, triton.next_power_of_2(width)))
    # Of few tokens, as many programs as there can be.
    tokens, columns = (2, columns) if n_tokens > 4096 else (1, min(512, columns))
    _add_pairs[(triton.cdiv(n_tokens, tokens), triton.cdiv(width, columns))](
        out, chosen, places, bias, y, n_tokens, n_experts,
        D=width, K=chosen.shape[1], RAGGED=ragged, PLACED=places is not None, BIAS=bias is not None,
        TOKENS=tokens, COLUMNS=columns, **launch,
    )  # fmt: skip


@triton.jit
def _add_pairs(
    out, chosen, places, bias, y, n_tokens, n_experts,
    D: tl.constexpr, K: tl.constexpr, RAGGED: tl.constexpr, PLACED: tl.constexpr, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (token < n_tokens)[:, None] & (column < D)[None, :]
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for k in tl.static_range(K):
        pair = token.to(tl.int64) * K + k
        mask = there
        if RAGGED:
            mask = there & (tl.load(chosen + pair, mask=token < n_tokens, other=0) < n_experts)[:, None]
        row = pair
        if PLACED:
            row = tl.load(places + pair, mask=token < n_tokens, other=0).to(tl.int64)
        total += tl.load(out + row[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    at = y + token.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=there)
