"""Links from descriptions to the pages of ``docs/``."""

import re

from ml_platform.settings import load_settings

#: A page, alone or with one of its sections: docs/operations.md, “A file is bad: what do I do?”
MENTION = re.compile(r"docs/(?P<page>[\w-]+\.md)(?:, “(?P<section>[^”]+)”)?")


def with_links(description: str) -> str:
    """Turn the mentions of pages into Markdown links, if ML_PLATFORM_DOCS_URL says where the pages are."""
    url = load_settings().docs_url
    if url is None:
        return description

    def link(mention: re.Match[str]) -> str:
        section = f"#{anchor(mention['section'])}" if mention["section"] else ""
        return f"[{mention[0]}]({url}/{mention['page']}{section})"

    return MENTION.sub(link, description)


def anchor(heading: str) -> str:
    """Anchor of a heading, as GitHub, GitLab and Gitea make it."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()))
