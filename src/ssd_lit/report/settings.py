"""The settings of an experiment's arms, what they mean, and where arms differ."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from ssd_lit.config import RunConfig, Section
from ssd_lit.report.results import RunResult, by_arm

SECTIONS = ("model", "moe", "optim", "training", "switching")
AFTERWARDS = frozenset(f"moe.{key}" for key in ("posthoc_router", "router_hidden", "router_steps", "router_lr"))
"""Settings of a router that is trained when all else is done."""
ROUTER = AFTERWARDS | {"moe.router", "moe.balance_weight", "moe.z_weight"}


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
        Setting(f"{section}.{key}", meaning, tuple(shown(getattr(getattr(config, section), key)) for config in configs))
        for section in SECTIONS
        for key, meaning in _meanings(section).items()
    ]


def alike_but(run: RunConfig, other: RunConfig, keys: Set[str]) -> bool:
    """Whether two runs share method, origin and every setting but those of `keys`."""
    origins = [(each.method, each.parent_arm, each.match_flops_of_arm) for each in (run, other)]
    return origins[0] == origins[1] and differences(run, other) <= keys


def differences(run: RunConfig, other: RunConfig) -> set[str]:
    """The settings in which two runs differ, by dotted key."""
    return {
        f"{section}.{key}"
        for section in SECTIONS
        for key in type(getattr(run, section)).model_fields
        if getattr(getattr(run, section), key) != getattr(getattr(other, section), key)
    }


def shown(value: Any) -> str:
    """A setting as a reader sees it."""
    match value:
        case None:
            return "-"
        case Section():
            return shown(value.model_dump())
        case Mapping():
            return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
        case list() | tuple():
            return ", ".join(shown(item) for item in value)
        case _:
            return str(value)


def flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested names and values as a list of dotted names and texts."""
    pairs: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            pairs += flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            pairs += flat({str(index): item for index, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", shown(value)))
    return pairs


def _meanings(section: str) -> dict[str, str]:
    """The keys of a section of a run's config, with the docstring of each."""
    kind = RunConfig.model_fields[section].annotation
    assert isinstance(kind, type)
    assert issubclass(kind, Section)
    return {key: field.description or "" for key, field in kind.model_fields.items()}
