"""Elements of plots: figures, axes, labels, colours.

The plots use matplotlib's object-oriented interface on the Agg canvas: no display, no pyplot, no global state.
Text from data is shown literally, never interpreted as math text, HTML or Markdown.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ml_platform.escaping import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (https://jfly.uni-koeln.de/color/): safe for colour-blind readers.
BLUE, VERMILION, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
#: Height of two lines of tick labels and the axis label, in units of the legend's font size.
LABELS_HEIGHT = 6
INK, GREY, PALE = "#222222", "#666666", "#DDDDDD"


def new_figure(caption: str, width: float, height: float) -> Figure:
    """A figure of this size in inches with a caption below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
    figure.supxlabel(caption, x=0.012, ha="left", fontsize=7.5, color=GREY, parse_math=False)
    return figure


def markdown_image(name: str, content: bytes) -> str:
    """A PNG as Markdown."""
    return f"![{name}](data:image/png;base64,{base64.b64encode(content).decode()})"


def png_of(figure: Figure) -> bytes:
    """Render a figure as PNG without metadata, with a palette: a third of the size of true colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(method=Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def styled(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(labelsize=8, colors=GREY, labelcolor=INK)
    ax.grid(True, color=PALE, linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def set_labels(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, loc="left", fontsize=9, color=INK, fontweight="bold", parse_math=False)
    ax.set_xlabel(x, fontsize=8.5, color=INK)
    ax.set_ylabel(y, fontsize=8.5, color=INK)


def add_legend(ax: Axes, place: str, columns: int = 1, *, below: bool = False) -> None:
    """Add a legend at a place of the axes, or `below` them and their labels."""
    outside = {"bbox_to_anchor": (0, 0), "borderaxespad": LABELS_HEIGHT} if below else {}
    ax.legend(loc=place, ncols=columns, fontsize=7.5, framealpha=0.9, edgecolor=PALE, **outside)


def add_note(
    ax: Axes, text: str, point: tuple[float, float], offset: tuple[int, int] = (6, 0), color: str = INK
) -> None:
    """Annotate a point with text to its right."""
    ax.annotate(text, point, xytext=offset, textcoords="offset points", fontsize=7.5, color=color, va="center")


def name_rows(ax: Axes, names: Sequence[str], limit: int = 58) -> None:
    """Label rows with names, from top to bottom."""
    ax.set_yticks(range(len(names)), [shorten(name, limit) for name in names], fontsize=7.5, parse_math=False)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(False, axis="y")


def as_percent(*axes: Any) -> None:
    for axis in axes:
        axis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")


def shorten(text: str, limit: int) -> str:
    """Escape non-printable characters in `text` and truncate it to `limit` characters."""
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
