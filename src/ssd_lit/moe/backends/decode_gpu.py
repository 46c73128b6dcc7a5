"""The sparse FFN of one token on a GPU, for generation: reads only the chosen experts' weights.

Shape letters: D model width, E experts, H neurons of one expert, K experts a token, S slots: places for the chosen
experts.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from triton import next_power_of_2

from ssd_lit.moe.backends.interface import Activation, Experts
from ssd_lit.moe.kernels import decode, early_launch
from ssd_lit.moe.routing import Routing

TILE_BYTES = 2**15
"""Of one token's program's weights: enough programs for all multiprocessors, and enough loads in flight in each."""
COLUMNS = 64
"""Columns of w_out in a program that takes a part of its rows, a quarter of that where it takes all."""


def decode_gpu(x: Tensor, routing: Routing, experts: Experts, activation: Activation) -> Tensor:
    """Two launches, without host synchronisation: a CUDA graph can hold them.

    Raises ValueError for more than one token, and if a gradient is needed.
    """
    if len(x) != 1:
        raise ValueError(f"backend 'decode_gpu': takes one token, given {len(x)}; take 'fused' for more")
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, routing.weights, *experts)):
        raise ValueError("backend 'decode_gpu': has no gradient; take 'fused' for training")
    experts = experts.to(x.dtype)
    y: Tensor = _forward(
        x, routing.experts, routing.weights, experts.w_in, experts.w_out, experts.b_in, experts.w_gate, activation.name
    )
    return experts.shifted(y)


@torch.library.custom_op("ssd_lit::decode_forward", mutates_args=())
def _forward(
    x: Tensor, chosen: Tensor, weights: Tensor | None,
    w_in: Tensor, w_out: Tensor, b_in: Tensor | None, w_gate: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """[1, D], the output of one token."""
    x, chosen, experts = x.contiguous(), chosen.contiguous(), Experts(w_in, w_out, b_in, w_gate)
    y, choice = torch.empty_like(x), Choice("given", chosen.shape[1], chosen=chosen, weights=weights)
    down(up(x[0], experts, activation, choice), experts, choice, y[0])
    return y


@_forward.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


class Norm(NamedTuple):
    """A layer norm of a row whose statistics the kernel before wrote."""

    stats: Tensor
    """[blocks, 2]: mean and squared deviations of each block of the row."""
    gain: Tensor
    bias: Tensor
    eps: float

    def sizes(self, d_model: int) -> dict[str, int]:
        """Blocks of a row of that width, and their size."""
        blocks = len(self.stats)
        return {"BLOCKS": blocks, "SIZE": d_model // blocks}


@dataclass(frozen=True)
class Choice:
    """How one token's experts are found."""

    kind: Literal["all", "given", "scores"]
    """All experts, those given, or those of the best scores."""
    slots: int
    """Experts at most."""
    k: int = 1
    threshold: float | None = None
    """Of dynamic k, instead of the k best."""
    tally: Tensor | None = None
    """[2] int64, to which experts and tokens are added with dynamic k."""
    total: int = 0
    """What the weights of the chosen add up to; 0: all are 1."""
    products: Tensor | None = None
    """[blocks, E], with shift and offset [E]: what the scores are made of (`kernels.decode`)."""
    shift: Tensor | None = None
    offset: Tensor | None = None
    chosen: Tensor | None = None
    """[1, S], E for none, and the weights given with them."""
    weights: Tensor | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        return {"CHOICE": self.kind, "K": self.k, "THRESHOLD": -1.0 if self.threshold is None else self.threshold}


def up(x: Tensor, experts: Experts, activation: str, choice: Choice, norm: Norm | None = None) -> Tensor:
    """Activations [S, H] of the slots' neurons for one token x [D], which is normalised first."""
    (e, h, d), gated = experts.w_in.shape, experts.w_gate is not None
    neurons = min(rows_of_tile(d, experts.w_in, pieces=1 + gated), next_power_of_2(h))
    hidden = x.new_empty(choice.slots, h, dtype=torch.float32)
    stats, gain, bias, eps = norm or (None, None, None, 0.0)
    decode.up[(choice.slots * -(-h // neurons),)](
        x, stats, gain, bias, eps, choice.products, choice.shift, choice.offset, choice.chosen, choice.weights,
        experts.w_in, experts.w_gate, experts.b_in, hidden, choice.tally,
        D=d, DP=next_power_of_2(d), E=e, EP=next_power_of_2(e), H=h, NEURONS=neurons, **choice.sizes,
        TOTAL=choice.total, WEIGHTED=choice.weights is not None, ACTIVATION=activation, GATED=gated,
        BIAS=experts.b_in is not None, NORM=norm is not None, **_blocks(norm, d), **early_launch(x),
    )  # fmt: skip
    return hidden


def down(
    hidden: Tensor, experts: Experts, choice: Choice, y: Tensor, *,
    norm: Norm | None = None, b_out: Tensor | None = None, stats: Tensor | None = None, counters: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the sum of the slots' outputs to y [D]; with `stats` add it to y, and write the new row's statistics.

    `norm` is that of `up`. `counters`, for `all` experts, are zeros, and left so.
    """
    (slots, h), (e, _, d), w_out = hidden.shape, experts.w_in.shape, experts.w_out
    columns = columns_of(choice)
    kinds = {"BIAS": b_out is not None, "RESIDUAL": stats is not None, **early_launch(y)}
    if choice.kind == "all":
        rows = TILE_BYTES // (columns * w_out.element_size())
        parts = -(-slots * h // rows)
        kept = hidden.new_empty(parts, d)
        decode.down_in_parts[(-(-d // columns), parts)](
            hidden, w_out, b_out, kept, counters, y, stats,
            D=d, F=slots * h, ROWS=rows, PARTS=parts, PADDED=next_power_of_2(parts), COLUMNS=columns, **kinds,
        )  # fmt: skip
        return
    decode.down[(-(-d // columns),)](
        hidden, None if norm is None else norm.stats, 0.0 if norm is None else norm.eps,
        choice.products, choice.shift, choice.offset, choice.chosen, w_out, b_out, y, stats,
        D=d, E=e, EP=next_power_of_2(e), H=h, SLOTS=slots, COLUMNS=columns, num_warps=8,
        ROWS=min(2 * TILE_BYTES // (columns * w_out.element_size()), next_power_of_2(slots * h)),
        **choice.sizes, **_blocks(norm, d), **kinds,
    )  # fmt: skip


def columns_of(choice: Choice) -> int:
    """Columns of a program of `down`, and of the blocks of which it writes statistics."""
    return COLUMNS if choice.kind == "all" else COLUMNS // 4


def _blocks(norm: Norm | None, d_model: int) -> dict[str, int]:
    sizes = {"BLOCKS": 1, "SIZE": d_model} if norm is None else norm.sizes(d_model)
    return {**sizes, "PADDED": next_power_of_2(sizes["BLOCKS"])}


def rows_of_tile(width: int, weights: Tensor, pieces: int = 1) -> int:
    """Rows of so many weights each that a program takes, if it takes them of so many matrices."""
    bytes_of_row: int = pieces * next_power_of_2(width) * weights.element_size()
    return max(1, min(16, TILE_BYTES // bytes_of_row))
