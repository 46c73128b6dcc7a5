"""Typed, strict settings: every key, its meaning and its default in one place.

An experiment is a YAML file under configs/: sections for data, model, optimisation and so on, then a list of
arms, each a method with its own changes to those sections; it may be laid over other files, its `base`.
`load_experiment` reads and checks one; `Experiment.runs` resolves it to one `RunConfig` for each arm and seed.
"""

from ssd_lit.config.experiment import Experiment as Experiment
from ssd_lit.config.experiment import cells as cells
from ssd_lit.config.loading import dump as dump
from ssd_lit.config.loading import load_analysis as load_analysis
from ssd_lit.config.loading import load_data as load_data
from ssd_lit.config.loading import load_downstream as load_downstream
from ssd_lit.config.loading import load_evaluation as load_evaluation
from ssd_lit.config.loading import load_experiment as load_experiment
from ssd_lit.config.loading import load_resolved as load_resolved
from ssd_lit.config.loading import load_run as load_run
from ssd_lit.config.run_config import Arm as Arm
from ssd_lit.config.run_config import RunConfig as RunConfig
from ssd_lit.config.sections import (
    AnalysisConfig as AnalysisConfig,
)
from ssd_lit.config.sections import (
    BlimpConfig as BlimpConfig,
)
from ssd_lit.config.sections import (
    Construction as Construction,
)
from ssd_lit.config.sections import (
    DataConfig as DataConfig,
)
from ssd_lit.config.sections import (
    DownstreamConfig as DownstreamConfig,
)
from ssd_lit.config.sections import (
    EvaluationConfig as EvaluationConfig,
)
from ssd_lit.config.sections import (
    Family as Family,
)
from ssd_lit.config.sections import (
    FilesSource as FilesSource,
)
from ssd_lit.config.sections import (
    GlueConfig as GlueConfig,
)
from ssd_lit.config.sections import (
    HubSource as HubSource,
)
from ssd_lit.config.sections import (
    KSchedule as KSchedule,
)
from ssd_lit.config.sections import (
    Method as Method,
)
from ssd_lit.config.sections import (
    ModelConfig as ModelConfig,
)
from ssd_lit.config.sections import (
    MoEConfig as MoEConfig,
)
from ssd_lit.config.sections import (
    Name as Name,
)
from ssd_lit.config.sections import (
    OptimConfig as OptimConfig,
)
from ssd_lit.config.sections import (
    PackageSource as PackageSource,
)
from ssd_lit.config.sections import (
    Positive as Positive,
)
from ssd_lit.config.sections import (
    Section as Section,
)
from ssd_lit.config.sections import (
    Seed as Seed,
)
from ssd_lit.config.sections import (
    Share as Share,
)
from ssd_lit.config.sections import (
    Source as Source,
)
from ssd_lit.config.sections import (
    SwitchingConfig as SwitchingConfig,
)
from ssd_lit.config.sections import (
    TokenizerConfig as TokenizerConfig,
)
from ssd_lit.config.sections import (
    TrainedRouter as TrainedRouter,
)
from ssd_lit.config.sections import (
    TrainingConfig as TrainingConfig,
)
from ssd_lit.config.yaml_file import ConfigError as ConfigError
