"""Typed, strict settings: every key, its meaning and its default in one place.

An experiment is a YAML file under configs/: sections for data, model, optimisation and so on, then a list of
arms, each a method with its own changes to those sections; it may be laid over other files, its `base`.
`load_experiment` reads and checks one; `Experiment.runs` resolves it to one `RunConfig` for each arm and seed.
"""

from ssd_lit.config.data import DataConfig, FilesSource, HubSource, PackageSource, Source, TokenizerConfig
from ssd_lit.config.experiment import Experiment, cells
from ssd_lit.config.loading import (
    change_run,
    dump,
    find_experiment,
    load_analysis,
    load_data,
    load_downstream,
    load_evaluation,
    load_experiment,
    load_resolved,
    load_run,
    parse_changes,
    read_changes,
)
from ssd_lit.config.measurements import (
    AnalysisConfig,
    BlimpConfig,
    DownstreamConfig,
    EvaluationConfig,
    GlueConfig,
    HarnessConfig,
)
from ssd_lit.config.run_config import Arm, RunConfig
from ssd_lit.config.section import Family, Fraction, Method, Name, Positive, Section, Seed
from ssd_lit.config.sections import (
    KSchedule,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    SwitchingConfig,
    TrainingConfig,
)
from ssd_lit.config.yaml_file import ConfigError

__all__ = [
    "AnalysisConfig",
    "Arm",
    "BlimpConfig",
    "ConfigError",
    "DataConfig",
    "DownstreamConfig",
    "EvaluationConfig",
    "Experiment",
    "Family",
    "FilesSource",
    "Fraction",
    "GlueConfig",
    "HarnessConfig",
    "HubSource",
    "KSchedule",
    "Method",
    "MoEConfig",
    "ModelConfig",
    "Name",
    "OptimConfig",
    "PackageSource",
    "Positive",
    "RunConfig",
    "Section",
    "Seed",
    "Source",
    "SwitchingConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "cells",
    "change_run",
    "dump",
    "find_experiment",
    "load_analysis",
    "load_data",
    "load_downstream",
    "load_evaluation",
    "load_experiment",
    "load_resolved",
    "load_run",
    "parse_changes",
    "read_changes",
]
