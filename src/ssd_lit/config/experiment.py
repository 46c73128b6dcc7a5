"""An experiment: what to run and compare, resolved to one `RunConfig` for each arm and seed."""

import copy
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from ssd_lit.config.data import DataConfig
from ssd_lit.config.measurements import AnalysisConfig, DownstreamConfig, EvaluationConfig
from ssd_lit.config.run_config import RUN_SECTIONS, Arm, RunConfig
from ssd_lit.config.section import LONGEST_NAME, Name, Section, Seed, checked
from ssd_lit.config.sections import ModelConfig
from ssd_lit.config.yaml_file import ConfigError, laid_over, shown

MOST_RUNS = 10_000
KEPT_NAMES = frozenset({"data", "mlflow.db", "mlruns", "mlartifacts"})
"""What lies under results/ beside the experiments."""


class Experiment(Section):
    """A YAML under configs/: what to run and compare."""

    experiment: Name
    """Names the folder under results/ and the MLflow experiment."""
    description: str
    """What is asked, in a sentence or two; opens the report."""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    """Every arm is run once with each."""
    data: DataConfig
    model: dict[str, Any] = {}
    moe: dict[str, Any] = {}
    optim: dict[str, Any] = {}
    training: dict[str, Any] = {}
    switching: dict[str, Any] = {}
    evaluation: EvaluationConfig = EvaluationConfig()
    analysis: AnalysisConfig | None = None
    """Look into the models as well; null leaves the analyses out."""
    downstream: DownstreamConfig | None = None
    """Try the models on other tasks as well; null leaves that out."""
    arms: dict[Name, Arm] = Field(min_length=1)
    """What is compared, by name."""

    @model_validator(mode="after")
    def _runs_are_countable(self) -> Self:
        if self.experiment in KEPT_NAMES:
            raise ValueError(f"experiment {self.experiment!r}: results/{self.experiment} is not for experiments")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {shown(self.seeds)}: each may stand there once")
        for name, arm in self.arms.items():
            empty = [key for key, values in arm.grid.items() if not values]
            if empty:
                raise ValueError(f"arms.{name}.grid.{empty[0]}: no values")
        runs = len(self.seeds) * sum(math.prod(map(len, arm.grid.values())) for arm in self.arms.values())
        if runs > MOST_RUNS:
            raise ValueError(f"arms, grids and seeds make {runs:,} runs; allowed: {MOST_RUNS:,}")
        if self.downstream is not None and not any(arm.downstream for arm in self.arms.values()):
            raise ValueError("downstream: false for every arm, so that nothing is tried; leave the section out")
        return self

    def runs(self) -> list[RunConfig]:
        """Every run, arm by arm, seed by seed; raises ConfigError at the first mistake of an arm."""
        arms: dict[str, tuple[Arm, dict[str, Any]]] = {}
        for key in self.arms:
            found = cells(key, self.arms[key])
            if twice := sorted(found.keys() & arms.keys()):
                raise ConfigError(f"arms.{key}: {twice[0]!r} is also the name of another arm, or of a cell of its grid")
            arms |= found
        runs = [self._resolve(name, arm, values, seed) for name, (arm, values) in arms.items() for seed in self.seeds]
        _check_parents(runs)
        first: dict[str, str] = {}
        for index, run in enumerate(runs):
            if run.method == "ssd":
                owner = first.setdefault(run.warmup(), run.name)
                if owner != run.name:
                    runs[index] = run.model_copy(update={"shares_warmup": owner})
        return runs

    def downstream_runs(self) -> list[RunConfig]:
        """The runs whose final models are tried on other tasks; none without a section downstream."""
        left_out = {name for key, arm in self.arms.items() if not arm.downstream for name in cells(key, arm)}
        return [] if self.downstream is None else [run for run in self.runs() if run.arm not in left_out]

    def _resolve(self, name: str, arm: Arm, values: dict[str, Any], seed: int) -> RunConfig:
        self._check_other_arms(name, arm)
        sections = {
            key: laid_over(copy.deepcopy(getattr(self, key)), copy.deepcopy(getattr(arm, key))) for key in RUN_SECTIONS
        }
        if arm.method == "sparse" and arm.parent_arm is None and sections["model"].get("pretrained") is None:
            # The experiment's own choice is meant for the arms that have a pattern to group by.
            sections["moe"]["construction"] = arm.moe.get("construction", "random")
        resolved = {
            "experiment": self.experiment, "arm": name, "method": arm.method, "label": arm.label or name,
            "seed": seed, "parent_arm": arm.parent_arm, "match_flops_of_arm": arm.match_flops_of_arm, "grid": values,
            "data": self.data.model_dump(), **sections,
        }  # fmt: skip

        def where(location: tuple[str, ...]) -> str:
            changes = getattr(arm, location[0], {}) if location else {}
            # A rule about a whole section has no key of its own: the arm is to blame if it touched the section.
            overridden = bool(changes) and (len(location) == 1 or location[1] in changes)
            return ".".join((f"arms.{name}", *location) if overridden or not location else location)

        return checked(RunConfig, resolved, where)

    def _check_other_arms(self, name: str, arm: Arm) -> None:
        trained = [other for other, one in self.arms.items() if one.method != "posthoc" and not one.grid]
        pretrained = {**self.model, **arm.model}.get("pretrained")
        if arm.method in ("posthoc", "upcycle") and arm.parent_arm is None and pretrained is None:
            raise ConfigError(f"arms.{name}.parent_arm: missing; allowed: {trained}")
        if arm.parent_arm is not None and arm.method not in ("posthoc", "sparse", "upcycle"):
            raise ConfigError(f"arms.{name}.parent_arm: only posthoc, sparse and upcycle start from another arm")
        if arm.method in ("sparse", "upcycle"):
            trained = [other for other in trained if self.arms[other].method == "dense"]
        if arm.parent_arm is not None and arm.parent_arm not in trained:
            raise ConfigError(f"arms.{name}.parent_arm: given {arm.parent_arm!r}; allowed: {trained}")
        if arm.match_flops_of_arm is not None and arm.method != "dense":
            raise ConfigError(
                f"arms.{name}.match_flops_of_arm: only method dense can be given the FLOPs of another arm"
            )
        matched = [other for other in trained if self.arms[other].match_flops_of_arm is None and other != name]
        if arm.match_flops_of_arm is not None and arm.match_flops_of_arm not in matched:
            raise ConfigError(f"arms.{name}.match_flops_of_arm: given {arm.match_flops_of_arm!r}; allowed: {matched}")


