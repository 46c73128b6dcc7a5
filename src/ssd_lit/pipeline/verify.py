"""`ssd-lit verify`: whether results are as their stages wrote them, and still match their inputs."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from ssd_lit.config import RunConfig, load_data, load_resolved, load_run
from ssd_lit.data.documents import read_split
from ssd_lit.data.index import load_index
from ssd_lit.data.sources import described_files
from ssd_lit.data.tokenizer import check_tokenizer, is_other_tokenizer
from ssd_lit.paths import data_dir, phase_dir, results_of, run_dir, snapshots
from ssd_lit.records import PhaseRecord
from ssd_lit.report.tables import check_summary
from ssd_lit.run import Run
from ssd_lit.stages import MEASUREMENTS
from ssd_lit.support.files import archive_digest, check_checksum, check_digests, read_json_checked, sha256
from ssd_lit.tracking.metrics_log import read_metrics
from ssd_lit.training.checkpoint import check_checkpoint

Check = tuple[str, Callable[[], str]]
"""A name and a function that returns a description, or raises ValueError or OSError for a mismatch."""


def verify(folder: Path, say: Callable[[str], None]) -> tuple[int, int]:
    """Verify the folder of a run or of a whole experiment, with the data; calls `say` with one line a check.

    Returns the numbers of checks and of mismatches. Raises ValueError if it is no such folder.
    """
    checks = mismatches = 0
    for name, check in _checks(folder.absolute()):
        checks += 1
        try:
            say(f"ok        {name}: {check()}")
        except (ValueError, OSError) as error:
            mismatches += 1
            say(f"MISMATCH  {name}: {error}")
    return checks, mismatches


def _checks(folder: Path) -> Iterator[Check]:
    whole = (folder / "experiment.yaml").is_file()
    exp_dir = folder if whole else folder.parent.parent
    not_a_folder = ValueError(f"{folder}: neither an experiment's folder nor that of one of its runs")
    if not (exp_dir / "experiment.yaml").is_file():
        raise not_a_folder
    experiment = load_resolved(exp_dir / "experiment.yaml")
    results = results_of(exp_dir, experiment.data)
    runs = [run for run in experiment.runs() if whole or run.name == folder.name]
    if not runs:
        raise not_a_folder
    yield from _data_checks(data_dir(results, experiment.data))
    for config in runs:
        yield from _run_checks(Run(run_dir(results, config), results, config))


def _data_checks(data: Path) -> Iterator[Check]:
    yield "data config.yaml", lambda: load_data(data / "config.yaml").name
    yield "data sources", lambda: _sources(data / "documents")
    yield "data documents", lambda: _documents(data / "documents")
    yield "data tokenizer", lambda: _tokenizer(data)
    yield "data tokens", lambda: _tokens(data / "tokens")


def _run_checks(run: Run) -> Iterator[Check]:
    name, folder = run.config.name, run.folder
    yield f"{name} config.yaml", lambda: _config(run)
    try:
        chain = run.chain()
    except ValueError as error:
        yield f"{name} phases", partial(_fail, str(error))
        return
    for record in chain:
        yield f"{name} {record.name}", partial(_phase, run, record)
    for stage in run.training_stages:
        yield f"{name} {stage}", partial(_stage, run, stage)
    if snapshots(folder):
        yield f"{name} snapshots", lambda: _snapshots(folder)
    yield f"{name} metrics.jsonl", lambda: f"{len(read_metrics(folder / 'metrics.jsonl'))} curves"
    for measurement, (settings, result) in MEASUREMENTS.items():
        if (folder / settings).is_file():
            yield f"{name} {Path(result).name}", partial(_measured, run, measurement)
    yield f"{name} summary.csv", lambda: _summary(folder.parents[1], run.config)


def _fail(why: str) -> str:
    raise ValueError(why)


def _config(run: Run) -> str:
    if load_run(run.folder / "config.yaml") != run.config:
        raise ValueError(f"{run.folder / 'config.yaml'}: differs from the experiment's settings")
    return f"{run.config.method}, seed {run.config.seed}"


def _sources(documents: Path) -> str:
    """Compares local files with their recorded digests; a package is checked by the stage that reads it."""
    files = described_files(read_json_checked(documents / "card.json"))
    if not files:
        return "no local files"
    present = [file for file in files if Path(file["path"]).is_file()]
    for file in present:
        if sha256(Path(file["path"])) != file["sha256"]:
            raise ValueError(f"{file['path']}: changed since the documents were read from it")
    return f"{len(present)} of {len(files)} local files are present, and unchanged"


def _documents(documents: Path) -> str:
    splits = read_json_checked(documents / "card.json")["splits"]
    for split, card in splits.items():
        digest = hashlib.sha256()
        for texts in read_split(documents, split):
            for text in texts:
                digest.update(hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest())
        if digest.hexdigest() != card["digest"]:
            raise ValueError(f"{documents / split}.parquet: its documents do not match card.json")
    return f"{sum(card['documents'] for card in splits.values()):,}"


def _tokenizer(data: Path) -> str:
    check_tokenizer(data / "tokenizer")
    config = load_data(data / "config.yaml").tokenizer
    if is_other_tokenizer(config, data / "tokenizer"):
        raise ValueError(f"{config.folder}: holds another tokenizer now than these tokens were made with")
    return "unchanged"


def _tokens(folder: Path) -> str:
    index = load_index(folder)
    check_digests(folder, {f"{name}.bin": split["sha256"] for name, split in index["splits"].items()})
    return str(index["digest"][:16])


def _phase(run: Run, record: PhaseRecord) -> str:
    folder = phase_dir(run.folder, record.index, record.mode)
    _compare(folder / "phase.json", record.inputs, run.made_from())
    weights = folder / "weights.ckpt"
    if weights.exists():
        check_checkpoint(weights)
    return f"steps {record.first_step} to {record.last_step}, ended by {record.ended_by}"


def _stage(run: Run, stage: str) -> str:
    record, weights = run.stage(stage), run.checkpoint(stage)
    _compare(run.folder / "stages" / f"{stage}.json", record.inputs, run.made_from())
    if not weights.exists():
        raise ValueError(f"{weights}: not found")
    check_checkpoint(weights)
    if archive_digest(weights) != record.weights:
        raise ValueError(f"{weights}: differs from the checkpoint that the stage wrote")
    return f"step {record.step}, weights {record.weights[:16]}"


def _snapshots(folder: Path) -> str:
    for _, path in snapshots(folder):
        check_checkpoint(path)
    return f"{len(snapshots(folder))} undamaged"


def _measured(run: Run, measurement: str) -> str:
    """Checks that a measurement was made from the run's current weights, tokens and settings."""
    settings, result = (run.folder / name for name in MEASUREMENTS[measurement])
    content = read_json_checked(result)
    check_checksum(settings)
    _compare(result, content.get("inputs", {}), run.measured_from(measurement))
    check_digests(result.parent, content.get("digests", {}))
    return f"of weights {run.final().weights[:16]}"


def _summary(exp_dir: Path, run: RunConfig) -> str:
    check_summary(exp_dir, [run])
    return "its row matches phases and evaluation"


def _compare(path: Path, recorded: Mapping[str, str | None], current: Mapping[str, str | None]) -> None:
    changed = [name for name, digest in current.items() if name not in recorded or recorded[name] != digest]
    if changed:
        raise ValueError(f"{path}: made from other {' and '.join(changed)} than the current ones")
