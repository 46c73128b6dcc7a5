"""Which of two sentences a causal model finds likelier, without any fine-tuning.

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

SCORED = 64
"""Sentences scored at once."""


def score_on_blimp(
    model: LanguageModel, sets: Sequence[PairSet], tokenizer: Tokenizer, *, eos_id: int, longest: int, title: str
) -> list[dict[str, Any]]:
    """One entry a set, in the mode that the model is in: the share of pairs whose good sentence is likelier.

    A sentence's likelihood is that of all its tokens behind an end-of-text token, as documents begin in pre-training;
    a tie counts as wrong. Of a sentence longer than the model reads, the first `longest` tokens count; `cut` says in
    how many pairs there was one.
    """
    sentences = [text for one in sets for pair in one.pairs for text in pair]
    encoded = [one.ids for one in tokenizer.encode_batch_fast(sentences, add_special_tokens=False)]
    likelihoods = iter(log_likelihoods(model, [ids[:longest] for ids in encoded], eos_id, title))
    lengths = iter(len(ids) for ids in encoded)
    found = []
    for one in sets:
        right = sum(next(likelihoods) > next(likelihoods) for _ in one.pairs)
        cut = sum(max(next(lengths), next(lengths)) > longest for _ in one.pairs)
        pairs = len(one.pairs)
        found.append({"set": one.name, "field": one.field, "pairs": pairs, "cut": cut, "accuracy": right / pairs})
    return found


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel, sentences: Sequence[Sequence[int]], eos_id: int, title: str = "sentences"
) -> list[float]:
    """The sum of the log-probabilities of each sentence's tokens behind an end-of-text token, in nats and fp32.

    Sentences of like length are read together and filled up behind, where a causal model does not look.
    """
    device = model.ffns[0].w_in.device
    found = [0.0] * len(sentences)
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    for start in tqdm(range(0, len(order), SCORED), desc=title, disable=None):
        rows = order[start : start + SCORED]
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
            found[row] = -total
    return found
