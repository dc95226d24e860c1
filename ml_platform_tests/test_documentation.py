"""The documentation: pages written from the code are current, and all read the same in the site and on GitHub.

Links between pages are checked by ``make docs``.
"""

from __future__ import annotations

import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown
import pytest
from markdown_it import MarkdownIt

from ml_platform.assets.documentation import MENTION, with_links
from scripts import reference

PROJECT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(PROJECT).as_posix()
    for pattern in ("*.md", "deploy/*.md", "deploy/terraform/*.md", "docs/**/*.md")
    for path in PROJECT.glob(pattern)
)


@pytest.mark.parametrize("name", reference.CONTENTS)
def test_reference_is_current(name: str) -> None:
    assert (reference.PAGES / name).read_text() == reference.page(name), "run make reference"


@pytest.mark.parametrize("name", ["settings.md", "tables.md"])
def test_each_setting_and_column_has_a_meaning(name: str) -> None:
    assert not [line for line in reference.page(name).splitlines() if line.endswith("|  |")]


def test_navigation_has_each_page() -> None:
    """The builder says nothing of pages that the navigation lacks, nor of entries without a page."""

    def pages_of(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [page for child in children for page in pages_of(child)]

    assert sorted(pages_of(tomllib.loads((PROJECT / "zensical.toml").read_text())["project"]["nav"])) == PAGES


def test_descriptions_name_pages_and_sections_that_exist() -> None:
    from ml_platform.definitions import defs

    graph = defs.resolve_asset_graph()
    checks = [graph.get_check_spec(key) for key in graph.asset_check_keys]
    texts = [spec.description or "" for spec in (*defs.resolve_all_asset_specs(), *checks)]
    mentions = [mention for text in texts for mention in MENTION.finditer(text)]
    assert len(mentions) > 10
    for mention in mentions:
        text = (PROJECT / "docs" / mention["page"]).read_text()
        headings = re.findall("^#+ (.*)", text, re.MULTILINE)
        assert mention["section"] is None or " ".join(mention["section"].split()) in headings, mention[0]


@pytest.mark.parametrize(
    ("text", "linked"),
    [
        ("See docs/s3.md.", "See [docs/s3.md](https://git.example/docs/s3.md)."),
        (
            "docs/a.md, “What now,\nand then?”, says it",
            "[docs/a.md, “What now,\nand then?”](https://git.example/docs/a.md#what-now-and-then), says it",
        ),
        ("docs/ and other.md", "docs/ and other.md"),
    ],
)
def test_mentions_of_pages_become_links(text: str, linked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ML_PLATFORM_DOCS_URL", raising=False)
    assert with_links(text) == text
    monkeypatch.setenv("ML_PLATFORM_DOCS_URL", "https://git.example/docs/")
    assert with_links(text) == linked


class Outline(HTMLParser):
    """Opening and closing tags that make the structure of a page, and its pictures."""

    STRUCTURE = (
        "h1",
        "h2",
        "h3",
        "h4",
        "ul",
        "ol",
        "li",
        "table",
        "tr",
        "td",
        "pre",
        "code",
        "strong",
        "em",
        "a",
        "img",
    )

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.STRUCTURE:
            self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("ul", "ol", "li"):
            self.tags.append(f"/{tag}")


@pytest.mark.parametrize("page", PAGES)
def test_page_reads_the_same_in_the_site_and_on_github(page: str) -> None:
    """Their dialects of Markdown differ in lists: the site's nests four blanks deep, and wants an empty line before."""
    text = re.sub(r"^```mermaid\n.*?^```$", "", (PROJECT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    extensions = ["tables", "pymdownx.superfences", "pymdownx.highlight"]
    options = {"pymdownx.highlight": {"use_pygments": False}}
    site = Outline(markdown.markdown(text, extensions=extensions, extension_configs=options))
    github = Outline(MarkdownIt("commonmark").enable("table").render(text))
    assert site.tags == github.tags
    for picture in github.pictures:
        assert picture["alt"], f"{picture['src']} needs an alternative text"
        assert (PROJECT / page).parent.joinpath(picture["src"] or "").is_file(), picture["src"]
