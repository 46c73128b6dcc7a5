"""The live charts of report.html: the numbers they draw, as plain values, and the library that draws them."""

import colorsys
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from ssd_lit.report.figures.sparse_mode import perplexities
from ssd_lit.report.figures.style import MOST_CURVES, ArmStyle, arm_styles, select_arms
from ssd_lit.report.figures.training import checks
from ssd_lit.report.results import Points, RunResult, by_arm

MOST_POINTS = 400
"""Of a longer curve every second, third, ... point is drawn."""
VEGA_LITE = "6.1"
"""6.4 writes `undefined` for names in the tooltip of the point that is nearest."""
LIGHT, VIVID = 0.62, 0.75
"""Colours on a dark ground have at least this lightness, and at most this saturation."""
DASHES: dict[object, list[float]] = {"-": [], "-.": [8, 3, 2, 3], ":": [2, 2]}


@cache
def chart_library() -> str:
    """JavaScript that defines `vegaEmbed`: Vega, Vega-Lite and Vega-Embed in one piece. Takes two seconds."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    return bundle.replace("</script", "<\\/script")


def chart_data(results: Sequence[RunResult]) -> dict[str, Any]:
    """Arms with their colours, and the curves, phases and scores of their runs, for JSON.

    With many arms the cells of grids are left out.
    """
    styles, drawn = arm_styles(results), select_arms(results, MOST_CURVES)
    return {
        "arms": [_arm(runs[0], styles[arm]) for arm, runs in by_arm(drawn).items()],
        "runs": [_run(result) for result in drawn],
    }


def _arm(result: RunResult, style: ArmStyle) -> dict[str, Any]:
    dash = DASHES.get(style.line) if isinstance(style.line, str) else list(style.line[1])
    return {"name": result.arm, "label": result.label, "colour": style.colour, "on_dark": on_dark(style.colour),
            "dash": dash}  # fmt: skip


def on_dark(colour: str) -> str:
    """The colour, light enough for a dark ground."""
    hue, light, saturation = colorsys.rgb_to_hls(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))
    parts = colorsys.hls_to_rgb(hue, max(light, LIGHT), min(saturation, VIVID))
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def _run(result: RunResult) -> dict[str, Any]:
    config, switching = result.config, result.config.switching
    decides = config.method == "ssd" and switching.switch_points is None
    return {
        "name": result.name,
        "arm": result.arm,
        "seed": config.seed,
        "alternates": config.method == "ssd",
        "losses": {
            what: _curve(result, result.points.get(f"{name}/loss", []))
            for what, name in (("validation", "validation"), ("training", "train"))
        },
        "similarity": [_curve(result, stretch) for stretch in checks(result)],
        "tau": switching.tau if decides else None,
        "phases": [_phase(result, index) for index, record in enumerate(result.chain) if record.steps],
        "perplexity_dense": _finite(result.ppl_dense) if result.serves_densely else None,
        "top_k": result.evaluation.top_k,
        "over_k": [{"k": k, "perplexity": _finite(value)} for k, value in perplexities(result.evaluation.curve)],
    }


def _curve(result: RunResult, points: Points) -> dict[str, list[Any]]:
    """Columns: value and mode, and how far training was by each measure."""
    thinned = points[:: -(-len(points) // MOST_POINTS) or 1] if points else []
    if points and thinned[-1] != points[-1]:
        thinned.append(points[-1])
    steps = [step for step, _ in thinned]
    values = [_finite(value) for _, value in thinned]
    return {"value": [_rounded(value) for value in values], "mode": [_mode(result, step) for step in steps],
            **_spent(result, steps)}  # fmt: skip


def _phase(result: RunResult, index: int) -> dict[str, Any]:
    record = result.chain[index]
    spans = _spent(result, [record.first_step, record.last_step])
    return {"mode": record.mode, "ended_by": record.ended_by, **spans}


def _spent(result: RunResult, steps: Sequence[int]) -> dict[str, list[Any]]:
    return {
        "steps": list(steps),
        "tokens": [round(tokens) for tokens in result.tokens_at(steps)],
        "flops": [_rounded(flops) for flops in result.flops_at(steps)],
        "seconds": [_rounded(seconds) for seconds in result.seconds_at(steps)],
    }


def _mode(result: RunResult, step: int) -> str:
    """The mode in which the run was at a step: of the phase that ends with it, where one does."""
    modes = [record.mode for record in result.chain if record.steps and step <= record.last_step]
    return modes[0] if modes else result.chain[-1].mode


def _finite(value: float | None) -> float | None:
    """JSON has no infinities."""
    return value if value is not None and math.isfinite(value) else None


def _rounded(value: float | None) -> float | None:
    """Six digits: a chart shows fewer, and the page stays small."""
    return None if value is None else float(f"{value:.6g}")
