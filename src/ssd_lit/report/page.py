"""report.html: everything about an experiment in one file that needs no network."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ssd_lit.config import Experiment
from ssd_lit.report import formatting
from ssd_lit.report.arms import Arm, arms_of
from ssd_lit.report.charts import chart_data, chart_library
from ssd_lit.report.comparison import comparison
from ssd_lit.report.downstream import blimp_table, glue_table, harness_table
from ssd_lit.report.figures import GRID, FigureKind, figures_of
from ssd_lit.report.grid import QUANTITIES, Grid, grids, page
from ssd_lit.report.results import load_results, run_frame
from ssd_lit.report.settings import flat, settings
from ssd_lit.report.tables import ROUTER_COLUMNS, HeldOutTable, held_out_tables, router_rows, sample_texts, token_tables
from ssd_lit.support.files import read_json_checked, write_text

PAPERS = {
    "ssd": ("Switchable Sparse-Dense Learning", "2410.03440"),
    "posthoc": ("MoEfication", "2110.01786"),
    "upcycle": ("sparse upcycling", "2212.05055"),
    "gate": ("a trained gate with balance and z-loss", "1701.06538, 2101.03961, 2202.08906"),
    "random": ("SMoE-Dropout", "2303.01610"),
    "mass_mlp": ("an MLP that predicts activation mass", "2110.01786, 2310.17157"),
    "norm_mlp": ("an MLP that predicts output norms (D2DMoE)", "2310.04361"),
}
"""What a method or router is called, and its papers' numbers on arXiv."""
COACTIVATION = ("experts by co-activation", "2110.01786")


def write_report(
    exp_dir: Path, experiment: Experiment, data_dir: Path, provenance: Mapping[str, Any], view: str | None = None
) -> Path:
    """Write report.html from the runs' files and the figures drawn before.

    `provenance` is shown as it is: names to values, or to mappings of them. `view` is a link to MLflow's charts.
    """
    results = load_results(exp_dir, experiment.runs())
    arms, frame = arms_of(results), run_frame(results)
    compared = comparison(arms)
    live, figures = _figures(exp_dir, experiment)
    of_grids = [figure for figure in figures if figure[0].startswith(GRID)]
    html = _template().render(
        name=experiment.experiment,
        description=experiment.description,
        comparison=compared,
        live=live,
        charts=chart_data(results),
        scripts=[Markup(chart_library()), *(Markup(_packaged(name)) for name in ("charts.js", "page.js"))],
        samples=sample_texts([row.arm for row in compared.rows]),
        figures=[figure for figure in figures if figure not in of_grids],
        routers=[_router(arm, cells) for arm, cells in router_rows(arms)],
        router_headings=[heading for heading, *_ in ROUTER_COLUMNS],
        held_out=[_held_out(table) for table in held_out_tables(arms)],
        tokens=token_tables(results),
        glue=glue_table(results),
        blimp=blimp_table(results),
        harness=harness_table(results),
        grids=[(_grid(grid), figure) for grid, figure in zip(grids(experiment, results), of_grids, strict=True)],
        rows=list(zip(results, frame.to_dict("records"), strict=True)),
        one_model=frame["model"].nunique() == 1,
        arms=arms,
        papers=_papers(arms),
        settings=settings(results),
        evaluation=flat(experiment.evaluation.model_dump()),
        analysis=flat(experiment.analysis.model_dump()) if experiment.analysis is not None else [],
        downstream=flat(experiment.downstream.model_dump()) if experiment.downstream is not None else [],
        card=_read_card(data_dir / "documents" / "card.json"),
        data=flat(experiment.data.model_dump()),
        provenance=flat(provenance),
        view=view,
    )
    path = exp_dir / "report.html"
    write_text(path, html)
    return path


Figure = tuple[str, FigureKind]


def _figures(
    exp_dir: Path, experiment: Experiment
) -> tuple[dict[str, list[Figure]], list[tuple[str, FigureKind, Markup]]]:
    """The figures that live charts stand for, by chart; and the others with their SVG."""
    live: dict[str, list[Figure]] = {}
    others = []
    for name, kind in figures_of(experiment).items():
        svg = inline_svg(exp_dir / "figures" / f"{name}.svg")
        if kind.chart is None:
            others.append((name, kind, svg))
        else:
            live.setdefault(kind.chart, []).append((name, kind))
    return live, others


def _packaged(name: str) -> str:
    return (resources.files("ssd_lit.report") / name).read_text(encoding="utf-8")


def _router(arm: Arm, cells: list[str]) -> tuple[str, Any]:
    texts = arm.runs[0].evaluation.router, f"{arm.config.moe.top_k} of {arm.config.moe.experts}"
    return arm.label, [(texts, cells)]


def _held_out(table: HeldOutTable) -> dict[str, Any]:
    return {
        "name": table.name,
        "blocks": table.blocks,
        "headings": ["dense mode", *(f"k = {k}" for k in table.ks)],
        "groups": [(arm.label, [((), cells)]) for arm, cells in table.rows],
    }


def _grid(grid: Grid) -> dict[str, Any]:
    """The table of a grid; the dense arm by its label, cells by their names."""
    rows = [(arm.label if arm is grid.reference else arm.name, arm, values, cells) for arm, values, cells in page(grid)]
    return {
        "texts": grid.keys,
        "headings": [quantity.title for quantity in QUANTITIES],
        "groups": [(name, [(values, cells)]) for name, _, values, cells in rows],
        "links": {name: f"#run-{arm.runs[0].name}" for name, arm, *_ in rows},
    }


def _papers(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    """Names and arXiv numbers of what the arms use."""
    used, grouped = set(), False
    for arm in arms:
        moe, has_experts = arm.config.moe, arm.method != "dense"
        used |= {arm.method, *((moe.router, moe.posthoc_router) if has_experts else ())}
        grouped |= has_experts and moe.construction == "coactivation"
    return [*(paper for key, paper in PAPERS.items() if key in used), *([COACTIVATION] if grouped else [])]


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
    mean, bracket, spread = text.partition(" (")
    return Markup("{}<br><small>({}</small>").format(mean, spread) if bracket else Markup("{}").format(mean)


def _read_card(path: Path) -> dict[str, Any]:
    """The data card as a list of sources, its splits, and whatever else it holds."""
    card = read_json_checked(path)
    sources = [source for source in card.get("sources", []) if isinstance(source, dict)]
    rest = {key: value for key, value in card.items() if key != "sources"}
    return {"sources": sources, "rest": flat(rest)}
