"""Settings read from files, changed by the command line, and written to files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ssd_lit.config.data import DataConfig
from ssd_lit.config.effects import check_effects, check_effects_in_run
from ssd_lit.config.experiment import Experiment
from ssd_lit.config.measurements import AnalysisConfig, DownstreamConfig, EvaluationConfig
from ssd_lit.config.renamed import with_new_names
from ssd_lit.config.run_config import RUN_SECTIONS, RunConfig
from ssd_lit.config.section import Section, T, checked
from ssd_lit.config.sections import PHASE_FRACTIONS, with_phase_lengths
from ssd_lit.config.vocabulary import check_checkpoint
from ssd_lit.config.yaml_file import ConfigError, laid_over, parse_yaml, read_layers, read_yaml, shown, typed_scalars
from ssd_lit.support.files import check_checksum, with_checksum
from ssd_lit.support.shipped import CONFIGS

_NAME = re.compile(r"[\w./-]{1,200}")
"""Of an experiment; a file system takes no longer ones."""


def find_experiment(name: str) -> Path:
    """The file of an experiment: NAME of configs/NAME.yaml, here or else as shipped; any other name is a path."""
    if name.endswith((".yaml", ".yml")) or not _NAME.fullmatch(name):
        return Path(name)
    own, shipped = (folder / f"{name}.yaml" for folder in (Path("configs"), CONFIGS))
    found = next((path for path in (own, shipped) if path.is_file()), None)
    return found or (Path(name) if Path(name).exists() else own)


def load_experiment(path: Path, changes: Mapping[str, Any] | None = None) -> Experiment:
    """Read and check an experiment and all its runs; `changes` are laid over it like a file over its bases.

    Keys of the topmost layer, the changes or else the file itself, are refused where no arm can use them; what bases
    say is shared by several experiments. Raises ConfigError with the file, the key, what was given and what is allowed.
    """
    try:
        content, own = read_layers(path)
        if changes:
            own = with_new_names(dict(changes))
            content = laid_over(content, own)
        elif _is_dump(path):
            own = {}
        experiment = checked(Experiment, content)
        runs = experiment.runs()
        check_effects(experiment, runs, own)
        if experiment.downstream is not None:
            experiment.downstream.check_files()
        for folder in sorted({run.model.pretrained for run in runs if run.model.pretrained is not None}):
            check_checkpoint(Path(folder), experiment.data)
    except ConfigError as error:
        raise _in_file(path, error) from None
    return experiment


def load_resolved(path: Path) -> Experiment:
    """Read an experiment as `dump` wrote it. This and what follows raise ValueError for a file that is damaged."""
    check_checksum(path)
    try:
        experiment = checked(Experiment, with_new_names(read_yaml(path)))
        # Only what needs no other file: text and checkpoints may be gone by now, and results stand without them.
        experiment.runs()
    except ConfigError as error:
        raise _in_file(path, error) from None
    return experiment


def load_run(path: Path) -> RunConfig:
    """Read the resolved config of one run, as `dump` wrote it."""
    return _load(RunConfig, path)


def load_data(path: Path) -> DataConfig:
    """Read the data section that `dump` wrote."""
    return _load(DataConfig, path)


def load_analysis(path: Path) -> AnalysisConfig:
    """Read the analysis section that `dump` wrote."""
    return _load(AnalysisConfig, path)


def load_downstream(path: Path) -> DownstreamConfig:
    """Read the downstream section that `dump` wrote, for which all files must be there."""
    section = _load(DownstreamConfig, path)
    section.check_files()
    return section


def load_evaluation(path: Path) -> EvaluationConfig:
    """Read the evaluation section that `dump` wrote."""
    return _load(EvaluationConfig, path)


def dump(section: Section) -> str:
    """A section as YAML, every key spelled out, in a fixed order; its last line seals it."""
    # The dumper in C, where PyYAML has it, writes the same ten times as fast: an experiment may have 500 runs.
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return with_checksum(yaml.dump(section.model_dump(), Dumper=dumper, sort_keys=False, allow_unicode=True, width=110))


def parse_changes(settings: Sequence[str]) -> dict[str, Any]:
    """Settings such as `training.steps=100`, a dotted key and a value in YAML each, as one nested mapping.

    Raises ConfigError for one that is not of this form, or that is given twice.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        parts = key.split(".")
        if parts[0] == "arms" and parts[2:3] == ["grid"] and len(parts) > 3:
            # Keys of a grid are dotted themselves.
            parts = [*parts[:3], ".".join(parts[3:])]
        if not equals or not text.strip() or not all(parts):
            raise ConfigError(f"{shown(setting)}: expected KEY=VALUE, such as training.steps=100")
        try:
            value = parse_yaml(text)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None
        inner = changes
        for part in parts[:-1]:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                break
        if not isinstance(inner, dict) or parts[-1] in inner:
            raise ConfigError(f"{key}: given more than once")
        inner[parts[-1]] = value
    return changes


