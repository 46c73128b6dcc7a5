"""What a real trainer is fed, straight through, resumed, and shared between ranks."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from ssd_lit.data.blocks import StepBatchSampler, TokenBlocks, spread_blocks
from ssd_lit.data.datamodule import TokenData


class Recorder(LightningModule):
    """Learns nothing of use; remembers what it was fed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.trained.append(batch["inputs"])
        return (self.weight - batch["targets"].float().mean()).square().sum()

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.validated.append(batch["inputs"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(corpus: Path, **settings: int) -> TokenData:
    settings = {"batch_size": 4, "micro_batch_size": 4, "validation_blocks": 10, "seed": 3, "workers": 0, **settings}
    return TokenData(corpus / "tokens", **settings)


def fit(corpus: Path, folder: Path, steps: int, checkpoint: Path | None = None) -> tuple[Recorder, Trainer]:
    trainer = Trainer(
        default_root_dir=folder, max_steps=steps, val_check_interval=5, check_val_every_n_epoch=None,
        use_distributed_sampler=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, accelerator="cpu",
    )  # fmt: skip
    recorder = Recorder()
    trainer.fit(recorder, data(corpus), ckpt_path=checkpoint)
    return recorder, trainer


def ranks(corpus: Path, world_size: int, **settings: int) -> list[TokenData]:
    """The module of each rank, with a trainer that stands at step 2."""
    modules = [data(corpus, **settings) for _ in range(world_size)]
    for rank, module in enumerate(modules):
        module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, global_step=2)  # type: ignore
    return modules


def test_resumed_training_reads_what_the_uninterrupted_one_did(corpus: Path, tmp_path: Path) -> None:
    whole, _ = fit(corpus, tmp_path, 12)
    first, trainer = fit(corpus, tmp_path, 7)
    trainer.save_checkpoint(tmp_path / "at7.ckpt")
    rest, _ = fit(corpus, tmp_path, 12, tmp_path / "at7.ckpt")
    assert len(whole.trained) == 12
    assert torch.equal(torch.stack(first.trained + rest.trained), torch.stack(whole.trained))


def test_training_batches_are_those_of_the_sampler(corpus: Path) -> None:
    blocks = TokenBlocks(corpus / "tokens", "train")
    for batch, chosen in zip(
        islice(data(corpus).train_dataloader(), 3), StepBatchSampler(len(blocks), 4, seed=3), strict=False
    ):
        assert torch.equal(batch["inputs"], torch.stack([blocks[block]["inputs"] for block in chosen]))
        assert torch.equal(batch["targets"], torch.stack([blocks[block]["targets"] for block in chosen]))


def test_workers_feed_the_same(corpus: Path) -> None:
    alone, helped = (list(islice(data(corpus, workers=n).train_dataloader(), 5)) for n in (0, 2))
    assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_state_is_left_alone(corpus: Path, workers: int) -> None:
    before = torch.get_rng_state()
    for loader in (
        data(corpus, workers=workers).train_dataloader(),
        data(corpus, workers=workers).val_dataloader(),
    ):
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_reads_spread_blocks_each_time(corpus: Path, tmp_path: Path) -> None:
    recorder, _ = fit(corpus, tmp_path, 10)
    blocks = TokenBlocks(corpus / "tokens", "validation")
    expected = torch.stack([blocks[block]["inputs"] for block in spread_blocks(len(blocks), 10)])
    assert torch.equal(torch.cat(recorder.validated), torch.cat([expected, expected]))


def test_ranks_share_each_training_batch(corpus: Path) -> None:
    parts = [next(iter(module.train_dataloader()))["inputs"] for module in ranks(corpus, 2)]
    blocks = TokenBlocks(corpus / "tokens", "train")
    whole = StepBatchSampler(len(blocks), 4, seed=3).batch(2)
    assert torch.equal(torch.cat(parts), torch.stack([blocks[block]["inputs"] for block in whole]))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_read_each_validation_block_once(corpus: Path, world_size: int) -> None:
    modules = ranks(corpus, world_size, batch_size=12)
    read = [tuple(row.tolist()) for module in modules for batch in module.val_dataloader() for row in batch["inputs"]]
    blocks = TokenBlocks(corpus / "tokens", "validation")
    assert sorted(read) == sorted(tuple(blocks[block]["inputs"].tolist()) for block in spread_blocks(len(blocks), 10))


@pytest.mark.parametrize("blocks", [2, 5, 7])
def test_in_step_every_rank_has_as_many_validation_batches(corpus: Path, blocks: int) -> None:
    modules = ranks(corpus, 2, validation_blocks=blocks, micro_batch_size=1, in_step=True)
    batches = [[batch["inputs"] for batch in module.val_dataloader()] for module in modules]
    assert [len(one) for one in batches] == [blocks // 2] * 2
    assert not torch.equal(batches[0][0], batches[1][0])


def test_batch_that_devices_do_not_divide(corpus: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 4 is not divisible by the 3 devices"):
        ranks(corpus, 3)[0].train_dataloader()


def test_more_devices_than_validation_blocks(corpus: Path) -> None:
    with pytest.raises(ValueError, match="2 validation blocks are too few for 4 devices"):
        ranks(corpus, 4, validation_blocks=2)[0].val_dataloader()
