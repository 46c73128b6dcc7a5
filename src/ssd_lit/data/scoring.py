"""Blocks that a model is looked at on, the same each time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset

from ssd_lit.data.blocks import TokenBlocks
from ssd_lit.data.objectives import Batch, Objective

BATCH = 16


def scoring_batches(
    tokens_dir: Path, split: str, blocks: Sequence[int], objective: Objective, device: torch.device
) -> Iterator[Batch]:
    """Blocks of a split, by number, as the objective gives them: a block always hides the same tokens."""
    source = TokenBlocks(tokens_dir, split, objective.noise_per_token)
    for batch in DataLoader(Subset(source, blocks), batch_size=BATCH):
        noise = batch.pop("noise", torch.empty(*batch["inputs"].shape, 0))
        yield {name: value.to(device) for name, value in objective(batch, noise).items()}
