"""report.html: everything about an experiment in one file that needs no network."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ssd_lit.config import RunConfig
from ssd_lit.files import read_json, write_text
from ssd_lit.reporting import words
from ssd_lit.reporting.figures import FIGURES
from ssd_lit.reporting.findings import findings
from ssd_lit.reporting.runs import by_arm, load_results
from ssd_lit.reporting.settings import flat, settings
from ssd_lit.reporting.summary import summary_row


def write_report(exp_dir: Path, runs: Sequence[RunConfig], data_dir: Path, provenance: Mapping[str, Any]) -> Path:
    """Write report.html from the runs' files and the figures drawn before.

    `provenance` is shown as it is: names to values, or to mappings of them.
    """
    results = load_results(exp_dir, runs)
    experiment = _read_experiment(exp_dir / "experiment.yaml")
    page = _template().render(
        name=runs[0].experiment,
        description=experiment["description"],
        findings=findings(results),
        rows=[(result, summary_row(result)) for result in results],
        figures=[(name, kind, inline_svg(exp_dir / "figures" / f"{name}.svg")) for name, kind in FIGURES.items()],
        card=_read_card(data_dir / "documents" / "card.json"),
        data=flat(experiment["data"]),
        arms=[arm_runs[0].label for arm_runs in by_arm(results).values()],
        settings=settings(results),
        evaluation=flat(experiment["evaluation"]),
        provenance=flat(provenance),
    )
    path = exp_dir / "report.html"
    write_text(path, page)
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
        loader=PackageLoader("ssd_lit.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for write in (words.number, words.scaled, words.percent, words.duration):
        environment.filters[write.__name__] = write
    return environment.get_template("report.html")


def _read_experiment(path: Path) -> dict[str, Any]:
    """The experiment as it was run; not checked again, for its text files need not be on this machine."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; run the stage that writes it first") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({error}); delete it and run again") from None
    if not isinstance(content, dict) or not {"description", "data", "evaluation"} <= content.keys():
        raise ValueError(f"{path}: not an experiment; delete it and run again")
    return content


def _read_card(path: Path) -> dict[str, Any]:
    """The data card as a list of sources, its splits, and whatever else it tells."""
    card = read_json(path)
    if not isinstance(card, dict):
        raise ValueError(f"{path}: not a data card; delete it and run again")
    sources = [source for source in card.get("sources", []) if isinstance(source, dict)]
    rest = {key: value for key, value in card.items() if key != "sources"}
    return {"sources": sources, "rest": flat(rest)}
