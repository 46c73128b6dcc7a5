"""What MLflow's chart page shows first: names that sort loss to the front, a view for it, and the link to the view.

The page makes a section of what stands before the last slash of a metric's name, and sorts sections and charts by name.
A view that somebody shares lies in a tag of the experiment, under a key that the link names; the tag holds the state of
the page as JSON. Where MLflow does not know that form, the page opens with its own order of the same names.
"""

import json
from itertools import product
from typing import Any

from ssd_lit.tracking.store import store_name

PORT = 5000
"""Where `ssd-lit ui` serves the local store, unless told otherwise."""
VIEW = "losses"
"""The key of the view, which the link names."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
BEHIND = "watch/"
"""Stands before the names of metrics that say how training went, not how well: sorted behind train and validation."""
_WATCHED = ("activation/", "analysis/", "eval/active_neurons", "experts/", "switch/", "train/")
LOSSES = ("validation/loss", "validation/perplexity")
COSTS = {"steps": None, "tokens": "train/tokens", "FLOPs": "train/flops", "seconds": "train/seconds"}
"""What a loss is drawn over: the metric that holds it, None for the step itself."""


def shown_as(name: str) -> str:
    """The name of a metric in MLflow, for its name in the run's files."""
    return BEHIND + name if name.startswith(_WATCHED) and name != "train/loss" else name


def chart_view() -> str:
    """The view: each of LOSSES over each of COSTS, all runs, then all other metrics in MLflow's order."""
    names = [loss.rpartition("/")[2].capitalize() for loss in LOSSES]
    charts = [_chart(loss, cost, name) for (name, loss), cost in product(zip(names, LOSSES, strict=True), COSTS)]
    charts.append({**_chart("train/loss", "steps", names[0]), "displayName": "training loss over steps"})
    sections = [{"uuid": name, "name": name, "display": True, "isReordered": True} for name in (*names, "eval")]
    return json.dumps(
        {
            "compareRunCharts": charts, "compareRunSections": sections,
            "isAccordionReordered": True, "runsHiddenMode": "SHOW_ALL",
        }
    )  # fmt: skip


def _chart(metric: str, cost: str, section: str) -> dict[str, Any]:
    """A line chart as the page describes it."""
    x = COSTS[cost]
    return {
        "uuid": f"{metric} over {cost}", "type": "LINE", "deleted": False, "isGenerated": False,
        "metricSectionId": section, "displayName": f"{metric.replace('/', ' ')} over {cost}",
        "metricKey": metric, "selectedMetricKeys": [metric], "runsCountToCompare": 10,
        "xAxisKey": "step" if x is None else "metric", "selectedXAxisMetricKey": "" if x is None else shown_as(x),
        "useGlobalXaxisKey": False, "useGlobalLineSmoothing": True, "lineSmoothness": 0,
        "xAxisScaleType": "linear", "scaleType": "linear", "yAxisKey": "metric", "yAxisExpressions": [],
        "range": {}, "ignoreOutliers": False,
    }  # fmt: skip


def chart_link(experiment: str, port: int = PORT) -> str:
    """The address of the charts of the experiment with that id: on the server, or as `ssd-lit ui` serves them."""
    store = store_name()
    server = store if store.startswith(("http:", "https:")) else f"http://127.0.0.1:{port}"
    page = f"#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART"
    return f"{server}/{page}&viewStateShareKey={VIEW}"
