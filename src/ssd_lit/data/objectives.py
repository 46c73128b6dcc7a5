"""Training objectives: predict the next token, masked tokens or cut-out spans.

An objective is a pure function of the tokens and of uniform random numbers. The same noise gives the same batch on any
device, and a block can hide the same tokens whenever it is scored.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_lit.config import ConfigError
from ssd_lit.data.index import VocabInfo

IGNORED = -100
"""Target without a loss."""

Batch = dict[str, Tensor]


def in_pieces(batch: Batch, size: int) -> list[Batch]:
    """A batch as batches of so many blocks."""
    pieces = zip(*(value.split(size) for value in batch.values()), strict=True)
    return [dict(zip(batch, piece, strict=True)) for piece in pieces]


class Objective(Protocol):
    """Turns blocks into a model's inputs and targets."""

    noise_per_token: int
    """Uniform random numbers needed for a token."""

    def lengths(self, sequence_length: int) -> tuple[int, int]:
        """(input length, target length) that a block of S tokens becomes."""
        ...

    def __call__(self, batch: Batch, noise: Tensor) -> Batch:
        """Returns the batch {"inputs": [B, S'], "targets": [B, S'']}, int64, on the device of its arguments.

        `batch` is {"inputs": [B, S], "targets": [B, S]}, targets one token ahead; `noise`
        [B, S, noise_per_token] is uniform in [0, 1).
        """
        ...


class Causal:
    """The next token at every place: the batch unchanged."""

    noise_per_token = 0

    def lengths(self, sequence_length: int) -> tuple[int, int]:
        return sequence_length, sequence_length

    def __call__(self, batch: Batch, noise: Tensor) -> Batch:
        return batch


class Masked:
    """The tokens at 15 % of the places, most of them hidden (BERT, arXiv 1810.04805, section 3.1).

    Of every block max(1, round(0.15 S)) places are chosen. The token there becomes the mask token with probability
    0.8, a random ordinary token with 0.1, and stays with 0.1. Targets are the tokens there and IGNORED elsewhere.
    End-of-text is chosen only where a block has too few other tokens. With fresh noise at every step the
    masking is dynamic (RoBERTa, arXiv 1907.11692, section 4.1). Raises ConfigError without a mask token.
    """

    noise_per_token = 3
    share = 0.15

    def __init__(self, vocab: VocabInfo) -> None:
        if vocab.mask_id is None:
            raise ConfigError(
                "masked language modelling needs a mask token and the tokenizer has none: "
                "set data.tokenizer.mask_token: true, or name a mask_token in data.tokenizer.folder"
            )
        self._eos_id = vocab.eos_id
        self._mask_id = vocab.mask_id
        special = {vocab.eos_id, vocab.mask_id, *vocab.sentinel_ids}
        self._ordinary = torch.tensor([i for i in range(vocab.vocab_size) if i not in special], device="cpu")

    def lengths(self, sequence_length: int) -> tuple[int, int]:
        return sequence_length, sequence_length

    def __call__(self, batch: Batch, noise: Tensor) -> Batch:
        tokens = batch["inputs"]
        place, kind, other = noise.unbind(-1)
        count = max(1, round(self.share * tokens.shape[1]))
        # Stable: with equal numbers too, all devices must choose the same.
        order = (place + (tokens == self._eos_id)).argsort(dim=1, stable=True)
        chosen = torch.zeros_like(tokens, dtype=torch.bool).scatter(1, order[:, :count], True)
        # Moved once: a copy to the device at every step would make the host wait for it.
        self._ordinary = self._ordinary.to(tokens.device)
        random = self._ordinary[(other * len(self._ordinary)).long()]
        hidden = torch.where(kind < 0.8, self._mask_id, torch.where(kind < 0.9, random, tokens))
        return {
            "inputs": torch.where(chosen, hidden, tokens),
            "targets": torch.where(chosen, tokens, IGNORED),
        }


