"""The model families by name; each imports its part of Transformers only when it is asked for."""

from importlib import import_module

from ssd_lit.models.family import Family


def family(name: str) -> Family:
    """The family of that name, from the module of that name."""
    found: Family = getattr(import_module(f"ssd_lit.models.{name}"), name.upper())
    return found
