"""Which tokens choose which experts, for the report."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from ssd_lit.report.analyses import has_table, read_table
from ssd_lit.report.runs import RunResult, by_arm

BUSIEST = 8
"""Experts shown of a layer, at most; those that no token chooses are left out."""


@dataclass(frozen=True)
class TokenLift:
    """A token that chooses an expert more often than others do."""

    text: str
    lift: float
    seen: int
    count: int


@dataclass(frozen=True)
class ExpertTokens:
    """An expert, the share of tokens that choose it, and those with the highest lift."""

    layer: int
    expert: int
    load: float
    tokens: tuple[TokenLift, ...]


def token_tables(results: Sequence[RunResult]) -> list[tuple[RunResult, list[ExpertTokens]]]:
    """The first run of each arm that has experts: the busiest experts of its first and of its last layer."""
    first = [runs[0] for runs in by_arm([result for result in results if has_table(result, "tokens")]).values()]
    return [(result, _busiest(read_table(result, "load"), read_table(result, "tokens"))) for result in first]


def _busiest(load: pd.DataFrame, tokens: pd.DataFrame) -> list[ExpertTokens]:
    load, tokens = load.astype({"layer": int}), tokens.astype({"layer": int})
    ends = load[load["layer"].isin([load["layer"].min(), load["layer"].max()]) & (load["load"] > 0)]
    busiest = ends.sort_values(["layer", "load", "expert"], ascending=[True, False, True]).groupby("layer")
    return [
        ExpertTokens(int(layer), int(expert), float(share), _tokens_of(tokens, int(layer), int(expert)))
        for layer, expert, share in busiest.head(BUSIEST)[["layer", "expert", "load"]].itertuples(index=False)
    ]


def _tokens_of(tokens: pd.DataFrame, layer: int, expert: int) -> tuple[TokenLift, ...]:
    mine = tokens[(tokens["layer"] == layer) & (tokens["expert"] == expert)].sort_values("rank")
    rows = mine[["token", "lift", "seen", "count"]].itertuples(index=False)
    return tuple(TokenLift(str(text), float(lift), int(seen), int(count)) for text, lift, seen, count in rows)
