"""Every block once an epoch; a step's batch depends on seed and step alone; ranks share it out."""

from itertools import chain, islice

import pytest
import torch

from ssd_lit.data.blocks import StepBatchSampler, in_batches, spread_blocks


def steps(count: int, n_blocks: int = 23, batch_size: int = 4, **settings: int) -> list[list[int]]:
    settings.setdefault("seed", 7)
    return list(islice(StepBatchSampler(n_blocks, batch_size, **settings), count))


def test_every_block_once_in_each_epoch_though_batches_span_two() -> None:
    sequence = list(chain.from_iterable(steps(23)))  # 92 places: four epochs of 23 blocks
    epochs = [sequence[start : start + 23] for start in range(0, 92, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_batch_larger_than_the_data() -> None:
    batch = steps(1, n_blocks=3, batch_size=7)[0]
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


@pytest.mark.parametrize("start", [0, 1, 5, 6, 30])
def test_started_at_a_step_equals_the_tail(start: int) -> None:
    assert steps(10, start_step=start) == steps(start + 10)[start:]


@pytest.mark.parametrize("first", [1, 8, 23, 50])
def test_the_text_after_some_blocks_is_the_tail(first: int) -> None:
    whole = list(chain.from_iterable(steps(40)))
    assert list(chain.from_iterable(steps(9, batch_size=6, first_block=first))) == whole[first : first + 54]


def test_a_step_can_be_asked_for_in_any_order() -> None:
    batches, order = steps(20), [13, 2, 19, 3]
    sampler = StepBatchSampler(23, 4, seed=7)
    assert [sampler.batch(step) for step in order] == [batches[step] for step in order]


def test_seed_decides() -> None:
    assert steps(5) == steps(5)
    assert steps(5) != steps(5, seed=8)


def test_ranks_partition_each_batch() -> None:
    ranks = [steps(9, batch_size=6, rank=rank, world_size=3) for rank in range(3)]
    assert all(len(batch) == 2 for rank in ranks for batch in rank)
    joined = [list(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]
    assert joined == steps(9, batch_size=6)


def test_has_no_length() -> None:
    with pytest.raises(TypeError):
        len(StepBatchSampler(23, 4, seed=7))  # type: ignore[arg-type]


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    steps(10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 4, "world_size": 3}, "batch_size 4 is not divisible by the 3 devices"),
        ({"n_blocks": 0}, "no blocks"),
    ],
)
def test_mistakes(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps(1, **settings)


@pytest.mark.parametrize(("n_blocks", "count", "blocks"), [(10, 4, [0, 2, 5, 7]), (3, 8, [0, 1, 2]), (1, 1, [0])])
def test_spread_blocks(n_blocks: int, count: int, blocks: list[int]) -> None:
    assert spread_blocks(n_blocks, count) == blocks


def test_in_batches_loses_nothing() -> None:
    assert in_batches([5, 6, 7, 8, 9], 2) == [[5, 6], [7, 8], [9]]
