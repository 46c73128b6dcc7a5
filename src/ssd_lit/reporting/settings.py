"""The settings of an experiment's arms, what they mean, and where arms differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssd_lit.config import RunConfig, Section
from ssd_lit.reporting.runs import RunResult, by_arm

SECTIONS = ("model", "moe", "optim", "training", "switching")


@dataclass(frozen=True)
class Setting:
    """One key and its value in each arm, in the arms' order."""

    key: str
    meaning: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


def settings(results: Sequence[RunResult]) -> list[Setting]:
    """Every setting of every section; seeds of an arm share theirs."""
    configs = [runs[0].config for runs in by_arm(results).values()]
    return [
        Setting(f"{section}.{key}", meaning, tuple(_shown(getattr(getattr(one, section), key)) for one in configs))
        for section in SECTIONS
        for key, meaning in _meanings(section).items()
    ]


def flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested names and values as a list of dotted names and texts."""
    pairs: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            pairs += flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            pairs += flat({str(index): item for index, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", _shown(value)))
    return pairs


def _meanings(section: str) -> dict[str, str]:
    """The keys of a section of a run's config, with the docstring of each."""
    kind = RunConfig.model_fields[section].annotation
    assert isinstance(kind, type)
    assert issubclass(kind, Section)
    return {key: field.description or "" for key, field in kind.model_fields.items()}


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return str(value)
