"""Escapes text that others may have written, such as a name, a note or an error, for the place where it is shown."""

from __future__ import annotations

import re

#: Invisible; ends a word for readers that turn bare addresses into links.
_ZERO_WIDTH_SPACE = "\u200b"


def printable(text: str, keep: str = "") -> str:
    """`text` with every control and format character escaped, except for those in `keep`.

    A terminal obeys such characters: they move the cursor, change the title, reverse the direction of writing.
    """
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


def markdown(text: str) -> str:
    """Markdown that shows `text` as it stands, on one line: no link, no image, no HTML.

    Dagster's UI reads descriptions as Markdown. Bare addresses become links even where they are escaped, so zero-width
    spaces interrupt them.
    """
    line = printable(" ".join(text.split()))
    line = re.sub(r"[\\`*\[\]<>&~|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
    return re.sub(r"(?i)(?<=://)|(?<=\bwww)(?=\.)|(?<=@)", _ZERO_WIDTH_SPACE, line)


def chat(text: str) -> str:
    """`text` for a chat that takes ``<...>``, ``[...](...)`` and ``@...`` for links, images and mentions of everybody.

    Chats differ in their escapes, so look-alikes replace these characters.
    """
    return text.translate(str.maketrans("<>@", "‹›＠")).replace("](", "] (")
