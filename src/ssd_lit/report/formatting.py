"""Numbers and names as a reader wants them."""

import math
from collections.abc import Sequence

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def scaled(value: float, unit: str = "") -> str:
    """Three digits and a prefix: 1.23 G."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".strip()
    power = min(max(int(math.log10(abs(value)) // 3), 0), len(PREFIXES) - 1)
    mantissa = value / 1000.0**power
    # 999.7 rounds to 1000: one prefix further.
    if round(abs(mantissa)) >= 1000 and power + 1 < len(PREFIXES):
        mantissa, power = mantissa / 1000, power + 1
    return f"{digits(mantissa)} {PREFIXES[power]}{unit}".strip()


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


def percent(fraction: float) -> str:
    """A fraction as a percentage with one decimal."""
    return f"{100 * fraction:.1f}%"


def change(fraction: float) -> str:
    """A relative difference in per cent, with its sign; no sign where it rounds to nothing."""
    return f"{100 * fraction:+.1f}%".replace("+0.0%", "0.0%").replace("-0.0%", "0.0%")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def listed(items: Sequence[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def shortened(text: str, most: int = 32) -> str:
    """A name that fits beside a figure: the middle of a long one is left out, for names differ at their ends."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"
