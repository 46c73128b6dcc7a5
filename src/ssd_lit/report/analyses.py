"""The tables that the analyses of a run left behind, read when they are asked for."""

from collections.abc import Sequence

import pandas as pd

from ssd_lit.report.runs import RunResult
from ssd_lit.support.files import check_digests, read_json_checked

RUN = ["run", "arm", "seed"]


def has_table(result: RunResult, name: str) -> bool:
    """Whether analysis/NAME.csv was written for the run."""
    return (result.folder / "analysis" / f"{name}.csv").is_file()


def read_table(result: RunResult, name: str) -> pd.DataFrame:
    """analysis/NAME.csv of a run, which it must have. Raises ValueError if it is not what the analysis wrote."""
    folder = result.folder / "analysis"
    check_digests(folder, {f"{name}.csv": read_json_checked(folder / "analysis.json")["digests"][f"{name}.csv"]})
    # A token may be called "NA", which is no missing number.
    return pd.read_csv(folder / f"{name}.csv", dtype={"token": str, "layer": str}, na_filter=False)


def joined(tables: Sequence[tuple[RunResult, pd.DataFrame]], columns: Sequence[str]) -> pd.DataFrame:
    """The tables of several runs one below the other, each row with its run, and with those columns."""
    named = [
        table.assign(run=result.name, arm=result.arm, seed=result.config.seed)[[*RUN, *columns]]
        for result, table in tables
    ]
    return pd.concat(named, ignore_index=True) if named else pd.DataFrame(columns=[*RUN, *columns])
