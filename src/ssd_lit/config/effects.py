"""Which settings a run reads: one that nothing reads is refused where it is given, and decides no weights."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ssd_lit.config.experiment import Experiment, cells
from ssd_lit.config.measurements import AnalysisConfig
from ssd_lit.config.run_config import RUN_SECTIONS, RunConfig
from ssd_lit.config.section import Section
from ssd_lit.config.sections import KEEPING, PLACEMENT, MoEConfig, OptimConfig, SwitchingConfig, TrainingConfig
from ssd_lit.config.yaml_file import ConfigError
from ssd_lit.moe.names import NEEDS_ACTIVATIONS

OF_EVERY_STAGE = ("devices", "nodes", "threads", "deterministic")
OF_BATCHES = ("batch_size", "log_every", "precision")
"""Keys of the section training that routers are trained by too."""
NO_DROPOUT = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose fresh models drop nothing."""


class Rule(NamedTuple):
    """Keys, when a run reads them, and why it does not otherwise."""

    keys: tuple[str, ...]
    is_read: Callable[[RunConfig, AnalysisConfig | None], bool]
    why: str


def _all_of(kind: type[Section], name: str, *others: str) -> tuple[str, ...]:
    """The keys of a section but for some others."""
    return tuple(f"{name}.{key}" for key in kind.model_fields if key not in others)


def _trains(run: RunConfig, _: AnalysisConfig | None) -> bool:
    return run.method != "posthoc"


def _takes_batches(run: RunConfig, _: AnalysisConfig | None) -> bool:
    return run.method != "posthoc" or run.moe.posthoc_router is not None


def _calibrates(run: RunConfig, analysis: AnalysisConfig | None) -> bool:
    grouped = run.method not in ("dense", "upcycle") and run.moe.construction in NEEDS_ACTIVATIONS
    compared = analysis.constructions if analysis is not None and run.training.snapshot_every is not None else []
    return grouped or any(name in NEEDS_ACTIVATIONS for name in compared)


RULES = (
    Rule(
        ("model.dropout",),
        lambda run, _: run.model.family not in NO_DROPOUT,
        f"models of families {', '.join(NO_DROPOUT)} have no dropout",
    ),
    Rule(
        ("model.dropout",),
        lambda run, _: run.model.pretrained is None,
        "model.pretrained takes the dropout that the checkpoint's config.json says",
    ),
    Rule(
        # In how many clusters the pattern is compared while it trains is told by moe.experts for dense arms too.
        _all_of(MoEConfig, "moe", "experts", "calibration_blocks"),
        lambda run, _: run.method != "dense",
        "models of method dense have no experts",
    ),
    Rule(
        ("moe.construction",),
        lambda run, _: run.method != "upcycle",
        "experts of method upcycle are copies of whole FFNs; nothing is grouped",
    ),
    Rule(
        ("moe.calibration_blocks",),
        _calibrates,
        f"activations are taken for moe.construction {' and '.join(NEEDS_ACTIVATIONS)} only",
    ),
    Rule(
        ("moe.k_schedule",),
        lambda run, _: run.method not in ("dense", "posthoc"),
        "there is no sparse phase in which k could change",
    ),
    Rule(
        ("moe.k_schedule.start",),
        lambda run, _: run.moe.k_schedule.kind != "constant",
        "a k_schedule of kind constant does not change k",
    ),
    Rule(
        ("moe.k_schedule.stairs",),
        lambda run, _: run.moe.k_schedule.kind == "step",
        "only a k_schedule of kind step has stairs",
    ),
    Rule(
        ("moe.router",),
        lambda run, _: run.method != "posthoc" or run.moe.posthoc_router is None,
        "moe.posthoc_router chooses instead, and there is no phase before it is trained",
    ),
    Rule(
        ("moe.balance_weight", "moe.z_weight"),
        lambda run, _: run.moe.router == "gate",
        "only moe.router gate has these losses",
    ),
    Rule(
        ("moe.router_steps", "moe.router_lr"),
        lambda run, _: run.moe.posthoc_router is not None,
        "only a moe.posthoc_router is trained behind the model",
    ),
    Rule(
        ("moe.router_hidden",),
        lambda run, _: run.moe.posthoc_router in ("mass_mlp", "norm_mlp"),
        "only moe.posthoc_router mass_mlp and norm_mlp have an MLP",
    ),
    Rule(
        ("moe.permute_optimizer",),
        lambda run, _: run.method == "ssd",
        "only in method ssd neurons move that an optimizer has moments of",
    ),
    Rule(
        # optim.warmup_steps is checked against training.steps for every method.
        _all_of(OptimConfig, "optim", "warmup_steps"),
        _trains,
        "method posthoc trains nothing but a router, which has moe.router_lr",
    ),
    Rule(("optim.decay_fraction",), lambda run, _: run.optim.schedule == "wsd", "only optim.schedule wsd has a decay"),
    Rule(
        _all_of(TrainingConfig, "training", *OF_BATCHES, *OF_EVERY_STAGE, "workers"),
        _trains,
        "method posthoc takes no training step",
    ),
    Rule(
        tuple(f"training.{key}" for key in OF_BATCHES),
        _takes_batches,
        "method posthoc without moe.posthoc_router trains nothing",
    ),
    Rule(
        ("training.steps",),
        lambda run, _: run.match_flops_of_arm is None,
        "match_flops_of_arm says how many steps there are",
    ),
    Rule(
        ("training.non_finite_limit",),
        lambda run, _: run.training.non_finite == "skip",
        "only training.non_finite skip goes on to a limit",
    ),
    Rule(
        _all_of(SwitchingConfig, "switching", "check_every"),
        lambda run, _: run.method == "ssd",
        "only method ssd switches phases",
    ),
    Rule(
        ("switching.check_every",),
        lambda run, _: run.method in ("dense", "ssd"),
        "only dense phases are checked, of methods dense and ssd",
    ),
    Rule(
        _all_of(SwitchingConfig, "switching", "check_every", "switch_points", "final_sparse_every"),
        lambda run, _: run.switching.switch_points is None,
        "switching.switch_points says when the mode changes",
    ),
    Rule(
        ("data.tokenizer.vocab_size", "data.tokenizer.train_megabytes"),
        lambda run, _: run.data.tokenizer.folder is None,
        "the tokenizer of data.tokenizer.folder is not trained",
    ),
    Rule(
        ("evaluation.top_k_curve", "analysis.blocks", "analysis.tokens"),
        lambda run, _: run.method != "dense",
        "models of method dense have no experts",
    ),
    Rule(
        ("evaluation.thresholds",),
        lambda run, _: run.moe.posthoc_router is not None,
        "only a moe.posthoc_router predicts what thresholds are of",
    ),
    Rule(
        ("downstream.glue",),
        lambda run, _: run.model.family == "bert",
        "only models of family bert are fine-tuned",
    ),
    Rule(
        ("downstream.blimp", "downstream.harness"),
        lambda run, _: run.model.family not in ("bert", "t5"),
        "only models that predict the next token score sentences",
    ),
    Rule(
        ("analysis.experts", "analysis.constructions"),
        lambda run, _: run.training.snapshot_every is not None and run.method != "upcycle",
        "there are no snapshots to compare without training.snapshot_every",
    ),
)