def read_changes(value: Any) -> dict[str, Any]:
    """Changes as Snakemake gives them: a mapping whose numbers may be strings, or YAML that holds a mapping."""
    changes = parse_yaml(value) if isinstance(value, str) else typed_scalars(value)
    if not isinstance(changes, dict):
        raise ConfigError(f"given {shown(value)}; expected a mapping such as {{training: {{steps: 100}}}}")
    return changes


def change_run(run: RunConfig, changes: Mapping[str, Any], analysis: AnalysisConfig | None) -> RunConfig:
    """A run with other settings. Raises ConfigError for those that are wrong, or that this run does not read.

    A run whose first phase is not another's any more has one of its own.
    """
    own = with_new_names(dict(changes))
    others = sorted(own.keys() - set(RUN_SECTIONS))
    if others:
        raise ConfigError(
            f"{others[0]}: not a section of a run; allowed: {', '.join(RUN_SECTIONS)} (change the rest for the whole "
            "experiment, with `ssd-lit configs`)"
        )
    told = [f"{section}.{key}" for section, keys in own.items() if isinstance(keys, Mapping) for key in keys]
    if cell := [key for key in told if key in run.grid]:
        raise ConfigError(f"{cell[0]}: tells this run from others of its grid; change the grid, with `ssd-lit configs`")
    content = laid_over(_without_own_lengths(run, own), own)
    pretrained = content["model"]["pretrained"] if isinstance(own.get("model"), Mapping) else None
    if pretrained is not None:
        # The shape is that of the checkpoint, which has to be read once more.
        content["model"] = {"pretrained": pretrained, **own["model"]}
    changed = checked(RunConfig, content)
    check_effects_in_run(changed, own, analysis)
    if pretrained is not None:
        check_checkpoint(Path(pretrained), run.data)
    if changed.shares_warmup is not None and changed.warmup() != run.warmup():
        changed = changed.model_copy(update={"shares_warmup": None})
    return changed


def _without_own_lengths(run: RunConfig, own: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings; if its steps change, or how many are sparse, without the lengths of phases that follow them."""
    content = run.model_dump()
    told = {f"{section}.{key}" for section, keys in own.items() if isinstance(keys, Mapping) for key in keys}
    if not told & {"training.steps", "switching.sparse_fraction"}:
        return content
    lengths = with_phase_lengths({"sparse_fraction": run.switching.sparse_fraction}, run.training.steps)
    for key in PHASE_FRACTIONS:
        if content["switching"][key] == lengths[key]:
            del content["switching"][key]
    return content


def _is_dump(path: Path) -> bool:
    """Whether a file is one that `dump` wrote: it spells out all keys, also those that no arm reads."""
    try:
        check_checksum(path)
    except ValueError:
        return False
    return True


def _in_file(path: Path, error: ConfigError) -> ConfigError:
    return ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines()))


def _load(kind: type[T], path: Path) -> T:
    check_checksum(path)
    try:
        return checked(kind, read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
