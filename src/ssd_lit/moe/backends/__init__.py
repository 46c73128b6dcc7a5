"""Ways to compute the sparse FFN. All give the same outputs and gradients; they differ in speed."""

from torch import Tensor

from ssd_lit.moe.backends.contract import Activation, Backend, Experts
from ssd_lit.moe.backends.reference import masked
from ssd_lit.moe.backends.sorted import grouped, loop

__all__ = ["BACKENDS", "Activation", "Backend", "Experts", "choose_backend"]

BACKENDS: dict[str, Backend] = {"masked": masked, "loop": loop, "grouped": grouped}


def choose_backend(name: str, x: Tensor) -> Backend:
    """The backend of that name; `auto` takes the loop on the CPU and grouped products on a GPU."""
    if name == "auto":
        name = "grouped" if x.is_cuda else "loop"
    return BACKENDS[name]
