"""Where text comes from: every kind of source as a stream of documents, and what there is to say about it."""

import glob
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssd_lit.config import ConfigError, DataConfig, FilesSource, HubSource, PackageSource, Source
from ssd_lit.data.packages import PACKAGES, check_package, package_documents
from ssd_lit.data.readers import FORMATS, check_format, has_format, read_documents, text_of
from ssd_lit.support.files import sha256


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


def documents(source: Source) -> Iterator[str]:
    """The documents of a source, one at a time, in a fixed order. Raises ConfigError if they cannot be read."""
    match source:
        case PackageSource():
            yield from package_documents(source.name)
        case FilesSource():
            for path in _files(source):
                yield from read_documents(path, source.text_key)
        case HubSource():
            yield from hub_documents(source)


def check_sources(data: DataConfig) -> None:
    """Raise ConfigError for what can be known to fail without reading all the text: before any work begins.

    Asked while there are no tokens yet; once there are, the text they were made from need not be there.
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
    folder = data.tokenizer.folder
    if folder is not None and not (Path(folder) / "tokenizer.json").is_file():
        raise ConfigError(f"data.tokenizer: no tokenizer.json in folder {folder!r}")
    for name, path in data.held_out.items():
        if not Path(path).is_file():
            raise ConfigError(f"data.held_out.{name}: no file {path!r}")


def describe(source: Source) -> dict[str, Any]:
    """What the data card says about a source: its settings, what the text is, and under what terms."""
    card = source.model_dump()
    match source:
        case PackageSource():
            package = PACKAGES[source.name]
            told = {"version": package.version, "sha256": package.sha256}
            return {**card, **told, "description": package.description, "terms": package.terms}
        case FilesSource():
            files = [describe_file(path) for path in _files(source)]
            return {**card, "files": files, "description": "local files", "terms": "those of the files"}
        case HubSource():
            return {**card, "description": "Hugging Face data set", "terms": "those of the data set's own card"}


def describe_file(path: Path) -> dict[str, Any]:
    """What the data card says about a local file."""
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}


def described_files(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The local files that a data card tells of; one written before it told of held-out texts has none of those."""
    return [*(file for source in card["sources"] for file in source.get("files", [])), *card.get("held_out", [])]


def is_other_text(data: DataConfig, card: Mapping[str, Any], written: int) -> bool:
    """Whether there is local text that a data card, `written` at that time, does not tell of: changed or new files.

    Files that are gone do not count: nothing needs them once there are tokens. A file older than the card is taken for
    what it was if it is as large, and not read.
    """
    told = {file["path"]: file for file in described_files(card)}
    here = {str(path) for source in data.sources if isinstance(source, FilesSource) for path in _files(source)}
    here |= {path for path in told if Path(path).is_file()}
    return any(path not in told or _is_changed(Path(path), told[path], written) for path in here)


def _is_changed(path: Path, told: Mapping[str, Any], written: int) -> bool:
    now = path.stat()
    if now.st_size != told["bytes"]:
        return True
    return now.st_mtime_ns >= written and sha256(path) != told["sha256"]


def _check_files(source: FilesSource) -> None:
    """Read up to the first text: empty files, a wrong text_key or a damaged first file show there."""
    files = _files(source)
    if not files:
        raise ConfigError(
            f"data.sources: {', '.join(source.paths)}: nothing there is a file to read; name files, as in "
            f"FOLDER/**/*.txt, or a folder that holds some ({', '.join(FORMATS)})"
        )
    for path in files:
        check_format(path)
    if not any(text.strip() for path in files for text in read_documents(path, source.text_key)):
        raise ConfigError(f"data.sources: no text in {', '.join(source.paths)}")


def _files(source: FilesSource) -> list[Path]:
    """Every file that a pattern matches, once, by name: the order must not depend on the file system."""
    found = {path for pattern in source.paths for path in _matches(pattern)}
    return [path for path in map(Path, sorted(found)) if path.is_file()]


def _matches(pattern: str) -> Iterator[str]:
    """What a pattern matches. A folder that it names, rather than matches, stands for all in it that we can read."""
    if not os.path.isdir(pattern):  # noqa: PTH112  # Path.is_dir raises an error for a name that is too long
        yield from matching_paths(pattern)
        return
    yield pattern  # an empty folder is there, too
    yield from (path for path in matching_paths(f"{glob.escape(pattern)}/**") if has_format(Path(path)))


def matching_paths(pattern: str) -> Iterator[str]:
    """What a glob pattern matches, in no order; `**` stands for any folders, without following links to them.

    The standard library's own `**` follows links: two of them that lead upwards would keep it busy for ever.
    """
    before, stars, behind = _parted(pattern)
    if not stars:
        yield from glob.iglob(pattern)  # noqa: PTH207  # Path.glob takes no absolute patterns
        return
    for root in glob.iglob(before) if before else ["."]:  # noqa: PTH207
        for folder, inside, _ in os.walk(root):
            inside[:] = [name for name in inside if not name.startswith(".")]
            yield from matching_paths(os.path.normpath(Path(glob.escape(folder), behind or "*")))


def _parted(pattern: str) -> tuple[str, str, str]:
    """What stands before the first part `**` of a pattern, that part, and what stands behind it."""
    parts = pattern.split("/")
    if "**" not in parts:
        return pattern, "", ""
    place = parts.index("**")
    return "/".join([*parts[:place], ""]), "**", "/".join(parts[place + 1 :])
