"""report.html in headless Chromium: it draws without errors, its controls work, its numbers are those of summary.csv.

Needs Chromium or Chrome on the PATH and the extra `browser-tests`: `make test-browser` installs the latter.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ssd_lit.report.figures import figures_of, write_figures
from ssd_lit.report.page import write_report
from ssd_lit.report.tables import write_arms, write_summary
from ssd_lit.support.files import write_text
from tests.report.conftest import ARMS, GRIDS, OTHERS, Tree, build, experiment

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser-tests: `make test-browser`")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MOST_BYTES = 3_000_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"needs a browser on the PATH, one of {', '.join(NAMES)} (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox does not work for root, nor in most containers; the page is our own.
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(two_seeds: Tree) -> Path:
    write_figures(two_seeds.exp_dir, two_seeds.experiment)
    write_summary(two_seeds.exp_dir, two_seeds.runs)
    write_arms(two_seeds.exp_dir, two_seeds.runs)
    return write_report(two_seeds.exp_dir, two_seeds.experiment, two_seeds.data_dir, {"commit": "0123abc"})


class Shown:
    """The report in a page of a browser without a network, and what the page complained of."""

    def __init__(self, browser: Any, report: Path, width: int = 1280, **settings: Any):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **settings)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.requests: list[str] = []
        self.page.goto(report.as_uri())
        self.drawn()

    def drawn(self) -> None:
        """Wait until the charts show what was asked for."""
        self.page.wait_for_selector("#chart-settings[data-state=drawn]")

    def set(self, selector: str, on: bool = True) -> None:
        self.page.set_checked(selector, on)
        self.drawn()

    def lines(self, chart: str) -> int:
        """The curves drawn in a chart."""
        return int(self.page.locator(f"#chart-{chart} .mark-line path[d]").count())

    def axis(self, chart: str) -> list[str]:
        """Titles and labels of a chart's axes."""
        return [text for text in self.page.locator(f"#chart-{chart} .mark-text text").all_text_contents() if text]

    def column(self, table: str, name: str) -> list[str | None]:
        """The exact numbers of a column, in the order shown; None where there is none."""
        cells = self.page.locator(f"{table} tbody td[data-column={name}]")
        return [cell.get_attribute("data-value") for cell in cells.all()]


@pytest.fixture
def shown(browser: Any, report: Path) -> Iterator[Shown]:
    opened = Shown(browser, report)
    yield opened
    assert opened.complaints == []
    opened.context.close()


@pytest.mark.parametrize("width", [390, 1280, 2560])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_charts_are_drawn_in_the_width_and_the_theme_there_is(
    browser: Any, report: Path, width: int, scheme: str
) -> None:
    shown = Shown(browser, report, width, color_scheme=scheme)
    for chart in ("loss", "perplexity", "similarity", "phases"):
        box = shown.page.locator(f"#chart-{chart} svg").bounding_box()
        assert box["x"] >= 0
        assert 0.6 * min(width, 900) / 2 < box["width"] <= width
        assert len(shown.axis(chart)) > 3
    # Nothing but wide tables, which scroll by themselves, is wider than the window.
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
    ground = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 27)"}[scheme]
    assert shown.complaints == []
    assert shown.requests == [report.as_uri()]
    shown.context.close()


def test_numbers_are_those_of_the_summary(shown: Shown, report: Path) -> None:
    summary = pd.read_csv(report.parent / "summary.csv")
    columns = [
        "steps", "tokens", "sparse_fraction", "train_flops", "train_seconds", "val_loss_dense", "val_loss_sparse",
        "val_ppl_dense", "val_ppl_sparse", "active_neurons",
    ]  # fmt: skip
    for column in columns:
        found = [float("nan") if value is None else float(value) for value in shown.column("#summary", column)]
        assert found == pytest.approx(list(summary[column]), rel=0, abs=0, nan_ok=True), column
    runs = shown.page.evaluate("JSON.parse(document.getElementById('chart-data').textContent).runs")
    for run, row in zip(runs, summary.itertuples(), strict=True):
        assert (run["arm"], run["seed"]) == (row.arm, row.seed)
        assert run["perplexity_dense"] == row.val_ppl_dense
        own = [point["perplexity"] for point in run["over_k"] if point["k"] == row.top_k]
        assert own == ([] if pd.isna(row.val_ppl_sparse) else [row.val_ppl_sparse])


