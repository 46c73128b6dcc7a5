"""Numbers as a reader wants them."""

import math
from collections.abc import Mapping
from typing import NamedTuple

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
SAME = 0.0005
"""Relative differences below this are not told."""


class Wording(NamedTuple):
    """How to say that something is more, less or several times as much."""

    more: str
    less: str
    times: str


PERPLEXITY = Wording("higher (worse)", "lower (better)", "as high (worse)")
AMOUNT = Wording("more", "less", "as much")
COUNT = Wording("more", "fewer", "as many")


def scaled(value: float, unit: str = "") -> str:
    """Three digits and a prefix: 1.23 G."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".strip()
    power = min(max(int(math.log10(abs(value)) // 3), 0), len(PREFIXES) - 1)
    number = value / 1000.0**power
    # 999.7 rounds to 1000: one prefix further.
    if round(abs(number)) >= 1000 and power + 1 < len(PREFIXES):
        number, power = number / 1000, power + 1
    return f"{digits(number)} {PREFIXES[power]}{unit}".strip()


def digits(value: float) -> str:
    """About three digits that matter, without an exponent."""
    if not math.isfinite(value):
        return f"{value:g}"
    size = abs(value)
    return f"{value:.{2 if size < 10 else 1 if size < 100 else 0}f}"


def number(value: float | None) -> str:
    """Perplexities in tables: two decimals, fewer once they are large; a dash for none."""
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def flop(value: float) -> str:
    """FLOPs with a prefix: 1.23 GFLOP."""
    return scaled(value, "FLOP")


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f}%"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def compare(value: float, reference: float, words: Wording) -> str:
    """How `value` stands to `reference`: "1.3% higher than", "the same (to 0.1%) as", "5.20 times as high as"."""
    if not (math.isfinite(value) and math.isfinite(reference)) or reference <= 0:
        return "not comparable with"
    change = value / reference - 1
    if abs(change) < SAME:
        return "the same (to 0.1%) as"
    if change >= 1:
        return f"{digits(value / reference)} times {words.times} as"
    return f"{percent(abs(change))} {words.more if change > 0 else words.less} than"


def listed(items: list[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def told_differences(found: Mapping[str, tuple[str, str]], most: int = 4) -> str:
    """Settings that differ, by key: "moe.top_k 4 instead of 6"; beyond `most` only how many."""
    told = [f"{key} {mine} instead of {theirs}" for key, (mine, theirs) in list(found.items())[:most]]
    rest = len(found) - len(told)
    if rest:
        told.append(f"{rest} more setting{'s' if rest > 1 else ''}")
    return listed(told) if told else "no setting"


def shortened(text: str, most: int = 32) -> str:
    """A name that fits beside a figure: the middle of a long one is left out, for names differ at their ends."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"
