"""report.html: everything about an experiment in one file that needs no network."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ssd_lit.config import Experiment
from ssd_lit.report import formatting
from ssd_lit.report.arms import arms_of
from ssd_lit.report.downstream import blimp_table, glue_table
from ssd_lit.report.figures import figure_kinds
from ssd_lit.report.findings import findings
from ssd_lit.report.grid import QUANTITIES, grids, page
from ssd_lit.report.held_out_table import held_out_tables
from ssd_lit.report.names import GRID
from ssd_lit.report.origins import origins
from ssd_lit.report.router_table import HEADINGS, router_rows
from ssd_lit.report.runs import load_results
from ssd_lit.report.settings import flat, settings
from ssd_lit.report.summary import model_name, summary_row
from ssd_lit.report.token_tables import token_tables
from ssd_lit.support.files import read_json_checked, write_text


def write_report(exp_dir: Path, experiment: Experiment, data_dir: Path, provenance: Mapping[str, Any]) -> Path:
    """Write report.html from the runs' files and the figures drawn before.

    `provenance` is shown as it is: names to values, or to mappings of them.
    """
    results = load_results(exp_dir, experiment.runs())
    found = grids(experiment, results)
    figures = [
        (name, kind, inline_svg(exp_dir / "figures" / f"{name}.svg"))
        for name, kind in figure_kinds(experiment, results).items()
    ]
    html = _template().render(
        name=experiment.experiment,
        description=experiment.description,
        findings=findings(results, found),
        rows=[(result, summary_row(result)) for result in results],
        one_model=len({model_name(result.config.model) for result in results}) == 1,
        routers=router_rows(results),
        router_headings=HEADINGS,
        held_out=held_out_tables(results),
        figures=[one for one in figures if not one[0].startswith(GRID)],
        grids=list(zip(found, (one for one in figures if one[0].startswith(GRID)), strict=True)),
        quantities=QUANTITIES,
        page=page,
        tokens=token_tables(results),
        glue=glue_table(results),
        blimp=blimp_table(results),
        card=_read_card(data_dir / "documents" / "card.json"),
        data=flat(experiment.data.model_dump()),
        arms=arms_of(results),
        origins=origins(arms_of(results)),
        settings=settings(results),
        evaluation=flat(experiment.evaluation.model_dump()),
        analysis=flat(experiment.analysis.model_dump()) if experiment.analysis is not None else [],
        downstream=flat(experiment.downstream.model_dump()) if experiment.downstream is not None else [],
        provenance=flat(provenance),
    )
    path = exp_dir / "report.html"
    write_text(path, html)
    return path


def inline_svg(path: Path) -> Markup:
    """A figure's SVG for use inside HTML: no prolog, and ids that no other figure has."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; draw the figures first") from None
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{path.stem}-', text)
    text = re.sub(r'href="#', f'href="#{path.stem}-', text)
    text = text.replace("url(#", f"url(#{path.stem}-")
    return Markup(text)


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("ssd_lit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for write in (formatting.number, formatting.scaled, formatting.percent, formatting.duration):
        environment.filters[write.__name__] = write
    environment.filters["heading"] = _heading
    environment.filters["over_range"] = _over_range
    return environment.get_template("report.html")


def _heading(text: str) -> Markup:
    """A column's heading, broken behind its comma."""
    return Markup(",<br>").join(text.split(", "))


def _over_range(text: str) -> Markup:
    """A mean, and below it the range that stands in brackets behind it."""
    return Markup("<br>").join(text.split(" ", 1))


def _read_card(path: Path) -> dict[str, Any]:
    """The data card as a list of sources, its splits, and whatever else it tells."""
    card = read_json_checked(path)
    sources = [source for source in card.get("sources", []) if isinstance(source, dict)]
    rest = {key: value for key, value in card.items() if key != "sources"}
    return {"sources": sources, "rest": flat(rest)}
