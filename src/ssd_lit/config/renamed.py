"""Settings that had other names in version 0.1: they are read for one release more, with a warning."""

import logging
from typing import Any

KEYS = {
    "start_from": "parent_arm",
    "match_flops": "match_flops_of_arm",
    "sparse_share": "sparse_fraction",
    "validation_share": "validation_fraction",
    "test_share": "test_fraction",
    "min_lr_share": "min_lr_fraction",
    "decay_share": "decay_fraction",
    "warmup_share": "warmup_fraction",
    "trained_router": "posthoc_router",
}
VALUES = {
    "router": {"learned": "gate"},
    "posthoc_router": {"mass": "mass_mlp", "norm": "norm_mlp", "direction": "centers"},
    "backend": {"views": "decode_cpu", "few": "decode_gpu"},
}


def current_router(name: str) -> str:
    """The name that a router has now."""
    return {**VALUES["router"], **VALUES["posthoc_router"]}.get(name, name)


FREE = (("arms",), ("data", "held_out"))
"""Places whose keys are names that a config chooses, dotted ones of grids apart."""


def with_new_names(content: dict[str, Any]) -> dict[str, Any]:
    """Settings, at any depth, under the names that they have now; warns of every old one, once."""
    seen: dict[str, str] = {}
    renamed: dict[str, Any] = _renamed(content, seen, ())
    for old, new in seen.items():
        logging.getLogger(__name__).warning(
            "%s: called %s now; the old name will be refused in the next release", old, new
        )
    return renamed


def _renamed(value: Any, seen: dict[str, str], where: tuple[str, ...]) -> Any:
    if isinstance(value, list):
        return [_renamed(one, seen, where) for one in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for old, below in value.items():
        # Keys of a grid are dotted: moe.posthoc_router.
        section, dot, key = str(old).rpartition(".")
        new = section + dot + KEYS[key] if key in KEYS and where not in FREE else old
        if new != old:
            seen[old] = new
        found[new] = _renamed_values(KEYS.get(key, key), _renamed(below, seen, (*where, str(old))), seen)
    return found


def _renamed_values(key: str, value: Any, seen: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_renamed_values(key, one, seen) for one in value]
    known = VALUES.get(key, {})
    if not isinstance(value, str) or value not in known:
        return value
    seen[f"{key} {value}"] = known[value]
    return known[value]