def test_arms_are_switched_off_and_on(shown: Shown) -> None:
    # Two seeds of three arms that train, two curves each; of three arms with experts.
    assert (shown.lines("loss"), shown.lines("perplexity")) == (12, 6)
    shown.set("input[name=arm][value=ssd]", False)
    assert (shown.lines("loss"), shown.lines("perplexity")) == (8, 4)
    shown.set("input[name=training]", False)
    assert shown.lines("loss") == 4
    shown.page.click("[data-arms=none]")
    shown.drawn()
    assert shown.lines("loss") == 0
    assert "None of the arms" in shown.page.locator("#chart-loss").text_content()
    shown.page.click("[data-arms=all]")
    shown.drawn()
    assert (shown.lines("loss"), shown.lines("perplexity")) == (6, 6)


@pytest.mark.parametrize(
    ("x", "title"),
    [("steps", "step"), ("tokens", "tokens"), ("flops", "training FLOPs"), ("seconds", "training time (s)")],
)
def test_the_axis_is_the_one_chosen_with_or_without_a_log_scale(shown: Shown, x: str, title: str) -> None:
    shown.set(f"input[name=x][value={x}]")
    plain = {chart: shown.axis(chart) for chart in ("loss", "similarity", "phases")}
    assert all(title in texts for texts in plain.values())
    shown.set("input[name=log_x]")
    logarithmic = {chart: shown.axis(chart) for chart in plain}
    assert all(title in logarithmic[chart] and logarithmic[chart] != plain[chart] for chart in plain)
    shown.set("input[name=log_loss]")
    shown.set("input[name=log_x]", False)
    shown.page.select_option("select[name=part]", "quarter")
    shown.drawn()
    assert title in shown.axis("phases")
    assert shown.axis("phases") != plain["phases"]
    assert shown.lines("loss") == 12


def test_pointing_at_a_curve_tells_its_numbers(shown: Shown) -> None:
    shown.set("input[name=training]", False)
    box = shown.page.locator("#chart-loss svg").bounding_box()
    shown.page.locator("#chart-loss").scroll_into_view_if_needed()
    box = shown.page.locator("#chart-loss svg").bounding_box()
    shown.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tooltip = shown.page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    text = tooltip.text_content()
    assert any(label in text for label in ("Dense", "SSD", "MoE from scratch"))
    for name in ("seed", "loss", "mode", "step", "tokens", "training FLOPs", "training time (s)"):
        assert name in text


def test_a_table_sorts_by_the_exact_numbers(shown: Shown) -> None:
    before = shown.column("#summary", "val_ppl_sparse")
    heading = shown.page.locator("#summary thead th button", has_text="perplexity,sparse")
    heading.click()
    numbers = [float(value) for value in before if value is not None]
    missing = [None] * before.count(None)
    assert shown.column("#summary", "val_ppl_sparse") == [*map(str, sorted(numbers)), *missing]
    heading.click()
    assert shown.column("#summary", "val_ppl_sparse") == [*map(str, sorted(numbers, reverse=True)), *missing]
    heading.click()
    assert shown.column("#summary", "val_ppl_sparse") == before


def test_the_theme_is_chosen_and_paper_is_white(browser: Any, report: Path) -> None:
    shown = Shown(browser, report, color_scheme="dark")
    page = shown.page
    ground = "getComputedStyle(document.body).backgroundColor"
    line = "getComputedStyle(document.querySelector('#chart-loss .mark-line path')).stroke"
    dark = page.evaluate(ground), page.evaluate(line)
    page.emulate_media(media="print")
    on_paper = page.evaluate(ground), page.evaluate(line)
    assert on_paper[0] == "rgb(255, 255, 255)"
    assert on_paper[1] != dark[1]
    assert not page.locator("#theme").is_visible()
    page.emulate_media(media="screen")
    page.click("#theme")
    assert (page.evaluate(ground), page.evaluate(line)) == on_paper
    page.click("#theme")
    assert (page.evaluate(ground), page.evaluate(line)) == dark
    assert shown.complaints == []
    shown.context.close()


def test_a_report_of_every_kind_of_arm_draws_too(browser: Any, tmp_path: Path) -> None:
    many = build(tmp_path, experiment((0, 1), (*ARMS, *OTHERS, *GRIDS)))
    # Static figures are another test's; drawing these takes a quarter of a minute.
    for name in figures_of(many.experiment):
        write_text(many.exp_dir / "figures" / f"{name}.svg", "<svg></svg>")
    report = write_report(many.exp_dir, many.experiment, many.data_dir, {})
    shown = Shown(browser, report)
    # Cells of grids are left to their own figures: twelve arms, of two seeds.
    assert shown.page.locator("input[name=arm]").count() == 12
    assert shown.lines("perplexity") == 2 * 9
    assert shown.complaints == []
    assert report.stat().st_size < MOST_BYTES
    shown.context.close()


def test_the_file_is_small(report: Path) -> None:
    assert report.stat().st_size < MOST_BYTES
