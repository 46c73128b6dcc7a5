"""The figures of an experiment, each as .svg, .png and the .csv it was drawn from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ssd_lit.config import Experiment
from ssd_lit.report import (
    activation_figures,
    downstream_figures,
    expert_figures,
    grid_figure,
    loss_figures,
    pattern_figures,
    perplexity_figure,
    router_figure,
)
from ssd_lit.report.formatting import listed
from ssd_lit.report.grid import Grid, grids
from ssd_lit.report.names import GRID, figure_names
from ssd_lit.report.runs import RunResult, load_results
from ssd_lit.report.style import figure_settings, save
from ssd_lit.support.files import write_text

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
        "The same losses over the training FLOPs spent so far: further left at the same height is cheaper. A run that "
        "starts from another begins with what that one spent.",
    ),
    "loss_over_seconds": FigureKind(
        loss_figures.over_seconds,
        "Validation loss over training time",
        "The same losses over the wall-clock seconds spent in training so far, MoEfication included. Runs that trained "
        "beside others on one machine had a share of it only.",
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
        "the lowest part, enlarged. Rings mark the k an arm is set to; dashed lines are the models in dense mode: "
        "with more than seven arms only those that have no other, for with all experts sparse mode equals dense mode. "
        "(Copied experts and learned gates have no dense mode.)",
    ),
    "router_over_k": FigureKind(
        router_figure.over_k,
        "Routers against the oracle",
        "Perplexity in sparse mode over k with each arm's own router, and with an oracle that knows every expert's "
        "activation mass. Arms that differ in their router only stand side by side and share their scale; others have "
        "their own. Crosses: every expert predicted to matter, at the mean number of experts that takes. No oracle is "
        "shown for copied experts, whose outputs must be weighed.",
    ),
    "similarity_pairs": FigureKind(
        pattern_figures.similarity_pairs,
        "Activation pattern of all pairs of moments",
        "Adjusted Rand index between the neuron clusterings of any two snapshots, averaged over layers; the diagonal "
        "compares a snapshot with itself. Every clustering starts anew from the weights, while the checks during "
        "training start from the clustering before as well. Bars along the edges mark sparse phases.",
    ),
    "similarity_settings": FigureKind(
        pattern_figures.similarity_settings,
        "Activation pattern by number of clusters and by clustering",
        "Adjusted Rand index between every snapshot and the one before. Left: the clustering that runs use themselves, "
        "with several numbers of clusters E. Right: several clusterings, with the E nearest the arm's own. Random "
        "clusters show what chance gives; contiguous ones are the neurons as they stand, which MoEfication alone "
        "moves. Sparse phases are shaded.",
    ),
    "expert_load": FigureKind(
        expert_figures.expert_load,
        "Load of the experts",
        "Share of validation tokens that choose each expert of the final models, sorted, one line a layer; dashed: all "
        "experts chosen alike. An expert is dead if no token chooses it; the counts are over all layers.",
    ),
    "routing": FigureKind(
        expert_figures.routing,
        "Activation mass that the routers find",
        "The activation mass in the k experts that the router ranks first, as a share of the most that any k experts "
        "hold: the mean over layers, and the range over them. All k are taken on the tokens that sparse mode with the "
        "arm's own k (ring) brings to each layer. Dashed: k experts at random.",
    ),
    "glue": FigureKind(
        downstream_figures.glue,
        "GLUE after fine-tuning",
        "Scores of the fine-tuned models on the development sets: means over seeds, with the range as a bar. Full "
        "dots: fine-tuned and scored in dense mode; rings: the same models scored in sparse mode; squares: fine-tuned "
        "and scored in sparse mode. Dashed: always naming the commonest class (no correlation, for STS-B).",
    ),
    "blimp": FigureKind(
        downstream_figures.blimp,
        "BLiMP without fine-tuning",
        "Share of minimal pairs whose acceptable sentence is likelier to the final models, in all sets and by field of "
        "linguistics: means over sets and seeds, with the range over seeds as a bar. Dots: dense mode; squares: sparse "
        "mode. Dashed: chance.",
    ),
}


def figure_kinds(experiment: Experiment, results: Sequence[RunResult]) -> dict[str, FigureKind]:
    """Every figure of the experiment by its name, in order."""
    pages = {GRID + grid.name: _grid_kind(grid) for grid in grids(experiment, results)}
    kinds = FIGURES | pages
    return {name: kinds[name] for name in figure_names(experiment)}


def write_figures(exp_dir: Path, experiment: Experiment) -> list[Path]:
    """Draw every figure into figures/; one that has nothing to show says so inside."""
    results = load_results(exp_dir, experiment.runs())
    written: list[Path] = []
    for name, kind in figure_kinds(experiment, results).items():
        with figure_settings():
            figure, data = kind.draw(results)
            written += save(figure, exp_dir / "figures" / name)
        path = exp_dir / "figures" / f"{name}.csv"
        write_text(path, data.to_csv(index=False, lineterminator="\n"))
        written.append(path)
    return written


def _grid_kind(grid: Grid) -> FigureKind:
    return FigureKind(
        lambda _: grid_figure.draw(grid),
        f"Grid: {grid.label}",
        f"What {listed(list(grid.keys))} {'changes' if len(grid.keys) == 1 else 'change'}: means over seeds, with the "
        "range as a bar and the seeds as dots where there are several. Dashed: the dense arm, trained for all its "
        "steps.",
    )