def _check_parents(runs: Sequence[RunConfig]) -> None:
    """Raise ConfigError for a run that starts from a run of another model."""
    by_name = {run.name: run for run in runs}
    for run in runs:
        if run.parent_run is None:
            continue
        parent = by_name[run.parent_run].model
        for key in ModelConfig.model_fields:
            own, its = getattr(run.model, key), getattr(parent, key)
            if own != its and key not in ("dropout", "pretrained"):
                raise ConfigError(
                    f"arms.{run.arm}.model.{key}: given {shown(own)}; arm {run.parent_arm}, whose weights it starts "
                    f"from, has {shown(its)}"
                )


def cells(name: str, arm: Arm) -> dict[str, tuple[Arm, dict[str, Any]]]:
    """An arm, or one for every combination of its grid's values: name to arm and the settings that tell it apart."""
    found = {}
    for combination in itertools.product(*arm.grid.values()):
        content = arm.model_dump(exclude={"grid"})
        values: dict[str, Any] = {}
        for key, value in zip(arm.grid, combination, strict=True):
            section, changes, leading = _changes(name, key, value)
            content[section] = laid_over(content[section], changes)
            values |= leading
        told = [f"{key.rpartition('.')[2]} {value}" for key, value in values.items()]
        cell = ".".join([name, *(re.sub(r"[^a-z0-9_.]+", "_", one.lower()) for one in told)])
        if values:
            content["label"] = ", ".join([arm.label or name, *told])
        if len(cell) > LONGEST_NAME and values:
            raise ConfigError(
                f"arms.{name}.grid: a combination would be called {cell!r}; names have {LONGEST_NAME} letters at most: "
                "vary fewer settings in one grid, or shorten the arm's name"
            )
        if cell in found:
            raise ConfigError(f"arms.{name}.grid: two combinations are both called {cell!r}")
        found[cell] = Arm.model_validate(content), values
    return found


def _changes(name: str, key: str, value: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The section that one value of a grid changes, the changes, and the setting of them that names the cell."""
    section, _, setting = key.partition(".")
    if section in RUN_SECTIONS:
        if setting:
            changes = value
            for part in reversed(setting.split(".")):
                changes = {part: changes}
            return section, changes, {key: value}
        if isinstance(value, dict) and value:
            leading = next(iter(value))
            return section, value, {f"{section}.{leading}": value[leading]}
    raise ConfigError(
        f"arms.{name}.grid: given {shown(key)}: {shown(value)}; expected a dotted key such as moe.top_k, "
        "or a section with mappings of its keys"
    )
