"""What the neurons of a model do on a few training blocks."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ssd_lit.data.blocks import TokenBlocks
from ssd_lit.data.index import VocabInfo
from ssd_lit.data.objectives import build_objective
from ssd_lit.data.order import spread_blocks
from ssd_lit.data.scoring import scoring_batches
from ssd_lit.models.hooks import ffn_inputs
from ssd_lit.models.language_model import LanguageModel


@torch.no_grad()
def layer_activations(model: LanguageModel, tokens_dir: Path, blocks: int, vocab: VocabInfo) -> Iterator[Tensor]:
    """Every neuron's activation [T, F] in dense mode on evenly spaced training blocks, layer by layer, on the CPU."""
    model.set_mode("dense")
    objective = build_objective(model.objective_name, vocab)
    chosen = spread_blocks(len(TokenBlocks(tokens_dir, "train")), blocks)
    device = model.ffns[0].w_in.device
    seen: list[list[Tensor]] = [[] for _ in model.ffns]
    for batch in scoring_batches(tokens_dir, "train", chosen, objective, device):
        for found, x in zip(seen, ffn_inputs(model, batch), strict=True):
            found.append(x.cpu())
    # Inputs are several times narrower than activations: only one layer's need be there at a time.
    for ffn, inputs in zip(model.ffns, seen, strict=True):
        yield torch.cat([ffn.activations(x.to(device)).cpu() for x in inputs])
        inputs.clear()
