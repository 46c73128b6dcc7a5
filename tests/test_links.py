"""Every path that the pages of documentation name is there.

Counted as a path:

- the target of a Markdown link or image, relative to its page, unless it is a URL; behind `#` the heading of a page;
- in code, a word with a slash that begins with a folder of the repository (`docs/method.md`) or of the package
  (`moe/ffn.py`), with `*` for any name; `::name` behind it is something that the Python file defines;
- in code, the bare name of a `.py` or `.smk` file, wherever it lies in the sources;
- in code, the bare name of a test, `test_...`; three dots at its end stand for the rest of the name;
- in code, `experiment=NAME`, a file of `configs/`, and `from ssd_lit... import`, a module.

Words with a part in capitals (`configs/NAME.yaml`) are placeholders. Folders that only runs make are not looked for.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT

PACKAGE = ROOT / "src/ssd_lit"
FOLDERS = ("benchmarks", "configs", "docs", "src", "tests", "workflow")
LINKS_ONLY = ("config/README.md", "docs/settings.md")
"""The paths of the first are those of a deployed copy; the second tells settings, whose names are like paths."""
NAMING = [page for page in PAGES if page not in LINKS_ONLY]

FENCE = re.compile(r"^ *```.*?\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
WORD = re.compile(r"[\w.*/:-]+")
PLACEHOLDER = re.compile(r"(?:^|[/.:])[A-Z_]{2,}(?:$|[/.:])")


def broken_links(page: str, text: str) -> Iterator[str]:
    """The targets of links and images in `text`, which stands in `page`, that are not there."""
    for target in LINK.findall(SPAN.sub("", FENCE.sub("", text))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name
        is_there = path.exists()
        if is_there and anchor:
            is_there = anchor in anchors(path.read_text() if name else text)
        if not is_there:
            yield target


def broken_paths(text: str) -> Iterator[str]:
    """The paths in the code of `text` that are not there."""
    for code in [*FENCE.findall(text), *SPAN.findall(FENCE.sub("", text))]:
        for name in re.findall(r"\bexperiment=([\w/]+)", code):
            if not PLACEHOLDER.search(name) and not (ROOT / f"configs/{name}.yaml").exists():
                yield f"experiment={name}"
        for module in re.findall(r"\bfrom ssd_lit\.([\w.]+) import", code):
            path = PACKAGE / module.replace(".", "/")
            if not path.is_dir() and not path.with_suffix(".py").exists():
                yield f"ssd_lit.{module}"
        yield from (word for word in map(_bare, WORD.findall(code)) if not PLACEHOLDER.search(word) and _is_gone(word))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        slug = re.sub(r"[^\w\- ]", "", LINK.sub("", heading).strip().lower()).replace(" ", "-")
        same = sum(1 for other in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other))
        found.add(f"{slug}-{same}" if same else slug)
    return found


def _bare(word: str) -> str:
    return word if word.endswith("...") else word.rstrip(".:")


def _is_gone(word: str) -> bool:
    name, _, member = word.partition("::")
    first, slash, _ = name.partition("/")
    if slash and first in FOLDERS:
        return not _is_in(ROOT, name, member)
    if slash and (PACKAGE / first).is_dir():
        return not _is_in(PACKAGE, name, member)
    if slash:
        return False
    if name.endswith((".py", ".smk")):
        return name not in names_of_sources()
    if name.startswith("test_"):
        start = name.removesuffix("...")
        return not any(test.startswith(start) if name != start else test == start for test in names_of_tests())
    return False


def _is_in(folder: Path, name: str, member: str) -> bool:
    if "*" in name:
        return any(folder.glob(name))
    path = folder / name
    return path.exists() and (not member or member in defined_in(path))


@cache
def defined_in(path: Path) -> frozenset[str]:
    return frozenset(re.findall(r"^ *(?:def|class) (\w+)", path.read_text(), re.MULTILINE))


@cache
def names_of_sources() -> frozenset[str]:
    folders = [ROOT / name for name in ("benchmarks", "src", "tests", "workflow")]
    return frozenset(path.name for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".smk"))


@cache
def names_of_tests() -> frozenset[str]:
    files = [*(ROOT / "tests").rglob("test_*.py")]
    return frozenset(name for path in files for name in (path.stem, *defined_in(path)))


@pytest.mark.parametrize("page", [*NAMING, *LINKS_ONLY])
def test_links_lead_somewhere(page: str) -> None:
    assert [*broken_links(page, (ROOT / page).read_text())] == []


@pytest.mark.parametrize("page", NAMING)
def test_paths_are_there(page: str) -> None:
    assert [*broken_paths((ROOT / page).read_text())] == []


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("See [the method](docs/no_such_page.md).", "docs/no_such_page.md"),
        ("![A figure](docs/images/no_such_figure.png)", "docs/images/no_such_figure.png"),
        ("[two\nlines](docs/no_such_page.md#top)", "docs/no_such_page.md#top"),
        ("[a heading](docs/method.md#no-such-heading)", "docs/method.md#no-such-heading"),
        ("# Here\n[there](#there)", "#there"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(text: str, target: str) -> None:
    assert [*broken_links("README.md", text)] == [target]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("in `moe/no_such_file.py`", "moe/no_such_file.py"),
        ("in `docs/no_such_page.md`", "docs/no_such_page.md"),
        ("in `no_such_file.py`", "no_such_file.py"),
        ("in `configs/*/no_such_file.yaml`", "configs/*/no_such_file.yaml"),
        ("`tests/test_links.py::test_no_such_test`", "tests/test_links.py::test_no_such_test"),
        ("`test_no_such_test`", "test_no_such_test"),
        ("`test_no_such_...`", "test_no_such_..."),
        ("```\nsnakemake --config experiment=no_such_experiment\n```", "experiment=no_such_experiment"),
        ("```\n    python benchmarks/no_such_script.py --rounds 3\n```", "benchmarks/no_such_script.py"),
        ("```python\nfrom ssd_lit.models.no_such_module import Any\n```", "ssd_lit.models.no_such_module"),
    ],
)
def test_a_path_that_is_not_there_is_found(text: str, path: str) -> None:
    assert [*broken_paths(text)] == [path]


def test_what_is_there_or_no_path_is_left_alone() -> None:
    page = """
# A page
## A *page*, `code` and (more)
## A page
[a](docs/method.md), [b](docs/method.md#methods), [c](#a-page-1), [d](https://example.org/x), [e](#a-page-code-and-more)
`tests/test_links.py::test_paths_are_there`, `moe/ffn.py`, `ffn.py`, `test_paths_...`, `benchmarks/ffn.py --rounds 3`,
`configs/NAME.yaml`, `results/quick/report.html`, `k/E`, `configs/*.yaml`, `moe/`, `experiment=quick jobs=runs`,
`experiment=NAME`.
`[no](link.md)`
"""
    assert [*broken_links("README.md", page)] == []
    assert [*broken_paths(page)] == []


def test_every_source_file_stands_in_the_tree_of_contributing() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = [path for path in (ROOT / "src/ssd_lit").rglob("*.py") if path.name != "__init__.py"]
    listed = [path for path in files if path.parent.name not in ("backends", "kernels", "figures")]
    assert [str(path) for path in listed if not re.search(rf"(?<![\w/]){re.escape(path.name)}\b", tree)] == []
