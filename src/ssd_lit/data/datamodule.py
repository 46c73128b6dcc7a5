"""Training and validation batches as a LightningDataModule."""

from collections.abc import Iterable
from pathlib import Path

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ssd_lit.config import RunConfig
from ssd_lit.data.blocks import StepBatchSampler, TokenBlocks, in_batches, spread_blocks
from ssd_lit.support import signals

Batches = DataLoader[dict[str, Tensor]]


class TokenData(LightningDataModule):
    """Blocks for training, from the trainer's global step on, and for validation.

    A batch is {"inputs": [B, S], "targets": [B, S]}, int64; `batch_size` is B over all devices, each of which reads
    its own part. Validation batches have `micro_batch_size` blocks at most; they also have "noise"
    [B, S, noise_per_token] if the objective needs it. The first `first_block` blocks of the endless order are left out.
    With `in_step` all devices have as many validation batches, for a model whose parts they gather together. The
    trainer needs use_distributed_sampler=False and no gradient accumulation of its own, as one training batch is one
    global step.
    """

    def __init__(
        self,
        tokens_dir: Path,
        *,
        batch_size: int,
        micro_batch_size: int,
        validation_blocks: int,
        seed: int,
        workers: int,
        noise_per_token: int = 0,
        first_block: int = 0,
        in_step: bool = False,
    ) -> None:
        super().__init__()
        self.tokens_dir = tokens_dir
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.validation_blocks = validation_blocks
        self.seed = seed
        self.workers = workers
        self.noise_per_token = noise_per_token
        self.first_block = first_block
        self.in_step = in_step

    @classmethod
    def of_run(
        cls,
        config: RunConfig,
        tokens_dir: Path,
        noise_per_token: int,
        *,
        micro_batch_size: int,
        first_block: int = 0,
    ) -> "TokenData":
        """From the config of a run."""
        return cls(
            tokens_dir,
            batch_size=config.training.batch_size,
            micro_batch_size=micro_batch_size,
            validation_blocks=config.training.validation_blocks,
            seed=config.seed,
            workers=config.training.workers,
            noise_per_token=noise_per_token,
            first_block=first_block,
            in_step=config.training.shard,
        )

    def train_dataloader(self) -> Batches:
        """Endless, from the trainer's global step on. Raises ValueError if B is not divisible by the devices."""
        blocks = TokenBlocks(self.tokens_dir, "train")
        rank, world_size = self._place()
        start = self.trainer.global_step if self.trainer else 0
        order = StepBatchSampler(
            len(blocks), self.batch_size, self.seed, start, rank, world_size, first_block=self.first_block
        )
        return self._loader(blocks, order)

    def train_batch(self, step: int) -> dict[str, Tensor]:
        """This device's part of the batch of a global step."""
        blocks = TokenBlocks(self.tokens_dir, "train")
        order = StepBatchSampler(
            len(blocks), self.batch_size, self.seed, 0, *self._place(), first_block=self.first_block
        )
        batch: dict[str, Tensor] = default_collate(blocks.__getitems__(order.batch(step)))
        return batch

    def val_dataloader(self) -> Batches:
        """The same evenly spaced blocks each time, divided among the devices.

        Raises ValueError if there are more devices than blocks.
        """
        blocks = TokenBlocks(self.tokens_dir, "validation", self.noise_per_token)
        rank, world_size = self._place()
        chosen = spread_blocks(len(blocks), self.validation_blocks)
        if len(chosen) < world_size:
            raise ValueError(f"{len(chosen)} validation blocks are too few for {world_size} devices")
        own = chosen[rank::world_size]
        # Blocks that not every device has are left out, where one would wait for the others in vain.
        own = own[: len(chosen) // world_size] if self.in_step else own
        return self._loader(blocks, in_batches(own, self.micro_batch_size))

    def _place(self) -> tuple[int, int]:
        """(rank, world size) of this process."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, blocks: TokenBlocks, batches: Iterable[list[int]]) -> Batches:
        return DataLoader(
            blocks,
            batch_sampler=batches,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
            worker_init_fn=signals.ignore,
            # Without it each new iterator draws from the global generator, and a resumed run makes more iterators.
            generator=torch.Generator(),
        )
