"""Documents from Hugging Face data sets, by name or saved on disk. The only file that knows `datasets`."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssd_lit.config import ConfigError, HubSource
from ssd_lit.data.readers import text_of


def check_hub() -> None:
    """Raise ConfigError unless the library `datasets` is installed."""
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("a huggingface source needs the extra 'hub': pip install 'ssd-lit[hub]'")


def hub_documents(source: HubSource) -> Iterator[str]:
    """The documents of a data set's split, read row by row.

    Raises ConfigError if it cannot be had, or has no such split or text_key.
    """
    check_hub()
    for row in _rows(source):
        yield text_of(row, source.text_key, f"data set {source.dataset!r}")


def _rows(source: HubSource) -> Any:
    """An iterable of the split's rows, of the text column alone where the columns are known beforehand."""
    import datasets

    try:
        folder = Path(source.dataset)
        if (folder / "dataset_dict.json").is_file():
            rows = _split(datasets.load_from_disk(folder), source)
        elif (folder / "state.json").is_file():
            rows = datasets.load_from_disk(folder)
        else:
            rows = datasets.load_dataset(
                source.dataset,
                source.subset,
                split=source.split,
                streaming=source.streaming,
                revision=source.revision,
            )
    except ConfigError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"data set {source.dataset!r} cannot be loaded: {reason}") from None
    known = rows.column_names or []
    column = source.text_key if source.text_key in known else source.text_key.partition(".")[0]
    return rows.select_columns([column]) if column in known else rows


def _split(found: Any, source: HubSource) -> Any:
    if source.split not in found:
        raise ConfigError(f"data set {source.dataset!r}: no split {source.split!r}; there are: {', '.join(found)}")
    return found[source.split]
