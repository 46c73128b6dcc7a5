"""Hooks of MkDocs: pages from the repository's root, links that leave docs/, and the help of all commands."""

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from ssd_lit.cli import app

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages of the repository's root, and their names in the site."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
COMMANDS = "<!-- commands -->"
NESTED = re.compile(r"^  (?=- )", re.MULTILINE)
"""GitHub takes two blanks for a list within a list; Python-Markdown wants four."""
FENCE = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the commands; let links lead to pages of the site, and keep the text alone of those to other files."""
    markdown = markdown.replace(COMMANDS, commands())
    name = page.file.src_uri
    folder = PurePosixPath() if name in PAGES.values() else PurePosixPath("docs")

    def changed(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        path, _, anchor = target.partition("#")
        inside = posixpath.normpath(folder / path)
        if inside in PAGES:
            inside = f"docs/{PAGES[inside]}"
        if not inside.startswith("docs/") or inside.startswith("docs/data"):
            return text
        return f"{image}[{text}]({inside.removeprefix('docs/')}{'#' * bool(anchor)}{anchor})"

    parts = FENCE.split(markdown)
    return "".join(
        part if part.lstrip().startswith("```") else NESTED.sub(" " * 4, LINK.sub(changed, part)) for part in parts
    )


def commands() -> str:
    """The help of every command, a section each."""
    group = typer.main.get_command(app)
    settings = {"max_content_width": 100, "terminal_width": 100}
    with group.make_context("ssd-lit", [], resilient_parsing=True, **settings) as above:
        sections = []
        for name, command in group.commands.items():
            with command.make_context(name, [], parent=above, resilient_parsing=True, **settings) as context:
                sections.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(sections)
