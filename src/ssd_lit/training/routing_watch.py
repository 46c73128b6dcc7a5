"""Experts that no token chooses, and routers that choose nearly the same experts for all."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WINDOW = 10
"""Looks at the experts' load that are taken together."""
COLLAPSED = 0.1
"""Routing has collapsed if it uses less than this share of the experts beyond the top_k that it must use."""


class RoutingWatch:
    """Warns, once for every layer and phase, of dead experts and of collapsed routing.

    An expert is dead if no token chose it over a whole window. The experts in use are counted by the exponential of the
    load's entropy, which is E for an even load and K if all tokens choose the same K.
    """

    def __init__(self, title: str):
        self._title = title
        self._loads: list[Tensor] = []
        self._told: dict[str, set[int]] = {"dead": set(), "collapsed": set()}

    def update(self, load: Tensor, top_k: int) -> None:
        """Take in the load [L, E] of one look, on the CPU: the share of tokens that chose each expert."""
        self._loads.append(load)
        if len(self._loads) == WINDOW:
            self.close(top_k)

    def close(self, top_k: int) -> None:
        """Judge what was seen since the last window, as at the end of a phase."""
        if not self._loads:
            return
        load = torch.stack(self._loads).double().mean(dim=0)  # [L, E]
        self._loads = []
        experts = load.shape[1]
        dead = (load == 0).sum(dim=1).tolist()
        share = load / load.sum(dim=1, keepdim=True)
        used = (-torch.special.xlogy(share, share).sum(dim=1)).exp().tolist()
        self._warn("dead", dead, [bool(n) for n in dead], f"of {experts} experts no token chose")
        floor = top_k + COLLAPSED * (experts - top_k)
        low = [top_k < experts and n < floor for n in used]
        self._warn("collapsed", used, low, f"routing has collapsed: of {experts} experts it uses")

    def _warn(self, kind: str, values: Sequence[float], alarm: Sequence[bool], text: str) -> None:
        layers = [layer for layer, bad in enumerate(alarm) if bad and layer not in self._told[kind]]
        if layers:
            self._told[kind].update(layers)
            told = ", ".join(f"{values[layer]:.3g} in layer {layer}" for layer in layers)
            log.warning("%s: %s %s", self._title, text, told)
