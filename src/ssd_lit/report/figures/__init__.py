"""The figures of an experiment: what each is called, what stands under it, how it is drawn, and when there is one.

The workflow reads this while it plans, so nothing here loads a library for tables or figures before it is drawn.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

from ssd_lit.config import Experiment, cells
from ssd_lit.support.files import write_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    Drawing = tuple[Figure, pd.DataFrame]

GRID = "grid_"
"""Begins the name of a grid's figure, which is that of its arm."""


@dataclass(frozen=True)
class FigureKind:
    """A figure, drawn by the function `draw` (module of this package and name) from the results of all runs."""

    title: str
    draw: str
    caption: str
    """May name {validation_blocks}."""
    exists: Callable[[Experiment], bool] = lambda experiment: True
    chart: str | None = None
    """The live chart of the report that shows the same, of charts.js; the figure is then linked there."""


def _has_analysis(experiment: Experiment) -> bool:
    return experiment.analysis is not None


def _has_dense_peers(experiment: Experiment) -> bool:
    from_the_start = [run for run in experiment.runs() if run.parent_arm is None]
    return any(
        dense.is_dense_training_of(run) for dense, run in permutations(from_the_start, 2) if dense.arm != run.arm
    )


FIGURES = {
    "loss_over_steps": FigureKind(
        "Validation loss over steps",
        "training.loss_over_steps",
        "Validation loss (lines), on {validation_blocks}, and training loss (faint) over the global step, each in the "
        "mode that the model is training in; right: the last part, enlarged. The lanes below show each run's phases, "
        "filled where sparse; the same stretches are shaded in the plot for runs that alternate.",
        chart="loss",
    ),
    "loss_over_flops": FigureKind(
        "Validation loss over training FLOPs",
        "training.loss_over_flops",
        "The same losses, on {validation_blocks}, over the training FLOPs spent so far, router and attention included: "
        "further left at the same height is cheaper. A run that starts from another begins with what that one spent.",
        chart="loss",
    ),
    "loss_over_seconds": FigureKind(
        "Validation loss over training time",
        "training.loss_over_seconds",
        "The same losses, on {validation_blocks}, over the wall-clock seconds spent in training so far, MoEfication "
        "included. Runs that trained beside others on one device had a share of it only.",
        chart="loss",
    ),
    "above_dense": FigureKind(
        "Above dense training, through training",
        "gap.above_dense",
        "Validation perplexity, on {validation_blocks}, over that of dense training with the same model and seed at "
        "the same step, less one, each in the mode that the model is training in; sparse mode is faint. A level line "
        "is a price paid once, a rising one learning that is lost. The learning rate of an arm with more steps falls "
        "later: its last part says little.",
        _has_dense_peers,
    ),
    "active_neurons": FigureKind(
        "Active neurons",
        "training.active_neurons",
        "Fraction of FFN neurons above zero for a token, one line a layer, through training; sparse phases shaded.",
    ),
    "similarity": FigureKind(
        "Activation pattern similarity",
        "training.similarity",
        "Adjusted Rand index between the neuron clusterings of two successive checks, averaged over layers. A dense "
        "phase may end once it reaches tau (dashed). Vertical lines mark the switches; sparse phases are shaded.",
        chart="similarity",
    ),
    "perplexity_over_k": FigureKind(
        "Perplexity over the number of experts",
        "sparse_mode.perplexity_over_k",
        "Validation perplexity of the final models in sparse mode, by the number of experts k computed for a token; "
        "right: the lowest part, enlarged. Rings mark the k an arm is set to. Dashed: the same models in dense mode, "
        "left out where many arms are drawn, for with all experts sparse mode equals dense mode. Arms without experts "
        "are level lines. Copied experts and trained gates have no dense mode.",
        chart="perplexity",
    ),
    "router_over_k": FigureKind(
        "Routers against the oracle",
        "sparse_mode.router_over_k",
        "Validation perplexity in sparse mode over k with each arm's own router, and with an oracle that knows every "
        "expert's activation mass. Arms that differ in their router only stand side by side and share their scale; "
        "others have their own. Crosses: every expert predicted to matter, at the mean number of experts that takes. "
        "No oracle is shown for copied experts, whose outputs must be weighed.",
    ),
    "similarity_pairs": FigureKind(
        "Activation pattern of all pairs of moments",
        "analyses.similarity_pairs",
        "Adjusted Rand index between the neuron clusterings of any two snapshots, averaged over layers; the diagonal "
        "compares a snapshot with itself. Every clustering starts anew from the weights, while the checks during "
        "training start from the clustering before as well. Bars along the edges mark sparse phases.",
        _has_analysis,
    ),
    "similarity_settings": FigureKind(
        "Activation pattern by number of clusters and by clustering",
        "analyses.similarity_settings",
        "Adjusted Rand index between every snapshot and the one before. Left: the clustering that runs use themselves, "
        "with several numbers of clusters E. Right: several clusterings, with the E nearest the arm's own. Random "
        "clusters show what chance gives; contiguous ones are the neurons as they stand, which MoEfication alone "
        "moves. Sparse phases are shaded.",
        _has_analysis,
    ),
    "expert_load": FigureKind(
        "Load of the experts",
        "analyses.expert_load",
        "Fraction of validation tokens that choose each expert of the final models, sorted, one line a layer; dashed: "
        "all experts chosen alike. An expert is dead if no token chooses it; the counts are over all layers.",
        _has_analysis,
    ),
    "routing": FigureKind(
        "Activation mass that the routers find",
        "analyses.routing",
        "The activation mass in the k experts that the router ranks first, as a fraction of the most that any k "
        "experts hold: the mean over layers, and the range over them. All k are taken on the tokens that sparse mode "
        "with the arm's own k (ring) brings to each layer. Dashed: k experts at random.",
        _has_analysis,
    ),
    "glue": FigureKind(
        "GLUE after fine-tuning",
        "downstream.glue",
        "Scores of the fine-tuned models on the development sets: means over seeds, with the range as a bar. Full "
        "dots: fine-tuned and scored in dense mode; rings: the same models scored in sparse mode; squares: fine-tuned "
        "and scored in sparse mode. Dashed: always naming the commonest class (no correlation, for STS-B).",
        lambda experiment: experiment.downstream is not None and experiment.downstream.glue is not None,
    ),
    "blimp": FigureKind(
        "BLiMP without fine-tuning",
        "downstream.blimp",
        "Fraction of minimal pairs whose acceptable sentence is likelier to the final models, in all sets and by field "
        "of linguistics: means over sets and seeds, with the range over seeds as a bar. Dots: dense mode; squares: "
        "sparse mode. Dashed: chance.",
        lambda experiment: experiment.downstream is not None and experiment.downstream.blimp is not None,
    ),
}
OF_A_GRID = FigureKind(
    "Grid: {label}",
    "grid.grid",
    "What {keys} change: means over seeds, with the range as a bar and the seeds as dots where there are several. "
    "Dashed: the dense arm, trained for all its steps.",
)