class Spans:
    """Spans cut out of a block (T5, arXiv 1910.10683, section 3.1.4, and `random_spans_noise_mask` of its code).

    Of S tokens n = max(1, round(0.15 S)) are cut out, in s = max(1, round(n / 3)) spans: 3 tokens on average. A block
    alternates between stretches that are kept and spans, starts with a stretch, and none is empty. Every division of
    the n tokens into s spans is equally likely, and so for the stretches.

    Inputs are the block with span i replaced by sentinel i, then end-of-text: S - n + s + 1 tokens. Targets are
    sentinel i and the tokens of span i for every span, then end-of-text: n + s + 1 tokens. There is no closing sentinel
    (the paper's figure 2 shows one, its code writes end-of-text). Raises ConfigError for fewer than s sentinels, and
    ValueError for blocks of one token.
    """

    noise_per_token = 1
    share = 0.15
    mean_length = 3

    def __init__(self, vocab: VocabInfo) -> None:
        self._eos_id = vocab.eos_id
        self._sentinels = torch.tensor(vocab.sentinel_ids, dtype=torch.long, device="cpu")
        self._check_sentinels(1)

    def lengths(self, sequence_length: int) -> tuple[int, int]:
        cut, spans = self._counts(sequence_length)
        return sequence_length - cut + spans + 1, cut + spans + 1

    def __call__(self, batch: Batch, noise: Tensor) -> Batch:
        tokens = batch["inputs"]
        length = tokens.shape[1]
        cut, spans = self._counts(length)
        # n - 1 places to divide the cut tokens and S - n - 1 to divide the kept ones: one number each.
        in_spans, in_stretches = noise[:, : cut - 1, 0], noise[:, cut - 1 : length - 2, 0]
        parts = torch.stack([_composition(in_stretches, spans), _composition(in_spans, spans)], dim=2)
        starts = parts.flatten(1).cumsum(1)[:, :-1]  # of all parts but the first
        part = torch.zeros_like(tokens).scatter(1, starts, 1).cumsum(1)
        # Moved once: a copy to the device at every step would make the host wait for it.
        self._sentinels = self._sentinels.to(tokens.device)
        sentinel = self._sentinels[part // 2]  # of a stretch and of the span after it
        first = F.pad(part.diff(dim=1), (1, 0), value=1) == 1
        in_span = part % 2 == 1
        return {
            "inputs": self._shortened(tokens, sentinel, in_span, first, length - cut + spans),
            "targets": self._shortened(tokens, sentinel, ~in_span, first, cut + spans),
        }

    def _counts(self, sequence_length: int) -> tuple[int, int]:
        """(tokens cut out of a block, spans they form)."""
        if sequence_length < 2:
            raise ValueError(f"span corruption needs blocks of at least 2 tokens; given {sequence_length}")
        cut = max(1, round(self.share * sequence_length))
        spans = max(1, round(cut / self.mean_length))
        self._check_sentinels(spans)
        return cut, spans

    def _check_sentinels(self, needed: int) -> None:
        if len(self._sentinels) < needed:
            raise ConfigError(
                f"span corruption needs a sentinel for each span, at least {needed}, and the tokenizer has "
                f"{len(self._sentinels)}: set data.tokenizer.sentinels to {needed} or more, or give a "
                f"data.tokenizer.folder whose vocabulary has <extra_id_0> to <extra_id_{needed - 1}>"
            )

    def _shortened(self, tokens: Tensor, sentinel: Tensor, cut: Tensor, first: Tensor, length: int) -> Tensor:
        """[B, length + 1]: each part in `cut` is replaced by its sentinel; then end-of-text."""
        filled = torch.where(cut, sentinel, tokens)
        order = (cut & ~first).int().argsort(dim=1, stable=True)
        return F.pad(filled.gather(1, order[:, :length]), (0, 1), value=self._eos_id)


def _composition(noise: Tensor, parts: int) -> Tensor:
    """Lengths [B, parts], all positive, of a row of m things cut at parts - 1 of the m - 1 places between them.

    The cuts are at the smallest of the numbers `noise` [B, m - 1].
    """
    cuts = noise.argsort(dim=1, stable=True)[:, : parts - 1].sort(dim=1).values + 1
    ends = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=noise.shape[1] + 1)
    return ends.diff(dim=1)


OBJECTIVES: dict[str, Callable[[VocabInfo], Objective]] = {
    "causal": lambda vocab: Causal(),
    "masked": Masked,
    "spans": Spans,
}


def build_objective(name: str, vocab: VocabInfo) -> Objective:
    """Returns the objective of that name. Raises ValueError if unknown, ConfigError if the vocabulary lacks tokens."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r}: unknown; allowed: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](vocab)
