"""Files that appear whole or not at all, and that tell whether they still are what was written.

JSON and YAML of ours end with the SHA-256 of their own content; files of another format get a digest in a sealed JSON
that is written behind them.
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
"""Names the digest of a file inside itself."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; on success it becomes `path` by rename, on failure it goes.

    The data reaches the disk before the rename, so a crash leaves the old file or the new one, never a part. Raises
    OSError with the name of the file where the disk takes no more.
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
    """Yield a folder beside `path` to fill with files; on success it becomes `path` by rename, on failure it goes.

    Raises ValueError if there is more at `path` than an empty folder.
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


def same_file(source: Path, path: Path) -> None:
    """Make `path` a second name of `source`, whole or not at all; a copy where the disk knows no second names.

    For files that are never written to again, only replaced.
    """
    with whole_file(path) as part:
        part.unlink()
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk names no file by itself: say which one could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(error.errno, f"{error.strerror}; make room and run again", str(path)) from error


def check_unfilled(path: Path) -> None:
    """Raise ValueError if there is more at `path` than an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists already; give a new folder, or remove it")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a file that is missing or cut short raises ValueError with its name and the remedy."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; run the stage that writes it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it and run again") from None


def write_json_checked(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as readable JSON to `path`, whole or not at all, with the digest of all of it behind it."""
    write_json(path, {**value, SEAL: _digest(value)})


def read_json_checked(path: Path) -> dict[str, Any]:
    """The content that `write_json_checked` wrote. Raises ValueError if it is missing, or is not what was written."""
    content = read_json(path)
    if not isinstance(content, dict) or content.pop(SEAL, None) != _digest(content):
        raise ValueError(f"{path}: damaged (its checksum does not fit); delete it and run again")
    return content


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def with_checksum(text: str) -> str:
    """Lines of a format whose comments begin with #, and a last one that holds the digest of those before it."""
    return f"{text}# {SEAL}: {hashlib.sha256(text.encode()).hexdigest()}\n"


def check_checksum(path: Path) -> None:
    """Raise ValueError if a file written `with_checksum` was changed since; a missing one is for others to tell."""
    if not path.is_file():
        return
    content = path.read_bytes().decode("utf-8", "replace")
    body = content[: content.rstrip("\n").rfind("\n") + 1]
    if not body or content != with_checksum(body):
        raise ValueError(f"{path}: damaged (its checksum does not fit); `ssd-lit configs` or snakemake writes it anew")


def write_if_changed(path: Path, text: str) -> bool:
    """Write `text` unless `path` already holds it, so its modification time tells of real changes only."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write_text(path, text)
    return True


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def archive_digest(path: Path) -> str:
    """A hexadecimal SHA-256 over the names, sizes and CRC-32s of a zip archive's records, as torch.save writes it.

    It stands for the whole content, and costs no reading of it: ten gigabytes would take half a minute.
    Raises ValueError if the archive's directory is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            directory = [(record.filename, record.file_size, record.CRC) for record in archive.infolist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    return hashlib.sha256(json.dumps(directory).encode()).hexdigest()


def check_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise ValueError, with its name, at the first file of the folder whose SHA-256 is not the given one."""
    for name, expected in digests.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: not found; run the stage that writes it first")
        if sha256(folder / name) != expected:
            raise ValueError(f"{folder / name}: damaged (its checksum does not fit); delete {folder} and run again")
