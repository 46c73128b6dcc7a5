"""Objectives agree with slow loops over the same noise, lose no token, and draw as their papers say."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_lit.config import ConfigError
from ssd_lit.data.index import VocabInfo
from ssd_lit.data.objectives import IGNORED, OBJECTIVES, Batch, Masked, Spans, build_objective

EOS, MASK = 7, 150
SENTINELS = tuple(range(299, 259, -1))  # falling, as T5's are
SPECIALS = VocabInfo(vocab_size=300, eos_id=EOS, mask_id=MASK, sentinel_ids=SENTINELS)
ORDINARY = set(range(300)) - {EOS, MASK, *SENTINELS}
LENGTHS = [2, 3, 7, 16, 31, 100, 568]


def blocks(rows: int, length: int, seed: int = 0) -> Batch:
    """Ordinary tokens with an end-of-text here and there."""
    random = torch.Generator().manual_seed(seed)
    ordinary = torch.tensor(sorted(ORDINARY))
    tokens = ordinary[torch.randint(len(ordinary), (rows, length + 1), generator=random)]
    tokens[torch.rand(tokens.shape, generator=random) < 0.05] = EOS
    return {"inputs": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def noise_for(name: str, batch: Batch, seed: int = 1) -> Tensor:
    noise_per_token = build_objective(name, SPECIALS).noise_per_token
    return torch.rand(*batch["inputs"].shape, noise_per_token, generator=torch.Generator().manual_seed(seed))


def apply(name: str, batch: Batch, seed: int = 1) -> Batch:
    return build_objective(name, SPECIALS)(batch, noise_for(name, batch, seed))


def slow_masked(tokens: list[int], noise: list[list[float]]) -> tuple[list[int], list[int]]:
    """Places one by one, those with the smallest first numbers, end-of-text last."""
    inputs, targets = list(tokens), [IGNORED] * len(tokens)
    ordinary = sorted(ORDINARY)
    order = sorted(range(len(tokens)), key=lambda place: (tokens[place] == EOS, noise[place][0]))
    for place in order[: max(1, round(0.15 * len(tokens)))]:
        _, kind, other = noise[place]
        targets[place] = tokens[place]
        if kind < 0.8:
            inputs[place] = MASK
        elif kind < 0.9:
            inputs[place] = ordinary[int(other * len(ordinary))]
    return inputs, targets


def slow_spans(tokens: list[int], noise: list[float]) -> tuple[list[int], list[int]]:
    """Stretch, span, stretch, span: token after token."""
    cut = max(1, round(0.15 * len(tokens)))
    spans = max(1, round(cut / 3))

    def parts(items: int, numbers: list[float]) -> list[int]:
        places = sorted(sorted(range(items - 1), key=lambda place: numbers[place])[: spans - 1])
        return [b - a for a, b in zip([0, *(p + 1 for p in places)], [*(p + 1 for p in places), items], strict=True)]

    span_lengths = parts(cut, noise[: cut - 1])
    stretch_lengths = parts(len(tokens) - cut, noise[cut - 1 :])
    inputs, targets, rest = [], [], list(tokens)
    for sentinel, stretch, span in zip(SENTINELS, stretch_lengths, span_lengths, strict=False):
        inputs += [*rest[:stretch], sentinel]
        targets += [sentinel, *rest[stretch : stretch + span]]
        rest = rest[stretch + span :]
    assert not rest
    return [*inputs, EOS], [*targets, EOS]


def spans_in(targets: list[int]) -> list[list[int]]:
    """The tokens behind each sentinel of a target, which must be the first ones in order."""
    found: list[list[int]] = []
    for token in targets[:-1]:
        if len(found) < len(SENTINELS) and token == SENTINELS[len(found)]:
            found.append([])
        else:
            found[-1].append(token)
    return found


@pytest.mark.parametrize("length", LENGTHS)
def test_masked_equals_the_slow_loop(length: int) -> None:
    batch = blocks(8, length)
    noise = noise_for("masked", batch)
    got = Masked(SPECIALS)(batch, noise)
    for row, tokens in enumerate(batch["inputs"].tolist()):
        assert (got["inputs"][row].tolist(), got["targets"][row].tolist()) == slow_masked(tokens, noise[row].tolist())


@pytest.mark.parametrize("length", LENGTHS)
def test_spans_equal_the_slow_loop(length: int) -> None:
    batch = blocks(8, length)
    noise = noise_for("spans", batch)
    got = Spans(SPECIALS)(batch, noise)
    for row, tokens in enumerate(batch["inputs"].tolist()):
        slow = slow_spans(tokens, noise[row, :, 0].tolist())
        assert (got["inputs"][row].tolist(), got["targets"][row].tolist()) == slow


@pytest.mark.parametrize("length", [*LENGTHS, 64, 129, 512])
def test_target_spans_put_back_give_the_block(length: int) -> None:
    batch = blocks(50, length, seed=length)
    got = apply("spans", batch, seed=length + 1)
    for tokens, inputs, targets in zip(*(x.tolist() for x in (batch["inputs"], *got.values())), strict=True):
        assert inputs[-1] == targets[-1] == EOS
        spans = dict(zip(SENTINELS, spans_in(targets), strict=False))
        whole = [token for one in inputs[:-1] for token in spans.pop(one, [one])]
        assert whole == tokens
        assert not spans


def test_kept_and_hidden_tokens_of_masked_give_the_block() -> None:
    batch = blocks(50, 64)
    got = apply("masked", batch)
    chosen = got["targets"] != IGNORED
    assert torch.equal(torch.where(chosen, got["targets"], got["inputs"]), batch["inputs"])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths_are_told_beforehand(name: str, length: int) -> None:
    batch = blocks(3, length)
    got = apply(name, batch)
    inputs, targets = build_objective(name, SPECIALS).lengths(length)
    assert (got["inputs"].shape, got["targets"].shape) == ((3, inputs), (3, targets))
    assert got["inputs"].dtype == got["targets"].dtype == torch.int64


def test_span_lengths_are_those_of_t5() -> None:
    """Its pre-training reads 512 tokens and predicts 114, cut from 568."""
    assert Spans(SPECIALS).lengths(568) == (512, 114)


@pytest.mark.parametrize("length", [100, 128, 256, 568])
def test_spans_are_fifteen_per_cent_and_three_tokens_long(length: int) -> None:
    for row in apply("spans", blocks(20, length))["targets"].tolist():
        lengths = [len(span) for span in spans_in(row)]
        assert min(lengths) >= 1
        assert sum(lengths) == round(0.15 * length)
        assert sum(lengths) / len(lengths) == pytest.approx(3, abs=0.2)


def test_every_division_into_spans_and_stretches_is_equally_likely() -> None:
    """31 tokens: 5 in two spans and 26 in two stretches, 4 x 25 ways."""
    rows = 40_000
    tokens = torch.full((rows, 31), 100)
    got = apply("spans", {"inputs": tokens, "targets": tokens})
    first, second = (
        (x == s).int().argmax(1) for x, s in [(got["inputs"], SENTINELS[0]), (got["targets"], SENTINELS[1])]
    )
    seen = Counter(zip(first.tolist(), (second - 1).tolist(), strict=True))
    assert set(seen) == {(stretch, span) for stretch in range(1, 26) for span in range(1, 5)}
    # 400 each; the standard deviation is 20.
    assert 300 < min(seen.values()) <= max(seen.values()) < 500


def test_chosen_tokens_are_hidden_replaced_and_kept_as_often_as_told() -> None:
    batch = blocks(300, 200)
    got = apply("masked", batch)
    chosen = got["targets"] != IGNORED
    assert (chosen.sum(1) == 30).all()
    now, before = got["inputs"][chosen], got["targets"][chosen]
    hidden, kept = (now == MASK).float().mean().item(), (now == before).float().mean().item()
    # 9000 tokens: the standard deviations are 0.004 and 0.003; a random token may also be the old one.
    assert hidden == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1, abs=0.016)
    assert 1 - hidden - kept == pytest.approx(0.1, abs=0.016)


def test_every_place_is_chosen_equally_often() -> None:
    tokens = torch.full((20_000, 20), 100)
    chosen = apply("masked", {"inputs": tokens, "targets": tokens})["targets"] != IGNORED
    # 3 of 20; the standard deviation is 0.0025.
    assert (chosen.float().mean(0) - 0.15).abs().max() < 0.0125


def test_random_tokens_are_all_the_ordinary_ones_and_no_others() -> None:
    tokens = torch.full((3000, 1), 100)
    noise = torch.full((3000, 1, 3), 0.85)
    noise[:, 0, 2] = torch.linspace(0, 1 - 2**-24, 3000)
    got = Masked(SPECIALS)({"inputs": tokens, "targets": tokens}, noise)
    assert set(got["inputs"].flatten().tolist()) == ORDINARY


def test_end_of_text_is_hidden_only_for_want_of_other_tokens() -> None:
    tokens = torch.full((100, 20), EOS)
    tokens[:50, :3] = 100  # as many as are chosen
    tokens[50:, :2] = 100
    got = apply("masked", {"inputs": tokens, "targets": tokens})["targets"]
    assert (got[:50, :3] == 100).all()
    assert (got[:50, 3:] == IGNORED).all()
    assert (got[50:, :2] == 100).all()
    assert ((got[50:, 2:] == EOS).sum(1) == 1).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_block_and_its_noise_decide_whatever_else_is_in_the_batch(name: str) -> None:
    batch = blocks(6, 100)
    before = {key: value.clone() for key, value in batch.items()}
    noise, objective = noise_for(name, batch), build_objective(name, SPECIALS)
    together = objective(batch, noise)
    assert all(torch.equal(batch[key], before[key]) for key in before)
    for row in range(6):
        alone = build_objective(name, SPECIALS)({k: v[row : row + 1] for k, v in batch.items()}, noise[row : row + 1])
        assert all(torch.equal(alone[key][0], together[key][row]) for key in ("inputs", "targets"))


@pytest.mark.parametrize("name", ["masked", "spans"])
def test_other_noise_hides_other_tokens(name: str) -> None:
    batch = blocks(6, 100)
    assert not torch.equal(apply(name, batch, seed=1)["targets"], apply(name, batch, seed=2)["targets"])


@pytest.mark.parametrize("name", ["masked", "spans"])
def test_equal_numbers_are_taken_in_order(name: str) -> None:
    """Which of them a sort puts first must not depend on the device."""
    batch = blocks(4, 100)
    objective = build_objective(name, SPECIALS)
    noise = torch.full((4, 100, objective.noise_per_token), 0.5)
    rising = noise + torch.arange(100)[None, :, None] * 1e-5
    assert torch.equal(objective(batch, noise)["targets"], objective(batch, rising)["targets"])


def test_causal_is_the_batch() -> None:
    batch = blocks(2, 16)
    got = build_objective("causal", VocabInfo(300, EOS))(batch, torch.empty(2, 16, 0))
    assert all(torch.equal(got[key], batch[key]) for key in ("inputs", "targets"))


def test_specials_of_an_index() -> None:
    index: dict[str, Any] = {"vocab_size": 300, "eos_id": EOS, "dtype": "uint16"}
    assert VocabInfo.of(index) == VocabInfo(300, EOS, None, ())
    assert VocabInfo.of({**index, "mask_id": None, "sentinel_ids": []}) == VocabInfo(300, EOS)
    of = VocabInfo.of({**index, "mask_id": MASK, "sentinel_ids": list(SENTINELS)})
    assert (of, hash(of)) == (SPECIALS, hash(SPECIALS))


def test_missing_special_tokens_say_which_setting_brings_them() -> None:
    bare = VocabInfo(300, EOS)
    with pytest.raises(ConfigError, match=r"needs a mask token .* set data\.tokenizer\.mask_token: true"):
        build_objective("masked", bare)
    with pytest.raises(ConfigError, match=r"at least 1, and .* has 0: set data\.tokenizer\.sentinels to 1 or more"):
        build_objective("spans", bare)


def test_too_few_sentinels_for_the_blocks_are_refused() -> None:
    few = build_objective("spans", VocabInfo(300, EOS, sentinel_ids=SENTINELS[:4]))
    assert few.lengths(80) == (80 - 12 + 4 + 1, 12 + 4 + 1)
    batch = blocks(1, 100)
    for refused in (lambda: few.lengths(100), lambda: few(batch, torch.rand(1, 100, 1))):
        with pytest.raises(ConfigError, match=r"at least 5, and the tokenizer has 4: .*<extra_id_4>"):
            refused()


def test_block_too_short_to_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens; given 1"):
        Spans(SPECIALS).lengths(1)


def test_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="'prefix': unknown; allowed: causal, masked, spans"):
        build_objective("prefix", SPECIALS)
