"""The figures of an experiment, each as .svg, .png and the .csv it was drawn from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ssd_lit.config import RunConfig
from ssd_lit.files import write_text
from ssd_lit.reporting import activation_figures, loss_figures, perplexity_figure
from ssd_lit.reporting.runs import RunResult, load_results
from ssd_lit.reporting.style import figure_settings, save

Drawing = tuple[Figure, pd.DataFrame]


@dataclass(frozen=True)
class FigureKind:
    """How a figure is drawn, and what to say under it."""

    draw: Callable[[Sequence[RunResult]], Drawing]
    title: str
    caption: str


FIGURES = {
    "loss_over_steps": FigureKind(
        loss_figures.over_steps,
        "Validation loss over steps",
        "Validation loss (lines) and training loss (faint) over the global step, each in the mode that the model is "
        "training in; right: the last part, enlarged. The lanes below show each run's phases, filled where sparse; the "
        "same stretches are shaded in the plot for runs that alternate.",
    ),
    "loss_over_flops": FigureKind(
        loss_figures.over_flops,
        "Validation loss over training FLOPs",
        "The same losses over the training FLOPs spent so far: further left at the same height is cheaper.",
    ),
    "active_neurons": FigureKind(
        activation_figures.active_neurons,
        "Active neurons",
        "Share of FFN neurons above zero for a token, one line a layer, through training; sparse phases shaded.",
    ),
    "similarity": FigureKind(
        activation_figures.similarity,
        "Activation pattern similarity",
        "Adjusted Rand index between the neuron clusterings of two successive checks, averaged over layers. A "
        "dense phase may end once it reaches tau (dashed). Vertical lines mark the switches; sparse phases are "
        "shaded.",
    ),
    "perplexity_over_k": FigureKind(
        perplexity_figure.over_k,
        "Perplexity over the number of experts",
        "Perplexity of the final models in sparse mode, by the number of experts k computed for a token; right: "
        "the lowest part, enlarged. Rings mark the k an arm is set to; dashed lines are the models in dense mode.",
    ),
}


def write_figures(exp_dir: Path, runs: Sequence[RunConfig]) -> list[Path]:
    """Draw every figure into figures/; one that has nothing to show says so inside."""
    results = load_results(exp_dir, runs)
    written: list[Path] = []
    for name, kind in FIGURES.items():
        stem = exp_dir / "figures" / name
        with figure_settings():
            figure, data = kind.draw(results)
            written += save(figure, stem)
        write_text(stem.with_suffix(".csv"), data.to_csv(index=False, lineterminator="\n"))
        written.append(stem.with_suffix(".csv"))
    return written
