"""YAML files of settings, which may build on others."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A mistake in a config, in words for the person who wrote it."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError, without the file's name, if there is none."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError("no such file") from None
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError("not valid YAML: " + " ".join(str(error).split())) from None
    if not isinstance(content, dict):
        raise ConfigError("expected a mapping of keys to values")
    return content


def read_with_bases(path: Path, users: Sequence[Path] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid over those of the files that its key `base` names.

    `base` is a path or a list of paths, relative to the file; later ones are laid over earlier ones. Mappings are
    merged key by key, all else is replaced. Raises ConfigError for a base that is missing or builds on itself.
    """
    content = read_yaml(path)
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"base: given {bases!r}; expected a path or a list of paths")
    merged: dict[str, Any] = {}
    for base in bases:
        file = (path.parent / base).resolve()
        if file in (path.resolve(), *users):
            raise ConfigError(f"base: {base} builds on itself")
        try:
            merged = _laid_over(merged, read_with_bases(file, (path.resolve(), *users)))
        except ConfigError as error:
            raise ConfigError(f"base: {base}: {error}") from None
    return _laid_over(merged, content)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _laid_over(below[key], above[key])
    return merged


class _Loader(yaml.SafeLoader):
    """YAML that reads 3e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: key {key!r} is given more than once")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
