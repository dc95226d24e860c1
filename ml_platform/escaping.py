"""Escaping of untrusted text, such as names, notes and errors, for terminals, Markdown and chats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

#: Invisible word break that stops the autolinking of bare URLs.
_ZERO_WIDTH_SPACE = "\u200b"

_UNESCAPED_BAR = re.compile(r"(?<!\\)\|")


def printable(text: str, keep: str = "") -> str:
    """Escape all control and format characters in `text`, except those in `keep`.

    A terminal interprets such characters: they can move the cursor, change the title or reverse the text direction.
    """
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


def shorten_list(names: Sequence[str]) -> str:
    """Join names with commas, showing at most five of them."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return printable(", ".join(names[:5])) + rest


def markdown(text: str) -> str:
    """Escape `text` as Markdown that shows it literally on one line: no links, images or HTML.

    Dagster's UI renders descriptions as Markdown. Bare URLs become links even if escaped, so zero-width spaces break
    them up.
    """
    line = printable(" ".join(text.split()))
    line = re.sub(r"[\\`*\[\]<>&~|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
    return re.sub(r"(?i)(?<=://)|(?<=\bwww)(?=\.)|(?<=@)", _ZERO_WIDTH_SPACE, line)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown table, in which ``|`` is escaped where it is not yet. Other escapes are up to the caller."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_UNESCAPED_BAR.sub(r"\|", cell) for cell in line) + " |" for line in lines)


def from_markdown(text: str) -> str:
    """Undo `markdown`, for displays other than Dagster's UI."""
    return re.sub(r"\\([\\`*\[\]<>&~|_])", r"\1", text.replace(_ZERO_WIDTH_SPACE, ""))


def chat(text: str) -> str:
    """Neutralize ``<...>``, ``[...](...)`` and ``@...`` in `text`, which chats render as links, images and mentions.

    Chats differ in their escape syntax, so these characters are replaced by look-alikes.
    """
    return text.translate(str.maketrans("<>@", "‹›＠")).replace("](", "] (")