_ALWAYS_GIVEN = frozenset(
    f"training.{key}" for key, field in TrainingConfig.model_fields.items() if field.is_required()
)
"""Keys without a default: an experiment must have them, whatever its methods."""


def check_effects(experiment: Experiment, runs: Sequence[RunConfig], given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key among the settings `given` of an experiment that no run can use.

    `runs` are all of the experiment. A section of the experiment is shared by its arms, so its keys must be read by a
    run of any arm; those of an arm or of its grid by a run of that arm.
    """
    runs = [run for run in runs if run.seed == experiment.seeds[0]]
    for path, value in _leaves(given):
        if path[0] != "arms":
            if ".".join(path) not in _ALWAYS_GIVEN:
                _check(".".join(path), path, runs, experiment.analysis)
        elif len(path) > 3 and path[1] in experiment.arms:
            names = cells(path[1], experiment.arms[path[1]])
            for key in _keys_of_arm(path[2:], value):
                _check(key, path, [run for run in runs if run.arm in names], experiment.analysis)


def check_effects_in_run(run: RunConfig, given: Mapping[str, Any], analysis: AnalysisConfig | None) -> None:
    """Raise ConfigError for a key among the settings `given` of a run that it does not read."""
    for path, _ in _leaves(given):
        _check(".".join(path), path, [run], analysis)


def digest_of(run: RunConfig) -> str:
    """SHA-256 of all settings that decide a run's weights and curves, but for rounding.

    Not of what it does not read, of its name in figures, of which run trains a first phase that several have, of how
    its work is spread, or of how often it is saved. What is null leaves no trace: results stand when there is a new
    setting that is off.
    """
    unread = {key for rule in RULES if not rule.is_read(run, None) for key in rule.keys}
    left_out = {"label", "shares_warmup", *unread, *(f"training.{key}" for key in (*PLACEMENT, *KEEPING))}
    read = {
        ".".join(path): value
        for path, value in _leaves(run.model_dump(mode="json", exclude_none=True))
        if not any(".".join(path[: i + 1]) in left_out for i in range(len(path)))
    }
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def _check(key: str, path: tuple[str, ...], runs: Sequence[RunConfig], analysis: AnalysisConfig | None) -> None:
    rules = [rule for rule in RULES if any(f"{key}.".startswith(f"{one}.") for one in rule.keys)]
    broken = [[rule.why for rule in rules if not rule.is_read(run, analysis)] for run in runs]
    if broken and all(broken):
        # Of the run that is nearest to reading it.
        raise ConfigError(f"{'.'.join(path)}: has no effect here: {min(broken, key=len)[0]}")


def _keys_of_arm(path: tuple[str, ...], value: Any) -> list[str]:
    """The settings that a key of an arm changes: one, or of a grid over a section those of its mappings."""
    if path[0] != "grid":
        return [".".join(path)]
    if path[1] in RUN_SECTIONS and isinstance(value, list):
        return list(dict.fromkeys(f"{path[1]}.{key}" for change in value for key in change))
    return [".".join(path[1:])]


def _leaves(content: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The way to each value that is no mapping, and the value."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*above, str(key)))
        else:
            yield (*above, str(key)), value
