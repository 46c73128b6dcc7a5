import math
import re
import subprocess
import sys
from html import escape
from html.parser import HTMLParser

import pytest

from ssd_lit.paths import run_dir
from ssd_lit.records import read_chain
from ssd_lit.report.arms import arms_of
from ssd_lit.report.figures import write_figures
from ssd_lit.report.grid import grids
from ssd_lit.report.grid import page as grid_page
from ssd_lit.report.page import write_report
from ssd_lit.report.results import load_results
from ssd_lit.report.tables import router_rows, write_arms, write_summary
from ssd_lit.support.files import read_json_checked, write_json_checked

PROVENANCE = {
    "git commit": "0123abc",
    "packages": {"torch": "2.11.0", "lightning": "2.5.1"},
    "machine": "1 x <GPU>",
    "date": "2025-01-02 03:04 UTC",
}
VOID = {"meta", "br", "input"}


class Page(HTMLParser):
    """Text, ids, loads and rows of tables of a page; asserts that every tag is closed in turn."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.loads, self.text = [], [], [], [], ""
        self.rows: list[list[str]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
        else:
            self.loads += [value for key, value in attrs if key in {"src", "href", "xlink:href", "data", "srcset"}]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data}".strip()


@pytest.fixture(scope="module")
def html(two_seeds):
    write_figures(two_seeds.exp_dir, two_seeds.experiment)
    path = write_report(two_seeds.exp_dir, two_seeds.experiment, two_seeds.data_dir, PROVENANCE)
    return path.read_text()


def without_scripts(html: str) -> str:
    return re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_every_run_and_its_numbers(page, two_seeds):
    for result in load_results(two_seeds.exp_dir, two_seeds.runs):
        assert f"run-{result.name}" in page.ids
        assert f"runs/{result.name}/" in page.links
        assert f"{result.evaluation.loss_dense:.4f}" in page.text
        assert f"{result.ppl_dense:.2f}" in page.text
        if result.ppl_sparse is not None:
            assert f"{result.ppl_sparse:.2f}" in page.text
        for phase in read_chain(run_dir(two_seeds.results, result.config), result.config.method):
            assert f"runs/{result.name}/phases/{phase.name}/" in page.links


@pytest.fixture(scope="module")
def page_of_many(many):
    write_figures(many.exp_dir, many.experiment)
    return Page(write_report(many.exp_dir, many.experiment, many.data_dir, PROVENANCE).read_text())


def test_arms_of_every_method_are_told(page_of_many, many):
    """Also one without a dense mode, and what runs start from and are matched to."""
    for result in load_results(many.exp_dir, many.runs):
        assert f"run-{result.name}" in page_of_many.ids
        for other in (result.config.parent_run, result.config.matches):
            assert other is None or f"#run-{other}" in page_of_many.links
        for phase in result.chain:
            assert f"runs/{result.name}/phases/{phase.name}/" in page_of_many.links
    assert "gpt2-L2-D16-F64" in page_of_many.text
    assert "nats per target" in page_of_many.text


def test_the_papers_of_what_the_arms_use_are_named(page, page_of_many):
    for read in (page, page_of_many):
        assert "All settings and all numbers here are ours" in read.text
        assert "Switchable Sparse-Dense Learning (2410.03440)" in read.text
    assert "sparse upcycling (2212.05055)" in page_of_many.text
    assert "upcycling" not in page.text


def test_routers_are_told_with_their_bounds(page_of_many, many):
    results = load_results(many.exp_dir, many.runs)
    for arm, told in router_rows(arms_of(results)):
        moe = arm.config.moe
        router = moe.posthoc_router or moe.router
        assert [arm.label, router, f"{moe.top_k} of {moe.experts}", *told] in page_of_many.rows
        assert arm.method != "dense"
    rows = {arm.name: told for arm, told in router_rows(arms_of(results))}
    assert rows["upcycle"][3:] == ["-", "-"]
    assert rows["ssd"][:2] == ["80.0%", "70.0%"]


def test_a_text_that_is_held_out_has_its_table(html, two_seeds):
    table = html[html.index('id="text-novel"') :].partition("</table>")[0]
    assert "k = 4</th>" in table
    results = load_results(two_seeds.exp_dir, two_seeds.runs)
    for arm in {result.arm for result in results}:
        runs = [result for result in results if result.arm == arm]
        assert escape(runs[0].label) in table
        assert f"{sum(math.exp(run.evaluation.loss_dense + 1) for run in runs) / len(runs):.2f}" in table


def test_a_grid_has_a_figure_and_a_table(page_of_many, many):
    assert "Grid: SSD over k and construction" in page_of_many.text
    assert {"figures/grid_tau.csv", "figures/grid_square.csv"} <= set(page_of_many.links)
    for grid in grids(many.experiment, load_results(many.exp_dir, many.runs)):
        for arm, values, told in grid_page(grid):
            assert [arm.label if arm is grid.reference else arm.name, *values, *told] in page_of_many.rows


def test_what_each_arm_writes_stands_by_prompt_and_mode(html, page):
    for number in (1, 2):
        assert f"Prompt <{number}>\u21b5 of" in page.text
        for arm, modes in {"dense": ["dense"], "ssd": ["dense", "sparse"], "sparse": ["dense", "sparse"]}.items():
            told = [text for row in page.rows for text in row if text.startswith(f"{arm} writes")]
            assert [f"{arm} writes & {mode} {number}" for mode in modes] == [
                text for text in told if text.endswith(f" {number}")
            ]


def test_results_without_samples_have_no_such_section(make_tree):
    tree = make_tree((0,), ("dense",))
    path = run_dir(tree.results, tree.runs[0]) / "evaluation.json"
    content = read_json_checked(path)
    write_json_checked(path, {key: value for key, value in content.items() if key != "samples"})
    write_figures(tree.exp_dir, tree.experiment)
    page = Page(write_report(tree.exp_dir, tree.experiment, tree.data_dir, {}).read_text())
    assert "samples" not in page.ids
    assert "curves" in page.ids


def test_settings_that_differ_are_columns(page_of_many):
    head = next(row for row in page_of_many.rows if "model.\u200blayers" in row)
    small = next(row for row in page_of_many.rows if row[0] == "Smaller dense" and len(row) == len(head))
    assert head[0] == "arm"
    assert small[head.index("model.\u200blayers")] == "2"
    # What is the same in all of them is no column.
    assert "model.\u200bfamily" not in head


def test_links_lead_somewhere(page_of_many, many):
    write_summary(many.exp_dir, many.runs)
    write_arms(many.exp_dir, many.runs)
    for link in page_of_many.links:
        if link.startswith("#"):
            assert link[1:] in page_of_many.ids
        else:
            assert (many.exp_dir / link).exists()


def test_nothing_is_loaded_from_outside(html, page):
    assert all(target.startswith("#") for target in page.loads)
    assert not re.search(r"url\((?!#)", without_scripts(html))
    assert "@import" not in html
    assert all(not link.startswith(("http", "//")) for link in page.links)


def test_ids_are_unique_and_svg_references_resolve(html, page):
    assert len(page.ids) == len(set(page.ids))
    targets = re.findall(r"url\(#([^)]*)\)", without_scripts(html)) + [target[1:] for target in page.loads]
    assert targets
    assert set(targets) <= set(page.ids)


def test_text_is_escaped(html, page):
    assert "<addresses>" not in html
    assert "Presidential <addresses>" in page.text
    assert "Post-hoc <MoE>" in page.text
    assert "What does each method cost & give?" in page.text
    assert "1 x <GPU>" in page.text


def test_data_settings_and_provenance(page):
    for text in ("public domain", "splits.train.tokens", "switching.tau", "K: experts computed for a token",
                 "top_k_curve", "0123abc", "packages.torch", "2.11.0"):  # fmt: skip
        assert text in page.text


def test_same_bytes_twice(html, two_seeds):
    path = write_report(two_seeds.exp_dir, two_seeds.experiment, two_seeds.data_dir, PROVENANCE)
    assert path.read_text() == html


def test_card_of_other_keys(make_tree):
    tree = make_tree((0,), ("dense",))
    write_figures(tree.exp_dir, tree.experiment)
    write_json_checked(tree.data_dir / "documents" / "card.json", {"note": "odd", "sources": [{"bytes": "many"}, 3]})
    text = Page(write_report(tree.exp_dir, tree.experiment, tree.data_dir, {}).read_text()).text
    assert "odd" in text


def test_a_damaged_card_is_named(make_tree):
    tree = make_tree((0,), ("dense",))
    write_figures(tree.exp_dir, tree.experiment)
    path = tree.data_dir / "documents" / "card.json"
    path.write_text(path.read_text().replace("sotu", "sotv"))
    with pytest.raises(ValueError, match=r"card\.json: damaged"):
        write_report(tree.exp_dir, tree.experiment, tree.data_dir, {})


def test_missing_figure_is_named(make_tree):
    tree = make_tree((0,), ("dense",))
    with pytest.raises(ValueError, match="not found") as error:
        write_report(tree.exp_dir, tree.experiment, tree.data_dir, {})
    assert str(tree.exp_dir / "figures/loss_over_steps.svg") in str(error.value)


def test_reporting_imports_no_training_library():
    code = (
        "import sys, ssd_lit.report.page, ssd_lit.report.tables\n"
        "print(sorted({'torch', 'lightning', 'mlflow', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
