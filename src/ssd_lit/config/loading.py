"""Settings read from files and written to them."""

from collections.abc import Callable
from pathlib import Path

import yaml

from ssd_lit.config.checking import checked
from ssd_lit.config.experiment import Experiment
from ssd_lit.config.pretrained import embedded_tokens, tokens_of
from ssd_lit.config.renamed import with_new_names
from ssd_lit.config.run_config import RunConfig
from ssd_lit.config.sections import (
    AnalysisConfig,
    DataConfig,
    DownstreamConfig,
    EvaluationConfig,
    Section,
    T,
    TokenizerConfig,
)
from ssd_lit.config.yaml_file import ConfigError, read_with_bases, read_yaml
from ssd_lit.support.files import check_checksum, with_checksum


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment and all its runs.

    Raises ConfigError with the file, the key, what was given and what is allowed.
    """
    return _experiment(path, _check_vocabularies)


def _experiment(path: Path, check: Callable[[Experiment], object]) -> Experiment:
    try:
        experiment = checked(Experiment, with_new_names(read_with_bases(path)))
        check(experiment)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return experiment


def _check_vocabularies(experiment: Experiment) -> None:
    for folder in sorted({run.model.pretrained for run in experiment.runs() if run.model.pretrained is not None}):
        _check_vocabulary(Path(folder), experiment.data.tokenizer)


def _check_vocabulary(checkpoint: Path, tokenizer: TokenizerConfig) -> None:
    """Raise ConfigError if the embeddings of a checkpoint cannot be those of the tokens of the data."""
    if tokenizer.folder is None:
        raise ConfigError(
            f"model.pretrained {checkpoint}: its embeddings are of its own tokenizer's tokens, not of one that is "
            f"trained here; give its own as data.tokenizer.folder, such as {checkpoint}"
        )
    try:
        tokens, rows = tokens_of(Path(tokenizer.folder)), embedded_tokens(checkpoint)
    except ValueError as error:
        raise ConfigError(f"data.tokenizer.folder: {error}") from None
    if tokens > rows:
        raise ConfigError(
            f"data.tokenizer.folder {tokenizer.folder}: has {tokens} tokens, but the checkpoint in {checkpoint} "
            f"(model.pretrained) embeds {rows}; give its own tokenizer"
        )


def load_resolved(path: Path) -> Experiment:
    """Read an experiment as `dump` wrote it. This and what follows raise ValueError for a file that is damaged."""
    check_checksum(path)
    # What was checked then may be gone by now: results stand without it.
    return _experiment(path, Experiment.runs)


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
    """Read the downstream section that `dump` wrote."""
    return _load(DownstreamConfig, path)


def load_evaluation(path: Path) -> EvaluationConfig:
    """Read the evaluation section that `dump` wrote."""
    return _load(EvaluationConfig, path)


def dump(section: Section) -> str:
    """A section as YAML, every key spelled out, in a fixed order; its last line seals it."""
    # The dumper in C, where PyYAML has it, writes the same ten times as fast: an experiment may have 500 runs.
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return with_checksum(yaml.dump(section.model_dump(), Dumper=dumper, sort_keys=False, allow_unicode=True, width=110))


def _load(kind: type[T], path: Path) -> T:
    check_checksum(path)
    try:
        return checked(kind, read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
