"""Sources of text: the documents of each kind of source as a stream, and its entry in the data card."""

import glob
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssd_lit.config import ConfigError, DataConfig, FilesSource, HubSource, PackageSource, Source
from ssd_lit.data.packages import PACKAGES, check_package, package_documents
from ssd_lit.data.readers import FORMATS, check_format, has_format, read_documents, read_text, text_of
from ssd_lit.support.files import sha256


def check_hub() -> None:
    """Raise ConfigError unless the library `datasets` is installed."""
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError("a huggingface source needs the extra 'hub': pip install 'ssd-lit[hub]'")


def hub_documents(source: HubSource) -> Iterator[str]:
    """The documents of a split of a data set, row by row.

    Raises ConfigError if it cannot be loaded, or has no such split or text_key.
    """
    check_hub()
    for row in _rows(source):
        yield text_of(row, source.text_key, f"data set {source.dataset!r}")


def _rows(source: HubSource) -> Any:
    """An iterable of the split's rows; of the text column alone if the columns are known in advance."""
    import datasets

    try:
        folder = Path(source.dataset)
        if (folder / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(folder)
            if source.split not in splits:
                raise ConfigError(
                    f"data set {source.dataset!r}: no split {source.split!r}; there are: {', '.join(splits)}"
                )
            rows = splits[source.split]
        elif (folder / "state.json").is_file():
            rows = datasets.load_from_disk(folder)
            if source.split not in (HubSource.model_fields["split"].default, str(rows.split)):
                raise ConfigError(f"data set {source.dataset!r}: is one saved split; leave out split {source.split!r}")
        else:
            rows = datasets.load_dataset(
                source.dataset, source.subset, split=source.split, streaming=source.streaming, revision=source.revision
            )
    except ConfigError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"data set {source.dataset!r} cannot be loaded: {reason}") from None
    known = rows.column_names or []
    column = source.text_key if source.text_key in known else source.text_key.partition(".")[0]
    return rows.select_columns([column]) if column in known else rows


def documents(source: Source) -> Iterator[str]:
    """The documents of a source, one at a time, in a fixed order. Raises ConfigError if they cannot be read."""
    match source:
        case PackageSource():
            yield from package_documents(source.name)
        case FilesSource():
            for path in files_of(source):
                yield from read_documents(path, source.text_key)
        case HubSource():
            yield from hub_documents(source)


def check_sources(data: DataConfig) -> None:
    """Raise ConfigError for sources that will fail, without reading all the text.

    For use before there are tokens; after that, the text that they were made from may be gone.
    """
    for number, source in enumerate(data.sources):
        match source:
            case PackageSource():
                check_package(source.name)
            case FilesSource():
                for pattern in source.paths:
                    if next(_matches(pattern), None) is None:
                        raise ConfigError(f"data.sources.{number}.files: no file matches {pattern!r}")
                _check_files(source)
            case HubSource():
                check_hub()
    _check_held_out(data)


def _check_held_out(data: DataConfig) -> None:
    """Read the held-out texts, and look for them among the sources."""
    sources = [source for source in data.sources if isinstance(source, FilesSource)]
    read = {path.resolve() for source in sources for path in files_of(source)} if data.held_out else set()
    for name, file in data.held_out.items():
        path = Path(file)
        if not path.is_file():
            raise ConfigError(f"data.held_out.{name}: no file {file!r}")
        if path.resolve() in read:
            raise ConfigError(
                f"data.held_out.{name}: {file} is one of the files of data.sources, and would be trained on"
            )
        try:
            text = read_text(path)
        except ConfigError as error:
            raise ConfigError(f"data.held_out.{name}: {error}") from None
        if not text.strip():
            raise ConfigError(f"data.held_out.{name}: no text in {file}")


def describe(source: Source) -> dict[str, Any]:
    """The data card's entry for a source: its settings, description and terms."""
    card = source.model_dump()
    match source:
        case PackageSource():
            package = PACKAGES[source.name]
            pinned = {"version": package.version, "sha256": package.sha256}
            return {**card, **pinned, "description": package.description, "terms": package.terms}
        case FilesSource():
            files = [describe_file(path) for path in files_of(source)]
            return {**card, "files": files, "description": "local files", "terms": "those of the files"}
        case HubSource():
            return {**card, "description": "Hugging Face data set", "terms": "those of the data set's own card"}


def describe_file(path: Path) -> dict[str, Any]:
    """The data card's entry for a local file."""
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}


def described_files(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of local files in a data card; old cards list no held-out texts."""
    return [*(file for source in card["sources"] for file in source.get("files", [])), *card.get("held_out", [])]


def is_other_text(data: DataConfig, card: Mapping[str, Any], written: int) -> bool:
    """Whether local files are new or changed since a data card was `written`, a time in ns.

    Missing files do not count: they are not needed once there are tokens. A file older than the card and of the same
    size is taken as unchanged, and not read.
    """
    entries = {file["path"]: file for file in described_files(card)}
    paths = {str(path) for source in data.sources if isinstance(source, FilesSource) for path in files_of(source)}
    paths |= {path for path in entries if Path(path).is_file()}
    return any(path not in entries or _is_changed(Path(path), entries[path], written) for path in paths)


def _is_changed(path: Path, entry: Mapping[str, Any], written: int) -> bool:
    status = path.stat()
    if status.st_size != entry["bytes"]:
        return True
    return status.st_mtime_ns >= written and sha256(path) != entry["sha256"]


def _check_files(source: FilesSource) -> None:
    """Read up to the first text, which finds empty files, a wrong text_key or a damaged first file."""
    files = files_of(source)
    if not files:
        raise ConfigError(
            f"data.sources: {', '.join(source.paths)}: no files to read; name files, as in "
            f"FOLDER/**/*.txt, or a folder that holds some ({', '.join(FORMATS)})"
        )
    for path in files:
        check_format(path)
    if not any(text.strip() for path in files for text in read_documents(path, source.text_key)):
        raise ConfigError(f"data.sources: no text in {', '.join(source.paths)}")


def files_of(source: FilesSource) -> list[Path]:
    """Every file that a pattern matches, once, sorted: the order must not depend on the file system."""
    paths = {path for pattern in source.paths for path in _matches(pattern)}
    return [path for path in map(Path, sorted(paths)) if path.is_file()]


def _matches(pattern: str) -> Iterator[str]:
    """Paths that a pattern matches. A pattern that is the path of a folder matches all files of known formats in it.

    One that is the path of a file matches it alone, whatever brackets its name has.
    """
    if os.path.isfile(pattern):  # noqa: PTH113  # Path.is_file raises an error for a name that is too long
        yield pattern
        return
    if not os.path.isdir(pattern):  # noqa: PTH112  # Path.is_dir raises an error for a name that is too long
        yield from matching_paths(pattern)
        return
    yield pattern  # an empty folder is a match, too
    yield from (path for path in matching_paths(f"{glob.escape(pattern)}/**") if has_format(Path(path)))


def matching_paths(pattern: str) -> Iterator[str]:
    """Paths that a glob pattern matches, in no order; `**` matches any folders, but no links to folders.

    The standard library's `**` follows links, and does not end where two of them lead upwards.
    """
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.iglob(pattern)  # noqa: PTH207  # Path.glob takes no absolute patterns
        return
    place = parts.index("**")
    before, after = "/".join([*parts[:place], ""]), "/".join(parts[place + 1 :])
    for root in glob.iglob(before) if before else ["."]:  # noqa: PTH207
        for folder, subfolders, _ in os.walk(root):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            yield from matching_paths(os.path.normpath(Path(glob.escape(folder), after or "*")))
