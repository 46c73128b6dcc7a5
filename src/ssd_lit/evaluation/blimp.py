"""BLiMP: which of two sentences a causal model finds likelier, without fine-tuning.

Shape letters: B sentences of a batch, S tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from ssd_lit.data.benchmarks import PairSet
from ssd_lit.data.objectives import IGNORED
from ssd_lit.models.language_model import LanguageModel

TOKENS = 4096
"""Tokens scored at once, padding included; a sentence of more alone."""


def score_on_blimp(
    model: LanguageModel, sets: Sequence[PairSet], tokenizer: Tokenizer, *, eos_id: int, longest: int, title: str
) -> list[dict[str, Any]]:
    """The fraction of pairs whose good sentence is likelier, one entry a set, in the model's current mode.

    A sentence's likelihood is that of its tokens after an end-of-text token, as documents begin in pre-training; a tie
    counts as wrong. Sentences are cut to the model's `longest` tokens; `cut` counts the pairs with such a sentence.
    """
    sentences = [text for pair_set in sets for pair in pair_set.pairs for text in pair]
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(sentences, add_special_tokens=False)]
    likelihoods = iter(log_likelihoods(model, [tokens[:longest] for tokens in ids], eos_id, title))
    lengths = iter(map(len, ids))
    scores = []
    for pair_set in sets:
        pairs = len(pair_set.pairs)
        right = sum(next(likelihoods) > next(likelihoods) for _ in range(pairs))
        cut = sum(max(next(lengths), next(lengths)) > longest for _ in range(pairs))
        scores.append(
            {"set": pair_set.name, "field": pair_set.field, "pairs": pairs, "cut": cut, "accuracy": right / pairs}
        )
    return scores


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel, sentences: Sequence[Sequence[int]], eos_id: int, title: str = "sentences"
) -> list[float]:
    """The sum of the log-probabilities of each sentence's tokens after an end-of-text token, in nats and fp32.

    Sentences of similar length share a batch, padded on the right, which a causal model does not attend to. One without
    tokens has 0.
    """
    device = model.ffns[0].w_in.device
    sums = [0.0] * len(sentences)
    for rows in tqdm(_batches(sentences), desc=title, disable=None):
        targets = [torch.tensor(sentences[row]) for row in rows]
        inputs = [torch.tensor([eos_id, *sentences[row][:-1]]) for row in rows]
        batch = {
            "inputs": nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=eos_id).to(device),
            "targets": nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED).to(device),
        }
        losses = F.cross_entropy(
            model(batch).flatten(0, 1).float(), batch["targets"].flatten(), ignore_index=IGNORED, reduction="none"
        )
        for row, total in zip(rows, losses.view_as(batch["targets"]).sum(dim=1).tolist(), strict=True):
            sums[row] = -total
    return sums


def _batches(sentences: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of all sentences that have tokens in batches, from the shortest sentence to the longest."""
    batches: list[list[int]] = []
    for row in sorted(filter(sentences.__getitem__, range(len(sentences))), key=lambda index: len(sentences[index])):
        # The longest of a batch is the last to come.
        if not batches or (len(batches[-1]) + 1) * len(sentences[row]) > TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches
