"""Ways to compute the sparse FFN. All give the same outputs and gradients; they differ in speed.

Shape letters: T tokens, D model width, E experts, H neurons of one expert, K experts a token, N = T*K.
Every backend takes x [T, D], chosen [T, K] (distinct experts in a row), w_in [E, H, D], b_in [E, H],
w_out [E, H, D] and returns the sum of the chosen experts' outputs, [T, D], without the output bias.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def masked(x: Tensor, chosen: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> Tensor:
    """The obvious reference: compute every neuron, then zero those of experts not chosen. Saves nothing."""
    mask = torch.zeros(x.shape[0], w_in.shape[0], dtype=x.dtype, device=x.device).scatter_(1, chosen, 1.0)  # [T, E]
    hidden = F.relu(torch.einsum("td,ehd->teh", x, w_in) + b_in)
    return torch.einsum("teh,ehd->td", hidden * mask[:, :, None], w_out)


def loop(x: Tensor, chosen: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> Tensor:
    """One pair of matrix products for each expert, over the tokens that chose it."""
    token, count = _by_expert(chosen, w_in.shape[0])
    rows = token.split(count.tolist())
    y = torch.zeros_like(x)
    # Unbinding once gives one stacked gradient; indexing w_in[e] would build a full-size one for every expert.
    for row, w1, b1, w2 in zip(rows, w_in.unbind(), b_in.unbind(), w_out.unbind(), strict=True):
        if len(row):
            y = y.index_add(0, row, F.relu(F.linear(x[row], w1, b1)) @ w2)
    return y


def grouped(x: Tensor, chosen: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> Tensor:
    """Tokens sorted by expert, then two grouped matrix products over all experts."""
    token, count = _by_expert(chosen, w_in.shape[0])
    ends = count.cumsum(0).to(torch.int32)
    bias = b_in.repeat_interleave(count, dim=0, output_size=token.shape[0])  # [N, H]
    hidden = F.relu(F.grouped_mm(x[token], w_in.transpose(1, 2), offs=ends) + bias)
    return torch.zeros_like(x).index_add(0, token, F.grouped_mm(hidden, w_out, offs=ends))


def _by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Token indices [N] sorted by the expert that they go to, and how many go to each [E]."""
    expert = chosen.flatten()
    token = expert.argsort(stable=True) // chosen.shape[1]
    return token, expert.bincount(minlength=experts)


BACKENDS: dict[str, Backend] = {"masked": masked, "loop": loop, "grouped": grouped}


def choose_backend(name: str, x: Tensor) -> Backend:
    """The backend of that name; `auto` takes the loop on the CPU and grouped products on a GPU."""
    if name == "auto":
        name = "grouped" if x.is_cuda else "loop"
    return BACKENDS[name]
