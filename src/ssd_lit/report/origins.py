"""What of an experiment is from which paper, and what of it is ours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssd_lit.config import RunConfig
from ssd_lit.report.arms import Arm


@dataclass(frozen=True)
class Origin:
    """A part of the experiment: where it comes from, what is done as there, and what is not."""

    part: str
    source: str
    theirs: str
    ours: str
    concerns: Callable[[RunConfig], bool]


ORIGINS = (
    Origin(
        "Switchable sparse-dense training",
        "SSD, arXiv 2410.03440",
        "Dense and sparse phases in turn, the last one dense; a dense phase ends once the pattern is stable, by the "
        "adjusted Rand index of successive clusterings; experts are balanced clusters of neurons, chosen by their "
        "centres, and their outputs are added without weights.",
        "Every number; the least and greatest lengths of phases; clusters balanced by an exact assignment; Adam's "
        "moments move with their neurons.",
        lambda run: run.method == "ssd",
    ),
    Origin(
        "Switches at fixed steps",
        "ours",
        "",
        "Where they are, instead of the rule by similarity.",
        lambda run: run.method == "ssd" and run.switching.switch_points is not None,
    ),
    Origin(
        "MoEfication of a trained model",
        "MoEfication, arXiv 2110.01786",
        "A model that was trained without experts has its neurons grouped into experts afterwards.",
        "The models that it is done to, and every number.",
        lambda run: run.method == "posthoc",
    ),
    Origin(
        "Router mass",
        "MoEfication, section 3.3; DejaVu, arXiv 2310.17157",
        "A small MLP, trained behind the model, predicts the experts' activation mass.",
        "Cross-entropy with their shares of it; width, steps and learning rate.",
        lambda run: run.moe.posthoc_router == "mass_mlp",
    ),
    Origin(
        "Router norm, dynamic k",
        "D2DMoE, arXiv 2310.04361",
        "A small MLP predicts the norms of the experts' outputs; all run that are near the largest.",
        "The thresholds; width, steps and learning rate.",
        lambda run: run.moe.posthoc_router == "norm_mlp",
    ),
    Origin(
        "Router direction",
        "ours",
        "",
        "Each expert's centre, trained behind the model on the experts' activation mass.",
        lambda run: run.moe.posthoc_router == "centers",
    ),
    Origin(
        "Learned gate",
        "Shazeer et al., arXiv 1701.06538; Switch, 2101.03961; ST-MoE, 2202.08906",
        "A gate trained with the model, with a load-balancing loss and a z-loss.",
        "The softmax over the chosen experts times their number, so that equal weights add outputs as SSD does.",
        lambda run: run.method != "dense" and run.moe.router == "gate",
    ),
    Origin(
        "Random router, k that grows",
        "SMoE-Dropout, arXiv 2303.01610",
        "The router is random and frozen, the number of experts grows over the training.",
        "The numbers of experts and when they change.",
        lambda run: run.method == "sparse" and run.moe.router == "random",
    ),
    Origin(
        "Experts from scratch by their centres",
        "ours",
        "",
        "Groups made at random before the first step, chosen as in SSD's sparse phases.",
        lambda run: run.from_scratch and run.moe.router == "center",
    ),
    Origin(
        "A dense model cut into experts, trained on",
        "LLaMA-MoE, arXiv 2406.16554",
        "The neurons of a trained model become experts, and training goes on sparsely.",
        "How far the first model is trained; a fresh optimiser and schedule on the text that follows.",
        lambda run: run.method == "sparse" and not run.from_scratch,
    ),
    Origin(
        "Sparse upcycling",
        "arXiv 2212.05055",
        "Every expert begins as a copy of a trained model's whole FFN.",
        "Tokens choose experts, where in the paper's encoder experts choose tokens; a fresh optimiser and schedule.",
        lambda run: run.method == "upcycle",
    ),
    Origin(
        "Experts by co-activation",
        "MoEfication, section 3.2",
        "Neurons that fire together share an expert.",
        "The graph is cut by a spectral embedding and balanced k-means, there by METIS.",
        lambda run: run.method != "dense" and run.moe.construction == "coactivation",
    ),
    Origin(
        "Experts by activations",
        "near CMoE, arXiv 2502.04416",
        "Neurons are grouped by what they give for calibration tokens.",
        "Balanced k-means over it.",
        lambda run: run.method != "dense" and run.moe.construction == "kmeans_activations",
    ),
    Origin(
        "Dense training for another arm's FLOPs",
        "ours",
        "",
        "The comparison: fewer steps, or a smaller model.",
        lambda run: run.match_flops_of_arm is not None,
    ),
)


def origins(arms: Sequence[Arm]) -> list[Origin]:
    """The parts that any of the arms has."""
    return [origin for origin in ORIGINS if any(origin.concerns(arm.config) for arm in arms)]
