"""Atomic writes of files and folders, and checksums against damage.

Our JSON and YAML files end with the SHA-256 of their own content; the digests of other files are in a checked JSON
file that is written after them.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SEAL = "sha256"
"""Key of a file's digest inside the file."""
SHARDS = "shards.json"
"""Name of the file that seals a folder of shards: their sizes and checksums."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` to write to; renames it to `path` on success, deletes it on failure.

    The data reaches the disk before the rename, so a crash leaves the old file or the new one, never a part. Raises
    OSError with the name of the file if the disk is full.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        part = Path(name)
        part.chmod(0o644)
        try:
            yield part
            with part.open("rb") as written:
                os.fsync(written.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` to fill; renames it to `path` on success, deletes it on failure.

    Raises ValueError if `path` exists and is not an empty folder.
    """
    path = path.resolve()
    check_unfilled(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    part.chmod(0o755)
    try:
        yield part
        for file in part.iterdir():
            file.chmod(0o644)
            with file.open("rb") as written:
                os.fsync(written.fileno())
        part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of the file to the OSError of a full disk, which has none."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(error.errno, f"{error.strerror}; make room and run again", str(path)) from error


def check_unfilled(path: Path) -> None:
    """Raise ValueError if `path` exists and is not an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists already; give a new folder, or remove it")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises ValueError, with its name and the remedy, for a file that is missing or cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; run the stage that writes it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it and run again") from None


def write_json_checked(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as readable JSON to `path` atomically, followed by its digest."""
    write_json(path, {**value, SEAL: _digest(value)})


def read_json_checked(path: Path) -> dict[str, Any]:
    """The content that `write_json_checked` wrote. Raises ValueError if it is missing or damaged."""
    content = read_json(path)
    if not isinstance(content, dict) or content.pop(SEAL, None) != _digest(content):
        raise ValueError(f"{path}: damaged (its checksum does not fit); delete it and run again")
    return content


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def with_checksum(text: str) -> str:
    """`text`, of a format with # comments, with a last line that holds its digest."""
    return f"{text}# {SEAL}: {hashlib.sha256(text.encode()).hexdigest()}\n"


def check_checksum(path: Path) -> None:
    """Raise ValueError if a file written `with_checksum` was changed since. A missing file is no error here."""
    if not path.is_file():
        return
    content = path.read_bytes().decode("utf-8", "replace")
    body = content[: content.rstrip("\n").rfind("\n") + 1]
    if not body or content != with_checksum(body):
        raise ValueError(f"{path}: damaged (its checksum does not fit); `ssd-lit configs` or snakemake writes it anew")


def write_if_changed(path: Path, text: str) -> None:
    """Write `text` unless `path` already holds it, to keep its modification time."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def archive_digest(path: Path) -> str:
    """A hexadecimal SHA-256 over the names, sizes and CRC-32s of the records of a zip archive, as torch.save writes it.

    Of a sealed folder of shards, the SHA-256 of its seal. Represents the whole content without reading it, which would
    take half a minute for ten gigabytes. Raises ValueError if the archive's directory is damaged.
    """
    if path.is_dir():
        return sha256(path / SHARDS)
    try:
        with zipfile.ZipFile(path) as archive:
            directory = [(record.filename, record.file_size, record.CRC) for record in archive.infolist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    return hashlib.sha256(json.dumps(directory).encode()).hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise ValueError at the first file of the folder that is missing or whose SHA-256 is not the given one."""
    for name, expected in digests.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: not found; run the stage that writes it first")
        if sha256(folder / name) != expected:
            raise ValueError(f"{folder / name}: damaged (its checksum does not fit); delete {folder} and run again")
