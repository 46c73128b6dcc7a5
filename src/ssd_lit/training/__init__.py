"""Training with Lightning.

Lightning takes two classes from torchmetrics, but importing that package imports every metric there is, and with them
scipy.signal and Transformers' tokenizers: a third of what it takes to start a stage. So it stands here as a package
whose contents are imported when one of them is asked for.
"""

import importlib
import importlib.util
import logging
import sys
from importlib.metadata import version
from typing import Any

TAKEN_BY_LIGHTNING = {"Metric": "torchmetrics.metric", "MetricCollection": "torchmetrics.collections"}


def _postpone_torchmetrics() -> None:
    spec = importlib.util.find_spec("torchmetrics")
    assert spec is not None
    assert spec.loader is not None
    package, loader = importlib.util.module_from_spec(spec), spec.loader

    def find(name: str) -> Any:
        if name in TAKEN_BY_LIGHTNING:
            # Before the others, which import each other: the order in which the package itself comes to them.
            importlib.import_module("torchmetrics.utilities")
            return getattr(importlib.import_module(TAKEN_BY_LIGHTNING[name]), name)
        if name.startswith("__"):
            raise AttributeError(name)
        del package.__getattr__
        loader.exec_module(package)
        return getattr(package, name)

    package.__getattr__ = find  # type: ignore[method-assign]
    package.__version__ = version("torchmetrics")  # type: ignore[attr-defined]
    package._logger = logging.getLogger("torchmetrics")  # type: ignore[attr-defined]
    sys.modules["torchmetrics"] = package


if "torchmetrics" not in sys.modules:
    _postpone_torchmetrics()
