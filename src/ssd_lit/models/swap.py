"""From a backbone's own FFNs to FFNs in expert order, and back."""

from typing import Any

import torch

from ssd_lit.config import MoEConfig
from ssd_lit.models.family import Family, FFNParts
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.permutation import upcycle_into
from ssd_lit.moe.routers import Router, build_router


def swap_ffns(
    backbone: Any, family: Family, moe: MoEConfig, *, router: str, upcycled: bool = False
) -> tuple[ExpertFFN, ...]:
    """Replace every FFN by an ExpertFFN with the same weights; returns them in the family's order.

    With `upcycled` each expert is a copy of the whole FFN. Raises ValueError if the experts do not divide its neurons.
    """
    swapped = []
    for site in family.sites(backbone):
        parts = site.read()
        # Made where they belong: the fake tensors that FLOPs are counted on cannot be moved.
        with parts.w_in.device:
            ffn = _expert_ffn(
                parts, site, moe, build_router(router, parts.w_in.shape[1], moe.experts, moe.router_hidden)
            )
            parts.copy_to(ffn)
            if upcycled:
                slices, ffn = ffn, _expert_ffn(parts, site, moe, ffn.router, upcycled=True)
                upcycle_into(slices, ffn)
        site.install(ffn.train(backbone.training))
        swapped.append(ffn)
    return tuple(swapped)


def _expert_ffn(parts: FFNParts, site: Any, moe: MoEConfig, router: Router, *, upcycled: bool = False) -> ExpertFFN:
    d_ff, d_model = parts.w_in.shape
    ffn = ExpertFFN(
        d_model,
        d_ff * moe.experts if upcycled else d_ff,
        experts=moe.experts,
        top_k=moe.top_k,
        router=router,
        activation=site.activation,
        gated=parts.w_gate is not None,
        bias=parts.b_in is not None,
        dropout=site.dropout,
        hidden_dropout=site.hidden_dropout,
        backend=moe.backend,
        upcycled=upcycled,
    )
    if ffn.w_in.dtype != parts.w_in.dtype:
        ffn.to(parts.w_in.dtype)
        # Beside weights of lower precision too: neighbouring scores are often close.
        ffn.router.to(torch.promote_types(parts.w_in.dtype, torch.float32))
    return ffn
