"""The record of a phase that is done."""

from dataclasses import replace

from ssd_lit.config import RunConfig
from ssd_lit.layout import PhaseRecord, Totals
from ssd_lit.training.schedule import Phase, next_phase


def finished(
    config: RunConfig,
    phase: Phase,
    history: list[PhaseRecord],
    start: Totals,
    spent: Totals,
    ended_by: str,
    similarity: list[list[float]],
) -> PhaseRecord:
    """The record of a phase that is done, with the run's totals and the mode of the phase that follows."""
    total = Totals(**{name: value + getattr(spent, name) for name, value in vars(start).items()})
    record = PhaseRecord(
        index=phase.index,
        mode=phase.mode,
        first_step=phase.first_step,
        last_step=phase.first_step + spent.steps,
        steps=spent.steps,
        tokens=spent.tokens,
        flops=spent.flops,
        seconds=spent.seconds,
        ended_by=ended_by,
        similarity=similarity,
        total=total,
    )
    following = next_phase(config, [*history, record])
    return replace(record, next=following.mode if following else None)
