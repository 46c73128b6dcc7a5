"""The experts of a run's final model: their load, how well the router chooses them, and which tokens choose them.

Shape letters: T tokens, D model width, E experts, K experts a token, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from ssd_lit.config import AnalysisConfig
from ssd_lit.data.blocks import BATCH, TokenBlocks, scoring_batches
from ssd_lit.data.index import VocabInfo
from ssd_lit.data.objectives import build_objective
from ssd_lit.data.tokenizer import load_tokenizer
from ssd_lit.models.hooks import ffn_inputs, ffn_tokens
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.statistics import chosen_mask, load_entropy
from ssd_lit.run import Run
from ssd_lit.training.checkpoint import final_model

SPLIT = "validation"
MIN_COUNT = 10
"""The least number of times that a token must occur for its preferences to be reported."""
LOAD_COLUMNS = ["layer", "expert", "load"]
ROUTING_COLUMNS = ["layer", "top_k", "chosen_share", "oracle_share", "recall"]
TOKEN_COLUMNS = ["layer", "expert", "rank", "token_id", "token", "seen", "count", "lift"]
BLANKS = str.maketrans({" ": "\N{OPEN BOX}", "\n": "\N{RETURN SYMBOL}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"})


@dataclass(frozen=True)
class Preference:
    """A token that chooses an expert more often than other tokens do."""

    expert: int
    rank: int
    token: int
    seen: int
    """How often the token occurs."""
    count: int
    """How often it chose the expert."""
    lift: float


class Watched(NamedTuple):
    """Three tables and a summary of every layer: see `watch_experts`."""

    load: pd.DataFrame
    routing: pd.DataFrame
    tokens: pd.DataFrame
    layers: list[dict[str, Any]]


@torch.no_grad()
def watch_experts(run: Run, settings: AnalysisConfig) -> Watched:
    """Measure the experts of every layer on validation blocks, in sparse mode with the run's top_k.

    - load: the fraction of tokens that choose each expert. The fractions of a layer add up to top_k.
    - routing: for several k, the fraction of all activation mass in the k experts that the router ranks first
      (`chosen_share`), and in the k with the most mass (`oracle_share`); `recall` is their ratio.
    - tokens: for each expert those with the highest lift P(expert | token) / P(expert), among tokens that occur at
      least MIN_COUNT times; `seen` is how often, `count` how often they chose the expert. Equal lifts go by `count`.
    - layers: load entropy, the number of experts that no token chose, and recall at top_k.
    """
    config = run.config
    model = final_model(run)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    model.set_mode("sparse", config.moe.top_k)
    blocks = min(settings.blocks, len(TokenBlocks(run.tokens, SPLIT)))
    watches = _watch(model, run.vocab, run.tokens, blocks)

    ks = several_ks(config.moe.experts, config.moe.top_k)
    load, routing, tokens, layers = [], [], [], []
    tokenizer = load_tokenizer(run.tokenizer)
    for layer, watch in enumerate(watches):
        load += [(layer, expert, fraction) for expert, fraction in enumerate(watch.load.tolist())]
        masses = [(k, *watch.mass_shares(k)) for k in ks]
        routing += [(layer, k, chosen, oracle, _ratio(chosen, oracle)) for k, chosen, oracle in masses]
        tokens += [
            (layer, p.expert, p.rank, p.token, readable(tokenizer, p.token), p.seen, p.count, p.lift)
            for p in watch.preferences(settings.tokens)
        ]
        layers.append({
            "layer": layer,
            "load_entropy": load_entropy(watch.load),
            "dead_experts": int((watch.load == 0).sum()),
            "routing_recall": _ratio(*watch.mass_shares(config.moe.top_k)),
        })  # fmt: skip
    return Watched(
        pd.DataFrame(load, columns=LOAD_COLUMNS),
        pd.DataFrame(routing, columns=ROUTING_COLUMNS),
        pd.DataFrame(tokens, columns=TOKEN_COLUMNS),
        layers,
    )


class LayerWatch:
    """Counts the experts chosen by the tokens of one layer, in memory independent of the number of tokens."""

    def __init__(self, experts: int, vocab_size: int, device: torch.device):
        self._tokens = torch.zeros(vocab_size, dtype=torch.int32, device=device)  # occurrences of each token
        self._chosen = torch.zeros(vocab_size, experts, dtype=torch.int32, device=device)
        # Activation mass of the expert at each rank, summed over tokens: ranked by the router, and by mass.
        self._by_router = torch.zeros(experts, dtype=torch.float64, device=device)
        self._by_mass = torch.zeros(experts, dtype=torch.float64, device=device)

    def update(self, ffn: ExpertFFN, x: Tensor, tokens: Tensor) -> None:
        """Add tokens, ids [T], with their inputs x [T, D] to the layer in sparse mode."""
        self._tokens += tokens.bincount(minlength=len(self._tokens)).to(torch.int32)
        self._chosen.index_add_(0, tokens, chosen_mask(ffn.route(x), ffn.experts).to(torch.int32))
        mass = ffn.activation_mass(x)
        ranked = ffn.router(x).argsort(dim=-1, descending=True)
        self._by_router += mass.gather(1, ranked).sum(dim=0, dtype=torch.float64)
        self._by_mass += mass.sort(dim=-1, descending=True).values.sum(dim=0, dtype=torch.float64)

    @property
    def load(self) -> Tensor:
        """Fraction of the tokens that chose each expert, [E]."""
        return self._chosen.sum(dim=0).cpu().double() / int(self._tokens.sum())

    def mass_shares(self, k: int) -> tuple[float, float]:
        """Fraction of all activation mass in the first k experts by the router, and in the k of the largest mass."""
        total, most = float(self._by_mass.sum()), float(self._by_mass[:k].sum())
        # Rounding: the same experts summed in another order may give a little more.
        chosen = min(float(self._by_router[:k].sum()), most)
        return _ratio(chosen, total), _ratio(most, total)

    def preferences(self, count: int) -> list[Preference]:
        """For each expert the `count` tokens with the highest lift; none for an expert that no token chose."""
        seen = self._tokens.cpu().numpy()
        frequent = np.flatnonzero(seen >= MIN_COUNT)
        chosen, load = self._chosen.cpu().numpy()[frequent], self.load.numpy()
        preferences = []
        for expert in np.flatnonzero(load):
            times = chosen[:, expert]
            lift = times / seen[frequent] / load[expert]
            order = [index for index in np.lexsort((frequent, -times, -lift))[:count] if times[index] > 0]
            for rank, index in enumerate(order, start=1):
                token = int(frequent[index])
                preferences.append(
                    Preference(int(expert), rank, token, int(seen[token]), int(times[index]), float(lift[index]))
                )
        return preferences


def several_ks(experts: int, top_k: int) -> list[int]:
    """Powers of two up to all experts, and the run's own k."""
    powers = [2**i for i in range(experts.bit_length()) if 2**i < experts]
    return sorted({*powers, experts, top_k})


def readable(tokenizer: Tokenizer, token: int) -> str:
    """A token's text with visible blanks; its vocabulary name if it has control characters or parts of a character."""
    text: str = tokenizer.decode([token], skip_special_tokens=False).translate(BLANKS)
    if text and text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    return tokenizer.id_to_token(token) or str(token)


def _watch(model: LanguageModel, vocab: VocabInfo, tokens_dir: Path, blocks: int) -> list[LayerWatch]:
    device = model.ffns[0].w_in.device
    objective = build_objective(model.objective_name, vocab)
    watches = [LayerWatch(ffn.experts, vocab.vocab_size, device) for ffn in model.ffns]
    batches = scoring_batches(tokens_dir, SPLIT, range(blocks), objective, device)
    for batch in tqdm(batches, total=-(-blocks // BATCH), desc="experts", disable=None):
        layers = zip(watches, model.ffns, ffn_inputs(model, batch), ffn_tokens(model, batch), strict=True)
        for watch, ffn, x, tokens in layers:
            watch.update(ffn, x, tokens)
    return watches


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
