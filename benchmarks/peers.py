"""Public kernels for a Mixture of Experts, given the weights and the router of an ExpertFFN: the same function of x.

They choose by the same products as ours, add outputs without weights, and get no gradient of the router.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssd_lit.moe.ffn import ExpertFFN

Tile = tuple[int, int, bool]
"""Rows, columns, and whether two tiles alternate in a multiprocessor."""
QUACK_TILES: list[Tile] = [(128, 192, True), (128, 128, True), (128, 256, False), (256, 128, False)]
"""QuACK's default, and others of its list."""

Way = tuple[Callable[[Tensor], Tensor], nn.Module]
"""A layer as a function [T, D] -> [T, D], and the module that holds its parameters."""


def scattermoe(ffn: ExpertFFN, tokens: int, folder: Path) -> Way:
    """ScatterMoE's module (github.com/shawntan/scattermoe, 0.3.0) from the folder that holds its package.

    Its kernels, its sort and its module are its own. How many pairs an expert has is read off the sorted pairs: its
    own `bincount`, for which the host waits for the device, cannot be captured in a CUDA graph.
    """
    sys.path.insert(0, str(folder))
    from scattermoe import mlp

    @torch.compile  # as theirs is
    def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            experts, pairs = torch.sort(expert_idxs.flatten())
            ends = torch.searchsorted(experts, torch.arange(num_experts, device=experts.device), right=True)
            return experts, pairs, ends

    mlp.flatten_sort_count = flatten_sort_count
    n_experts, d_model, top_k = ffn.experts, ffn.w_in.shape[1], ffn.top_k
    kind = mlp.MLP if ffn.w_gate is None else mlp.GLUMLP
    activation = nn.SiLU() if ffn.activation == "silu" else nn.ReLU()
    module = kind(d_model, ffn.d_ff // n_experts, n_experts, top_k, activation=activation).to(ffn.w_in)
    rows = [weight.detach().unflatten(0, (n_experts, -1)) for weight in (ffn.w_in, ffn.w_gate) if weight is not None]
    with torch.no_grad():
        module.experts.weight.copy_(torch.cat(rows, dim=1))
        module.output_experts.weight.copy_(ffn.w_out.unflatten(0, (n_experts, -1)).mT)
    directions = _directions(ffn)
    ones = torch.ones(tokens, top_k).to(ffn.w_in)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = module(x, ones, (x.detach() @ directions.T).topk(top_k, dim=-1, sorted=False).indices)
        return y

    return forward, module


def sonicmoe(ffn: ExpertFFN, tokens: int, folder: Path, tiles: Sequence[Tile] = QUACK_TILES) -> Way:
    """SonicMoE's module (package `sonic-moe`, 0.1.2) with SwiGLU, from the folder into which it was unpacked.

    The parts of its `moe_TC_softmax_topk_layer` in its order: scores of one take the place of a softmax. QuACK tunes
    its products over `tiles`; over all of its own list, they were not compiled after seven minutes.
    """
    paths = [str(folder), str(folder / "nvidia_cutlass_dsl" / "python_packages")]
    sys.path[:0] = paths
    # QuACK compiles in processes of its own.
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    from quack import gemm_interface
    from sonicmoe import MoE, functional
    from sonicmoe.enums import ActivationType

    for tuner in (gemm_interface.gemm_tuned, gemm_interface.gemm_gated_tuned, gemm_interface.gemm_dgated_tuned):
        tuner.configs = [c for c in tuner.configs if _on_hopper(c.kwargs["config"], tiles)]
    n_experts, d_model, top_k = ffn.experts, ffn.w_in.shape[1], ffn.top_k
    assert ffn.w_gate is not None
    swiglu = ActivationType.SWIGLU
    module = MoE(n_experts, top_k, d_model, ffn.d_ff // n_experts, swiglu, add_bias=False, std=0.02).to(ffn.w_in)
    module.router.requires_grad_(False)
    rows = [weight.detach().unflatten(0, (n_experts, -1)) for weight in (ffn.w_gate, ffn.w_in)]
    with torch.no_grad():
        # Gate and input rows alternate.
        module.c_fc.weight.copy_(torch.stack(rows, dim=2).flatten(1, 2))
        module.c_proj.weight.copy_(ffn.w_out.unflatten(0, (n_experts, -1)).mT)
    directions = _directions(ffn)
    device = ffn.w_in.device
    ones = torch.ones(tokens, top_k, device=device)

    def forward(x: Tensor) -> Tensor:
        pairs = tokens * top_k
        with torch.no_grad():
            _, chosen = functional.TC_Softmax_Topk_Router_Function.apply(
                x.detach() @ directions.T, n_experts, top_k, True, False
            )
        counts, offsets, gather, scatter, reverse = (
            torch.empty(n, dtype=torch.int32, device=device) for n in (n_experts, n_experts + 1, pairs, pairs, pairs)
        )
        functional.TC_topk_router_metadata_triton(chosen, n_experts, counts, offsets, gather, scatter, reverse)
        w_in, w_out = module.c_fc.weight.permute(1, 2, 0), module.c_proj.weight.permute(1, 2, 0)
        # Without a gradient it keeps no values before the activation.
        hidden, before = functional._UpProjection.apply(
            x, w_in, None, offsets, pairs, top_k, gather, scatter, reverse, None, False, swiglu,
            not torch.is_grad_enabled(), False,
        )  # fmt: skip
        y: Tensor = functional._DownProjection.apply(
            hidden, before, w_out, None, ones, offsets, tokens, top_k, gather, scatter, reverse, None, False, swiglu
        )
        return y

    return forward, module


def _directions(ffn: ExpertFFN) -> Tensor:
    directions = ffn.router.expert_vectors()
    assert directions is not None
    return directions.to(ffn.w_in)


def _on_hopper(config: Any, tiles: Sequence[Tile]) -> bool:
    """Whether a setting of QuACK's products is one that is tried here."""
    tile = (config.tile_m, config.tile_n, config.pingpong)
    return config.device_capacity == 9 and config.cluster_m == 2 and not config.swap_ab and tile in tiles