def figures_of(experiment: Experiment) -> dict[str, FigureKind]:
    """Every figure of the experiment by its name, in the order of its report; captions are filled in."""
    blocks = sorted({run.training.validation_blocks for run in experiment.runs()})
    measured_on = f"{' or '.join(str(count) for count in blocks)} validation blocks"
    figures = {
        name: replace(kind, caption=kind.caption.format(validation_blocks=measured_on))
        for name, kind in FIGURES.items()
        if kind.exists(experiment)
    }
    for name, arm in experiment.arms.items():
        if arm.grid:
            _, settings = next(iter(cells(name, arm).values()))
            title = OF_A_GRID.title.format(label=arm.label or name)
            keys = " and ".join(settings)
            figures[GRID + name] = replace(OF_A_GRID, title=title, caption=OF_A_GRID.caption.format(keys=keys))
    return figures


def write_figures(exp_dir: Path, experiment: Experiment) -> list[Path]:
    """Draw every figure into figures/ as .svg, .png and the .csv it was drawn from; returns the files.

    A figure that has nothing to show says so inside.
    """
    from ssd_lit.report.figures.style import figure_settings, save
    from ssd_lit.report.grid import grids
    from ssd_lit.report.results import load_results

    results = load_results(exp_dir, experiment.runs())
    of_grids = {GRID + grid.name: grid for grid in grids(experiment, results)}
    written: list[Path] = []
    for name, kind in figures_of(experiment).items():
        with figure_settings():
            figure, data = drawing(kind)(of_grids.get(name, results))
            written += save(figure, exp_dir / "figures" / name)
        path = exp_dir / "figures" / f"{name}.csv"
        write_text(path, data.to_csv(index=False, lineterminator="\n"))
        written.append(path)
    return written


def drawing(kind: FigureKind) -> "Callable[..., Drawing]":
    """The function that draws a figure: of the results of all runs, or of a grid."""
    module, name = kind.draw.split(".")
    draw: Callable[..., Drawing] = getattr(import_module(f"{__name__}.{module}"), name)
    return draw
