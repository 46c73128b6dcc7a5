"""The stages of a run: what makes its final model, and what measures it. Imports nothing that takes time."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssd_lit.config import RunConfig

_STAGES = {
    "dense": ("dense",),
    "ssd": ("warmup", "moefy", "sparse_phases"),
    "sparse": ("moefy", "sparse_phases"),
    "upcycle": ("moefy", "sparse_phases"),
    "posthoc": ("moefy",),
}
MEASUREMENTS = {
    "evaluate": ("evaluation.yaml", "evaluation.json"),
    "analyse": ("analysis.yaml", "analysis/analysis.json"),
    "downstream": ("downstream.yaml", "downstream/downstream.json"),
}
"""The stages after the training, in order: settings file, without which a stage is left out, and result of each."""
ALL_STAGES = ("warmup", "moefy", "sparse_phases", "dense", "route", *MEASUREMENTS)
"""Every stage that a run may have, in order."""


def training_stages(config: "RunConfig") -> tuple[str, ...]:
    """The stages that make a run's final model, in order."""
    return (*_STAGES[config.method], *(["route"] if config.moe.posthoc_router else []))


def stage_of(method: str, index: int, mode: str) -> str:
    """The training stage that a phase belongs to."""
    stages = _STAGES[method]
    return "route" if mode == "router" else stages[min(index, len(stages) - 1)]
