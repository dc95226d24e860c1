"""Mermaid diagrams of the documentation, drawn when the site is built: its pages load no script from elsewhere."""

import zlib
from typing import Any

import mmdr
from pymdownx.superfences import SuperFencesException


def draw(source: str, *_: Any, **__: Any) -> str:
    """HTML of a block ``mermaid`` (a custom fence of pymdownx.superfences)."""
    try:
        svg = mmdr.render(source).svg()
    except ValueError as error:
        # Of other exceptions superfences would make a block of code.
        raise SuperFencesException(f"{error} in the diagram\n{source}") from error
    # All have the same id, to which their styles and markers refer, and a page may have several.
    return svg.replace("merman", f"diagram-{zlib.crc32(source.encode()):x}")
