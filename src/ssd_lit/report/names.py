"""Which figures an experiment has, known before anything runs: the workflow declares their files."""

from ssd_lit.config import Experiment

OF_EVERY_EXPERIMENT = (
    "loss_over_steps",
    "loss_over_flops",
    "loss_over_seconds",
    "active_neurons",
    "similarity",
    "perplexity_over_k",
    "router_over_k",
)
OF_ANALYSES = ("similarity_pairs", "similarity_settings", "expert_load", "routing")
OF_DOWNSTREAM = ("glue", "blimp")
"""Named as the parts of the section that ask for them."""
GRID = "grid_"


def figure_names(experiment: Experiment) -> list[str]:
    """The names of an experiment's figures, in the order of its report."""
    grids = [GRID + arm for arm, settings in experiment.arms.items() if settings.grid]
    analyses = OF_ANALYSES if experiment.analysis is not None else ()
    asked = experiment.downstream
    downstream = [name for name in OF_DOWNSTREAM if asked is not None and getattr(asked, name) is not None]
    return [*OF_EVERY_EXPERIMENT, *analyses, *downstream, *grids]


def caption_name(figure: str) -> str:
    """The caption in workflow/report/ that belongs to a figure; all grids have one."""
    return "grid" if figure.startswith(GRID) else figure
