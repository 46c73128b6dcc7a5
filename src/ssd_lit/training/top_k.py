"""How many experts a token runs through at a step."""

from ssd_lit.config import RunConfig
from ssd_lit.moe.selection import scheduled_k


def top_k_at(config: RunConfig, step: int) -> int:
    """k of the run's schedule at a global step (0-based) in a sparse phase."""
    schedule = config.moe.k_schedule
    end = schedule.end or config.moe.top_k
    return scheduled_k(
        step, config.training.steps, kind=schedule.kind, start=schedule.start, end=end, stairs=schedule.stairs
    )
