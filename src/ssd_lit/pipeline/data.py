"""The stages that make tokens of text, once for all runs of an experiment."""

import os
from collections.abc import Sequence
from pathlib import Path

from ssd_lit.config import Experiment, find_experiment, load_data, load_experiment, parse_changes
from ssd_lit.paths import data_dir, write_configs
from ssd_lit.support.files import write_text
from ssd_lit.support.locks import exclusive


def configs(experiment: str, results: Path, settings: Sequence[str] = ()) -> str:
    """Check an experiment, changed by settings such as training.steps=100, and write its resolved configs."""
    from ssd_lit.data.benchmarks import check_downstream

    checked = load_experiment(find_experiment(experiment), parse_changes(settings))
    if not (data_dir(results, checked.data) / "tokens" / "index.json").exists():
        check_data(checked)
    if checked.downstream is not None:
        check_downstream(checked.downstream)
    runs = write_configs(checked, results)
    return f"{len(runs)} runs: {', '.join(run.name for run in runs)}"


def check_data(experiment: Experiment) -> None:
    """Raise ConfigError for texts or a tokenizer that will fail. For use before there are tokens."""
    from ssd_lit.data.sources import check_sources
    from ssd_lit.data.tokenizer import check_given

    check_sources(experiment.data)
    if experiment.data.tokenizer.folder is not None:
        families = {config.model.family for config in experiment.runs()}
        check_given(Path(experiment.data.tokenizer.folder), families, experiment.data.spans)


def schema(out: Path, page: Path) -> str:
    """Write the JSON schema of an experiment's YAML, and the reference page of its settings."""
    from ssd_lit.config.schema import reference_page, schema_text

    write_text(out, schema_text())
    write_text(page, reference_page())
    return f"{out}, {page}"


def prepare(folder: Path) -> str:
    """Read, clean, deduplicate and split the text into documents/."""
    from ssd_lit.data.documents import prepare_documents

    with exclusive(folder, "prepare"):
        card = prepare_documents(load_data(folder / "config.yaml"), folder / "documents", print)
    return ", ".join(f"{name} {split['documents']:,} documents" for name, split in card["splits"].items())


def tokenizer(folder: Path) -> str:
    """Train the tokenizer on the training documents into tokenizer/."""
    from ssd_lit.data.tokenizer import load_tokenizer, train_tokenizer

    config = load_data(folder / "config.yaml").tokenizer
    with exclusive(folder, "tokenizer"):
        train_tokenizer(config, folder / "documents", folder / "tokenizer")
    return f"{load_tokenizer(folder / 'tokenizer').get_vocab_size():,} entries"


def encode(folder: Path, threads: int | None) -> str:
    """Encode all documents into memory-mapped blocks of tokens in tokens/, in as many processes; one for each core."""
    from ssd_lit.data.encode import encode_documents

    config = load_data(folder / "config.yaml")
    with exclusive(folder, "encode"):
        index = encode_documents(
            folder / "documents",
            folder / "tokenizer",
            folder / "tokens",
            config.sequence_length,
            print,
            held_out=config.held_out,
            processes=threads or os.cpu_count() or 1,
        )
    return ", ".join(f"{name} {split['tokens']:,} tokens" for name, split in index["splits"].items())
