"""Pictures and a Markdown summary of a training report, drawn from the small tables that the job reports.

Everything is drawn with matplotlib's object-oriented interface on its Agg canvas: no display, no pyplot, no global
state that one run could leave for the next. Nothing here reads rows: a table has at most a few hundred entries. What
comes from data (names, dates, keys) is shown literally, never read as math text, HTML or Markdown.
"""

from __future__ import annotations

import base64
import io
import math
import numbers
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ml_platform.model.evaluation import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Intervals = Mapping[str, "tuple[float, float]"]
Row = dict[str, float]

#: Panels of the picture ``overview``, in the order of reading.
OVERVIEW = ("precision_recall", "thresholds", "per_day", "score_distribution", "calibration", "feature_importances")

#: Pictures for Markdown, the most useful first. What the overview shows is embedded only where it is missing.
EMBEDDED = ("overview", *OVERVIEW, "per_scenario", "grid", "roc")

#: Most features and candidates in a picture; more labels cannot be read.
MAX_BARS = 20

DPI = 110
SIZE = (7.0, 4.5)

# Okabe and Ito, "Color Universal Design" (https://jfly.uni-koeln.de/color/): distinct with any colour vision.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, GREY, PALE = "#222222", "#666666", "#DDDDDD"

LEARNERS = {
    "logistic_regression": "logistic regression",
    "xgboost": "XGBoost",
}

ALT_TEXTS = {
    "overview": "Overview of the held-out test",
    "roc": "ROC curve",
    "precision_recall": "Precision-recall curve",
    "score_distribution": "Distribution of the scores",
    "calibration": "Calibration of the scores",
    "per_day": "Figures per day",
    "per_scenario": "Frauds caught per scenario",
    "thresholds": "What a daily budget of alerts finds",
    "feature_importances": "Feature importances",
    "grid": "Candidates of the search",
}


def draw_figures(
    report: Mapping[str, Any], *, intervals: Intervals | None = None, champion: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """The pictures of a training report as PNG: name → bytes, each below 80 kB.

    Names: ``overview`` (six of the others in one picture), ``roc``, ``precision_recall``, ``score_distribution``,
    ``calibration``, ``per_day``, ``per_scenario``, ``thresholds``, ``feature_importances``, ``grid``.

    A picture is left out when the report has nothing to draw it from: its table is missing or empty (a report whose
    outcome is ``too_little_data`` has none at all), or no entry has the numbers that it needs. Entries with None, NaN,
    infinite or impossible values (a share outside 0 to 1, a negative count) are skipped one by one. An empty axis
    would look like a result.

    The same report gives the same bytes, as long as matplotlib and its configuration (a ``matplotlibrc`` of the user
    applies here as everywhere) are the same.

    Args:
        report: report of the job ``train_model``.
        intervals: metric (``test_average_precision``, ``test_roc_auc``) → its lower and upper bound.
        champion: the champion's ``version`` and its ``metrics`` on the same rows, named as the model's; by default
            those that the report has, if the champion scored.
    """
    figures = build_figures(report, intervals=intervals, champion=champion)
    return {name: _png(figure) for name, figure in figures.items()}


def _png(figure: Figure) -> bytes:
    """A figure with a palette, which takes a third of the bytes of true colour and looks the same.

    The palette is made of the colours that are drawn and of their mixtures with white, which smooth their edges; an
    adaptive one would spend its entries on the commonest colours and change those of thin lines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    palette = Image.new("P", (1, 1))
    palette.putpalette(_palette())
    buffer = io.BytesIO()
    # Written without metadata: the bytes depend on nothing but what is drawn.
    image.quantize(palette=palette, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _palette() -> list[int]:
    """Red, green and blue of at most 256 colours: white, and steps from it to each colour in use.

    The steps are as large as Pillow can tell apart while it looks for the nearest.
    """
    values = [255, 255, 255]
    for colour in (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK, GREY, PALE):
        parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        steps = (255 - min(parts)) // 10
        for step in range(1, steps + 1):
            values += [round(255 + (part - 255) * step / steps) for part in parts]
    return values


def build_figures(
    report: Mapping[str, Any], *, intervals: Intervals | None = None, champion: Mapping[str, Any] | None = None
) -> dict[str, Figure]:
    """What `draw_figures` draws, as matplotlib figures."""
    view = _View.of(report, intervals, champion)
    figures = {name: _figure_of(draw, view) for name, (has_data, draw) in _FIGURES.items() if has_data(view)}
    panels = [name for name in OVERVIEW if name in figures]
    if panels:
        figures = {"overview": _overview(view, panels), **figures}
    return figures


def markdown_summary(
    report: Mapping[str, Any],
    pngs: Mapping[str, bytes],
    *,
    intervals: Intervals | None = None,
    champion: Mapping[str, Any] | None = None,
    limit: int = 150_000,
) -> str:
    """A training report as Markdown with pictures in it, for the metadata of a Dagster asset.

    Tables of the metrics with their intervals and the champion's, of the thresholds and of the best candidates, then
    pictures as ``data:`` URIs. Dagster keeps metadata in its database, once per materialization, and loads it with
    every page that shows it: so the whole text stays within `limit` bytes. Pictures that do not fit are left out and
    named; the tables alone stay below 20 kB and are always there. Names from data stand in code spans, where they
    cannot become markup.

    Args:
        report: report of the job ``train_model``, of any outcome.
        pngs: what `draw_figures` made of it.
        intervals, champion: as in `draw_figures`.
        limit: bytes of the whole text.
    """
    view = _View.of(report, intervals, champion)
    parts = [_markdown_heading(report, view)]
    parts += [part for part in (_markdown_metrics(view), _markdown_thresholds(view), _markdown_grid(view)) if part]
    used = sum(len(part.encode()) + 2 for part in parts)
    # Kept free for the line that names what did not fit.
    room = limit - used - 300
    left_out: list[str] = []
    embedded: list[str] = []
    for name in EMBEDDED:
        if name not in pngs or (name in OVERVIEW and "overview" in embedded):
            continue
        picture = f"![{ALT_TEXTS[name]}](data:image/png;base64,{base64.b64encode(pngs[name]).decode('ascii')})"
        if len(picture) + 2 > room:
            left_out.append(name)
            continue
        room -= len(picture) + 2
        embedded.append(name)
        parts.append(picture)
    if left_out:
        parts.append(f"Pictures left out to keep this entry small: {', '.join(left_out)}.")
    return "\n\n".join(parts) + "\n"


# --- What a report says -----------------------------------------------------------------------------------------------

SHARE = (0.0, 1.0)
COUNT = (0.0, 1e15)


def _with_bounds(*shares: str) -> dict[str, tuple[float, float]]:
    """Columns of shares and of the ends of their intervals."""
    return {f"{share}{end}": SHARE for share in shares for end in ("", "_lower", "_upper")}


#: Table → column → the values that are possible.
TABLES: dict[str, dict[str, tuple[float, float]]] = {
    "roc": {"false_positive_rate": SHARE, "true_positive_rate": SHARE},
    "precision_recall": {"recall": SHARE, "precision": SHARE},
    "score_histogram": {"lower": SHARE, "upper": SHARE, "genuine": COUNT, "frauds": COUNT},
    "calibration": {"mean_score": SHARE, "fraud_share": SHARE, "rows": COUNT},
    "per_day": {
        "rows": COUNT,
        "frauds": COUNT,
        "average_precision": SHARE,
        "roc_auc": SHARE,
        **_with_bounds("precision_at_budget", "recall_at_budget"),
    },
    "per_scenario": {"frauds": COUNT, "caught": COUNT, **_with_bounds("recall_at_budget")},
    "thresholds": {
        "alerts_per_day": COUNT,
        "amount_caught": COUNT,
        **_with_bounds("precision", "recall", "amount_share"),
    },
}

#: Columns without which an entry shows nothing; others may be undefined (a day without frauds has no recall).
NEEDED = {"per_day": ("rows", "frauds"), "per_scenario": ("frauds", "caught"), "thresholds": ("alerts_per_day",)}


@dataclass(frozen=True)
class _View:
    """The parts of a report that can be drawn: numbers are finite and possible, texts are printable."""

    caption: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    champion: tuple[str, dict[str, float]] | None
    base_rate: float | None
    tables: dict[str, list[Row]]
    #: Labels of the rows of ``per_day`` and ``per_scenario``.
    labels: dict[str, list[str]]
    importances: list[tuple[str, float]] = field(default_factory=list)
    grid: list[tuple[str, dict[str, str], float]] = field(default_factory=list)

    @classmethod
    def of(cls, report: Mapping[str, Any], intervals: Intervals | None, champion: Mapping[str, Any] | None) -> _View:
        all_metrics = _numbers_of(report.get("metrics"))
        metrics = {name: value for name, value in all_metrics.items() if not name.startswith("champion_")}
        raw_tables = _mapping(report.get("tables"))
        tables: dict[str, list[Row]] = {}
        labels: dict[str, list[str]] = {}
        for name, columns in TABLES.items():
            entries = sorted(_mappings(raw_tables.get(name)), key=_order(name))
            rows_of = [(entry, _row(entry, columns)) for entry in entries]
            needed = NEEDED.get(name, tuple(columns))
            kept = [(entry, row) for entry, row in rows_of if all(column in row for column in needed)]
            tables[name] = [row for _, row in kept]
            labels[name] = [_text(entry.get("date", entry.get("scenario", "")), 16) for entry, _ in kept]
        test = _mapping(_mapping(report.get("windows")).get("test"))
        rows = metrics.get("test_rows", _number(test.get("rows")))
        frauds = metrics.get("test_frauds", _number(test.get("frauds")))
        return cls(
            caption=_caption(report, test, rows, frauds),
            metrics=metrics,
            intervals=_intervals_of(intervals),
            champion=_champion_of(report, all_metrics, champion),
            base_rate=frauds / rows if rows and frauds is not None and 0 <= frauds <= rows else None,
            tables=tables,
            labels=labels,
            importances=sorted(
                ((name, value) for name, value in _numbers_of(report.get("feature_importances")).items() if value >= 0),
                key=lambda pair: (-pair[1], pair[0]),
            ),
            grid=_grid_of(report.get("grid")),
        )

    def figure_of(self, metric: str, what: str) -> str:
        """A metric as a title shows it, with its interval and the champion's figure where they are known."""
        value = self.metrics.get(metric)
        if value is None:
            return what
        text = f"{what} {value:.3f}"
        if metric in self.intervals:
            text += " ({:.3f} to {:.3f})".format(*self.intervals[metric])
        if self.champion and metric in self.champion[1]:
            version = f" (version {self.champion[0]})" if self.champion[0] else ""
            text += f"\nChampion{version}: {self.champion[1][metric]:.3f}"
        return text


def _caption(report: Mapping[str, Any], test: Mapping[str, Any], rows: float | None, frauds: float | None) -> str:
    text = "Held-out test"
    if test.get("first_date") and test.get("last_date"):
        text += f" {_text(test['first_date'], 16)} to {_text(test['last_date'], 16)}"
    counts = [f"{value:,.0f} {what}" for value, what in ((rows, "rows"), (frauds, "frauds")) if value is not None]
    text += (": " + ", ".join(counts) if counts else "") + "."
    return text + (f" Model cut-off {_text(report['cutoff'], 40)}." if report.get("cutoff") else "")


def _intervals_of(intervals: Intervals | None) -> dict[str, tuple[float, float]]:
    known = {}
    for name, bounds in _mapping(intervals).items():
        ends = [_number(bound) for bound in bounds or ()]
        if len(ends) == 2 and ends[0] is not None and ends[1] is not None:
            known[str(name)] = (ends[0], ends[1])
    return known


def _champion_of(
    report: Mapping[str, Any], metrics: dict[str, float], champion: Mapping[str, Any] | None
) -> tuple[str, dict[str, float]] | None:
    if champion is None:
        champion = _mapping(report.get("champion"))
        prefix = "champion_"
        figures = {name[len(prefix) :]: value for name, value in metrics.items() if name.startswith(prefix)}
    else:
        figures = _numbers_of(champion.get("metrics"))
    version = champion.get("version")
    return (_text("" if version is None else version, 16), figures) if figures else None


def _grid_of(grid: Any) -> list[tuple[str, dict[str, str], float]]:
    """Learner, parameters and validation average precision of the candidates that have one, the best first."""
    candidates = []
    for entry in _mappings(grid):
        score = _number(entry.get("validation_average_precision"))
        if score is None or not 0 <= score <= 1:
            continue
        params = {_text(name, 24): _text(value, 24) for name, value in _mapping(entry.get("params")).items()}
        learner = LEARNERS.get(str(entry.get("learner")), _text(entry.get("learner", "candidate"), 24))
        candidates.append((learner, params, score))
    # The sort is stable: of equals, the one that the search tried first.
    return sorted(candidates, key=lambda candidate: -candidate[2])


def _order(table: str) -> Callable[[Mapping[str, Any]], Any]:
    """Curves stay in their order; other tables are sorted, so that their order does not matter."""
    column = {"per_day": "date", "per_scenario": "scenario", "thresholds": "alerts_per_day", "score_histogram": "lower"}
    if table not in column:
        return lambda row: 0

    def key(row: Mapping[str, Any]) -> tuple[float, str]:
        number = _number(row.get(column[table]))
        return (math.inf if number is None else number, str(row.get(column[table])))

    return key


def _row(entry: Mapping[str, Any], columns: Mapping[str, tuple[float, float]]) -> Row:
    row = {}
    for column, (low, high) in columns.items():
        value = _number(entry.get(column))
        if value is not None and low <= value <= high:
            row[column] = value
    return row


def _ends(row: Row, column: str) -> tuple[float, float] | None:
    """The interval of a column; None if it is not known, or does not hold the value."""
    low, high = row.get(f"{column}_lower"), row.get(f"{column}_upper")
    if low is None or high is None or not low <= row.get(column, math.nan) <= high:
        return None
    return low, high


def _number(value: Any) -> float | None:
    """A finite number, or None; True and "1" are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _numbers_of(mapping: Any) -> dict[str, float]:
    values = {str(name): _number(value) for name, value in _mapping(mapping).items()}
    return {name: value for name, value in values.items() if value is not None}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, (list, tuple)) else []


def _text(value: Any, limit: int) -> str:
    """`value` on one line, in characters that the font has and that change nothing around them.

    Letters, digits and punctuation of Latin, Greek and Cyrillic stay; all else (line ends, control and bidirectional
    characters, accents that stack) becomes a Python escape. The middle of a long text is left out: names that begin
    alike tend to differ at the end.
    """

    def shown(character: str) -> str:
        code = ord(character)
        known = (code < 0x250 or 0x370 <= code < 0x526) and character.isprintable()
        known = known and code != 0x37F and not unicodedata.category(character).startswith("M")
        # The ellipsis is what this function itself may have put in.
        return character if known or character == "…" else character.encode("unicode_escape").decode("ascii")

    text = str(value)
    text = "".join(map(shown, text if len(text) <= 2 * limit else text[:limit] + text[-limit:]))
    if len(text) <= limit:
        return text
    tail = limit // 3
    return text[: limit - tail - 1] + "…" + text[-tail:]


# --- Pictures ---------------------------------------------------------------------------------------------------------


def _figure_of(draw: Callable[[Figure, _View], None], view: _View) -> Figure:
    figure = _empty_figure(SIZE, view.caption)
    draw(figure, view)
    return figure


def _empty_figure(size: tuple[float, float], caption: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.07, wspace=0.04, hspace=0.04)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout=layout)
    figure.supxlabel(caption, x=0.012, ha="left", fontsize=7.5, color=GREY, parse_math=False)
    return figure


def _overview(view: _View, names: Sequence[str]) -> Figure:
    """Small multiples: the panels that there are, up to three in a row."""
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _empty_figure((4.0 * columns if columns > 1 else SIZE[0], 3.3 * rows + 0.2), view.caption)
    # Each panel is laid out by itself: long names in one do not narrow the one above it.
    cells = figure.subfigures(rows, columns, squeeze=False).flat
    for name, cell in zip(names, cells, strict=False):
        _PANELS[name](_style(cell.subplots()), view)
    return figure


def _style(ax: Axes) -> Axes:
    ax.set_facecolor("white")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(labelsize=8, colors=GREY, labelcolor=INK)
    ax.grid(True, color=PALE, linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def _label(ax: Axes, title: str, x: str, y: str, *, title_at: Literal["left", "right"] = "left") -> None:
    ax.set_title(title, loc=title_at, fontsize=9, color=INK, fontweight="bold", parse_math=False)
    ax.set_xlabel(x, fontsize=8.5, color=INK, parse_math=False)
    ax.set_ylabel(y, fontsize=8.5, color=INK, parse_math=False)


def _legend(ax: Axes, **where: Any) -> None:
    ax.legend(fontsize=7.5, framealpha=0.9, edgecolor=PALE, **where)


def _note(ax: Axes, text: str, point: tuple[float, float], **style: Any) -> None:
    """A figure to the right of a point."""
    style = {"fontsize": 7.5, "color": INK, "va": "center", **style}
    ax.annotate(text, point, xytext=(6, 0), textcoords="offset points", **style)


def _percent(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _counts(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _far_apart(values: Iterable[float]) -> bool:
    """Whether values are so different that a linear axis would hide the small ones."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) >= 30 * min(positive)


def _columns(rows: Sequence[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    """Two columns of the rows that have both."""
    both = [row for row in rows if x in row and y in row]
    return [row[x] for row in both], [row[y] for row in both]


def _draw_roc(figure: Figure, view: _View) -> None:
    linear, zoomed = (_style(ax) for ax in figure.subplots(1, 2))
    x, y = _columns(view.tables["roc"], "false_positive_rate", "true_positive_rate")
    chance = [10 ** (exponent / 10) for exponent in range(-50, 1)]
    for ax in (linear, zoomed):
        ax.plot(x, y, color=BLUE, linewidth=1.8, label="model", solid_joinstyle="round")
        ax.plot([0, *chance], [0, *chance], color=GREY, linewidth=1, linestyle="--", label="chance")
        ax.set_ylim(-0.02, 1.02)
        _percent(ax.xaxis)
        _percent(ax.yaxis)
    linear.set_xlim(-0.02, 1.02)
    smallest = min((value for value in x if value > 0), default=1e-3)
    zoomed.set_xscale("log")
    zoomed.set_xlim(10 ** math.floor(math.log10(min(max(smallest, 1e-5), 0.1))), 1)
    _percent(zoomed.xaxis)
    rate = "false positive rate (share of genuine rows)"
    _label(linear, "All thresholds", rate, "true positive rate (share of frauds)")
    _label(zoomed, "Few false alarms (log scale)", rate, "")
    _legend(linear, loc="lower right")
    title = view.figure_of("test_roc_auc", "Area under the ROC curve")
    figure.suptitle(title, x=0.012, ha="left", fontsize=10, fontweight="bold", color=INK, parse_math=False)


def _panel_precision_recall(ax: Axes, view: _View) -> None:
    x, y = _columns(view.tables["precision_recall"], "recall", "precision")
    # Average precision is the area under these steps: a precision holds from the recall before it.
    steps = "steps-pre" if x[0] <= x[-1] else "steps-post"
    ax.plot(x, y, color=BLUE, linewidth=1.8, drawstyle=steps, label="model")
    if view.base_rate is not None:
        share = f"no skill ({100 * view.base_rate:.2g} % are frauds)"
        ax.axhline(view.base_rate, color=GREY, linewidth=1, linestyle="--", label=share)
    budgets = [row for row in view.tables["thresholds"] if "recall" in row and "precision" in row]
    if budgets:
        points = _columns(budgets, "recall", "precision")
        ax.plot(*points, "o", color=VERMILION, markersize=5, zorder=3, label="alerts a day")
    for row in budgets:
        ax.annotate(
            f"{row['alerts_per_day']:.4g}",
            (row["recall"], row["precision"]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=7.5,
            color=VERMILION,
        )
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.05)
    _percent(ax.xaxis)
    _percent(ax.yaxis)
    title = view.figure_of("test_average_precision", "Average precision")
    _label(ax, title, "recall (share of frauds found)", "precision (share of alerts that are frauds)")
    _legend(ax, loc="best")


def _panel_score_distribution(ax: Axes, view: _View) -> None:
    bins = [row for row in view.tables["score_histogram"] if row["lower"] < row["upper"]]
    for column, colour, width, label in (("genuine", SKY, 0.94, "genuine"), ("frauds", VERMILION, 0.46, "frauds")):
        ax.bar(
            [(row["lower"] + row["upper"]) / 2 for row in bins],
            [row[column] for row in bins],
            width=[(row["upper"] - row["lower"]) * width for row in bins],
            color=colour,
            label=label,
        )
    if _far_apart(row[column] for row in bins for column in ("genuine", "frauds")):
        ax.set_yscale("log")
        # A bin with one row stays visible.
        ax.set_ylim(bottom=0.6)
        scale = "rows (log scale)"
    else:
        scale = "rows"
    _counts(ax.yaxis)
    ax.set_xlim(-0.01, 1.01)
    _label(ax, "Scores of genuine rows and frauds", "score (probability of fraud, 0 to 1)", scale)
    _legend(ax, loc="upper right")


def _panel_calibration(ax: Axes, view: _View) -> None:
    bins = [row for row in view.tables["calibration"] if row["rows"] >= 1]
    # Rows count as independent here, which several of one card are not quite.
    bounds = [wilson_interval(row["fraud_share"], row["rows"]) for row in bins]
    positive = [row[column] for row in bins for column in ("mean_score", "fraud_share") if row[column] > 0]
    log = _far_apart(positive)
    floor = 0.0
    if log:
        ax.set_xscale("log")
        ax.set_yscale("log")
        floor = 10 ** math.floor(math.log10(max(min(positive), 1e-6)))
    x = [max(row["mean_score"], floor) for row in bins]
    y = [max(row["fraud_share"], floor) for row in bins]
    ends = [(max(low, floor), max(high, floor)) for low, high in bounds]
    highest = min(1.0, 1.3 * max([floor, *x, *(high for _, high in ends)]))
    ax.plot([floor, highest], [floor, highest], color=GREY, linewidth=1, linestyle="--", label="perfect calibration")
    ax.vlines(x, [low for low, _ in ends], [high for _, high in ends], color=BLUE, linewidth=1.2, label="95 % interval")
    for found, face, label in ((True, BLUE, "bin of rows"), (False, "white", "bin without frauds")):
        points = [(x[n], y[n]) for n, row in enumerate(bins) if (row["fraud_share"] > 0) is found]
        if points:
            ax.plot(*zip(*points, strict=True), "o", color=BLUE, markerfacecolor=face, markersize=5.5, label=label)
    if log:
        ax.set_xlim(floor * 0.7, highest * 1.4)
        ax.set_ylim(floor * 0.7, highest * 1.4)
    expected = sum(row["mean_score"] * row["rows"] for row in bins)
    actual = sum(row["fraud_share"] * row["rows"] for row in bins)
    _percent(ax.xaxis)
    _percent(ax.yaxis)
    scale = " (log scale)" if log else ""
    title = f"Calibration\n{expected:,.0f} frauds expected, {actual:,.0f} found"
    _label(ax, title, f"mean score of the bin{scale}", f"share of frauds{scale}")
    _legend(ax, loc="upper left")


PER_DAY = (
    ("average_precision", "average precision", BLUE, "o"),
    ("roc_auc", "ROC AUC", GREEN, "s"),
    ("precision_at_budget", "precision at the alert budget", VERMILION, "^"),
    ("recall_at_budget", "recall at the alert budget", PURPLE, "D"),
)


def _panel_per_day(ax: Axes, view: _View) -> None:
    _plot_per_day(ax, view, labels=4)
    _legend(ax, loc="best")


def _plot_per_day(ax: Axes, view: _View, labels: int) -> None:
    days = view.tables["per_day"]
    for column, label, colour, marker in PER_DAY:
        points = [(number, day[column]) for number, day in enumerate(days) if column in day]
        if points:
            x, y = zip(*points, strict=True)
            ax.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.4, label=label)
        bounds = [(number, *ends) for number, day in enumerate(days) if (ends := _ends(day, column))]
        if bounds:
            ax.vlines(*zip(*bounds, strict=True), color=colour, linewidth=3, alpha=0.25)
    if "test_average_precision" in view.intervals:
        low, high = view.intervals["test_average_precision"]
        ax.axhspan(low, high, color=BLUE, alpha=0.12, linewidth=0, label="interval of average precision")
    ax.set_ylim(-0.03, 1.03)
    _percent(ax.yaxis)
    _day_ticks(ax, view.labels["per_day"], labels)
    _label(ax, f"Figures per day ({len(days)} {'day' if len(days) == 1 else 'days'})", "day (UTC)", "metric")


def _day_ticks(ax: Axes, dates: Sequence[str], most: int) -> None:
    """At most so many dates, the first and every n-th after it; the year where it is not that of the label before."""
    step = math.ceil(len(dates) / most)
    shown = list(range(0, len(dates), step))
    texts = [dates[number] for number in shown]
    iso = all(len(text) == 10 and text[4] == text[7] == "-" for text in texts)
    if iso:
        texts = [
            text if number == 0 or text[:4] != texts[number - 1][:4] else text[5:] for number, text in enumerate(texts)
        ]
        texts = [text if len(text) < 10 else f"{text[5:]}\n{text[:4]}" for text in texts]
    ax.set_xticks(shown, texts, fontsize=8, parse_math=False)
    ax.set_xlim(-0.5, len(dates) - 0.5)


def _draw_per_day(figure: Figure, view: _View) -> None:
    above, below = (_style(ax) for ax in figure.subplots(2, 1, height_ratios=(2.4, 1)))
    _plot_per_day(above, view, labels=8)
    above.set_xlabel("")
    above.tick_params(labelbottom=False)
    _legend(above, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    days = view.tables["per_day"]
    for column, colour, shift in (("rows", SKY, -0.2), ("frauds", VERMILION, 0.2)):
        positions = [number + shift for number in range(len(days))]
        below.bar(positions, [day[column] for day in days], width=0.38, color=colour, label=column)
    log = _far_apart(day[column] for day in days for column in ("rows", "frauds"))
    if log:
        below.set_yscale("log")
        below.set_ylim(bottom=0.6)
    _counts(below.yaxis)
    _day_ticks(below, view.labels["per_day"], 8)
    _label(below, "", "day (UTC)", "count (log scale)" if log else "count")
    _legend(below, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_per_scenario(figure: Figure, view: _View) -> None:
    ax = _style(figure.subplots())
    scenarios = [
        (label, row)
        for label, row in zip(view.labels["per_scenario"], view.tables["per_scenario"], strict=True)
        if row["frauds"] >= 1 and row["caught"] <= row["frauds"]
    ][:MAX_BARS]
    for number, (_, row) in enumerate(scenarios):
        share = row["caught"] / row["frauds"]
        low, high = _ends(row, "recall_at_budget") or (share, share)
        ax.barh(number, share, height=0.55, color=SKY)
        if low < high:
            ax.hlines(number, low, high, color=INK, linewidth=1.4)
            ax.vlines([low, high], number - 0.08, number + 0.08, color=INK, linewidth=1.4)
        text = f"{row['caught']:,.0f} of {row['frauds']:,.0f}"
        _note(ax, text, (high, number), fontsize=8)
    ax.set_yticks(range(len(scenarios)), [label for label, _ in scenarios], parse_math=False)
    ax.set_ylim(len(scenarios) - 0.4, -0.6)
    # Room for the counts to the right of a full bar.
    ax.set_xlim(0, 1.2)
    ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    ax.grid(False, axis="y")
    _percent(ax.xaxis)
    title = "Frauds caught per scenario at the daily alert budget (line: 95 % interval)"
    _label(ax, title, "recall (share of the scenario's frauds that are among the alerts)", "fraud scenario")


THRESHOLDS = (
    ("precision", "precision (share of alerts)", VERMILION, "^"),
    ("recall", "recall (share of frauds)", BLUE, "o"),
    ("amount_share", "money (share of the frauds' amount)", GREEN, "s"),
)


def _panel_thresholds(ax: Axes, view: _View) -> None:
    rows = view.tables["thresholds"]
    banded = False
    for column, label, colour, marker in THRESHOLDS:
        x, y = _columns(rows, "alerts_per_day", column)
        if x:
            ax.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.5, label=label)
        bounds = [(row["alerts_per_day"], *ends) for row in rows if (ends := _ends(row, column))]
        if bounds:
            banded = True
            places, low, high = zip(*bounds, strict=True)
            ax.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    _budget_axis(ax, rows)
    ax.set_ylim(-0.03, 1.03)
    _percent(ax.yaxis)
    title = "What a daily budget of alerts finds" + ("\nBands: 95 % intervals" if banded else "")
    _label(ax, title, _budget_label(rows), "share")
    _legend(ax, loc="best")


def _budget_label(rows: Sequence[Row]) -> str:
    return "alerts a day" + (" (log scale)" if _far_apart(row["alerts_per_day"] for row in rows) else "")


def _budget_axis(ax: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import NullLocator

    budgets = [row["alerts_per_day"] for row in rows]
    if _far_apart(budgets) and min(budgets) > 0:
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(budgets, [f"{budget:,.0f}" for budget in budgets])


def _draw_thresholds(figure: Figure, view: _View) -> None:
    rows = view.tables["thresholds"]
    amounts = [(row["alerts_per_day"], row["amount_caught"]) for row in rows if "amount_caught" in row]
    if not amounts:
        _panel_thresholds(_style(figure.subplots()), view)
        return
    shares, money = (_style(ax) for ax in figure.subplots(1, 2, width_ratios=(1.7, 1)))
    _panel_thresholds(shares, view)
    money.bar(range(len(amounts)), [amount for _, amount in amounts], width=0.65, color=GREEN)
    money.set_xticks(range(len(amounts)), [f"{budget:,.0f}" for budget, _ in amounts])
    money.grid(False, axis="x")
    _counts(money.yaxis)
    _label(money, "Money in caught frauds", "alerts a day", "amount (unit of tx_amount)")


def _panel_feature_importances(
    ax: Axes, view: _View, count: int = 10, letters: int = 34, title_at: Literal["left", "right"] = "right"
) -> None:
    total = sum(value for _, value in view.importances)
    best = view.importances[:count]
    shares = [value / total for _, value in best]
    ax.barh(range(len(best)), shares, height=0.68, color=BLUE)
    ax.set_yticks(range(len(best)), [_text(name, letters) for name, _ in best], fontsize=7, parse_math=False)
    ax.set_ylim(len(best) - 0.4, -0.6)
    ax.set_xlim(0, max(shares) * 1.15)
    ax.grid(False, axis="y")
    _percent(ax.xaxis)
    for number, share in enumerate(shares):
        _note(ax, f"{100 * share:.1f} %", (share, number), fontsize=7)
    title = f"Top {len(best)} of {len(view.importances)} features ({100 * sum(shares):.1f} % of the sum)"
    _label(ax, title, "importance (share of the sum)", "", title_at=title_at)


def _draw_grid(figure: Figure, view: _View) -> None:
    ax = _style(figure.subplots())
    best = view.grid[:MAX_BARS]
    learners = sorted({learner for learner, _, _ in view.grid})
    colours = dict(zip(learners, (BLUE, VERMILION, GREEN, PURPLE, ORANGE), strict=False))
    varied = _varied(view.grid)
    labels = []
    for number, (learner, params, score) in enumerate(best):
        colour = colours.get(learner, GREY)
        ax.plot(score, number, "o", color=colour, markersize=8 if number == 0 else 6)
        _note(ax, f"{score:.4f}", (score, number), fontweight="bold" if number == 0 else "normal")
        settings = ", ".join(f"{name} {value}" for name, value in params.items() if (learner, name) in varied)
        labels.append(_text(f"{learner}: {settings}" if settings else learner, 58))
    ax.set_yticks(range(len(best)), labels, fontsize=7, parse_math=False)
    for (learner, _, _), text in zip(best, ax.get_yticklabels(), strict=True):
        text.set_color(colours.get(learner, GREY))
    ax.set_ylim(len(best) - 0.4, -0.6)
    scores = [score for _, _, score in best]
    # Room for the figures beside the points.
    spread = max(max(scores) - min(scores), 0.01)
    ax.set_xlim(min(scores) - 0.1 * spread, max(scores) + 0.25 * spread)
    title = (
        "Search: " + (f"best {len(best)} of " if len(best) < len(view.grid) else "") + f"{len(view.grid)} candidates"
    )
    _label(ax, title, "average precision on the validation window (axis does not begin at 0)", "")


def _varied(grid: Iterable[tuple[str, dict[str, str], float]]) -> set[tuple[str, str]]:
    """Parameters that differ between the candidates of a learner; only these tell them apart."""
    values: dict[tuple[str, str], set[str]] = {}
    for learner, params, _ in grid:
        for name, value in params.items():
            values.setdefault((learner, name), set()).add(value)
    return {key for key, known in values.items() if len(known) > 1}


def _alone(panel: Callable[..., None], **options: Any) -> Callable[[Figure, _View], None]:
    """A panel as a picture of its own."""
    return lambda figure, view: panel(_style(figure.subplots()), view, **options)


def _has_any(table: str, columns: Sequence[str]) -> Callable[[_View], bool]:
    return lambda view: any(column in row for row in view.tables[table] for column in columns)


_PANELS: dict[str, Callable[..., None]] = {
    "precision_recall": _panel_precision_recall,
    "thresholds": _panel_thresholds,
    "per_day": _panel_per_day,
    "score_distribution": _panel_score_distribution,
    "calibration": _panel_calibration,
    "feature_importances": _panel_feature_importances,
}

#: Name → whether there is anything to draw, and what draws it.
_FIGURES: dict[str, tuple[Callable[[_View], bool], Callable[[Figure, _View], None]]] = {
    "roc": (lambda view: len(view.tables["roc"]) > 1, _draw_roc),
    "precision_recall": (_has_any("precision_recall", ["recall"]), _alone(_panel_precision_recall)),
    "score_distribution": (
        lambda view: any(row["lower"] < row["upper"] for row in view.tables["score_histogram"]),
        _alone(_panel_score_distribution),
    ),
    "calibration": (
        lambda view: any(row["rows"] >= 1 for row in view.tables["calibration"]),
        _alone(_panel_calibration),
    ),
    "per_day": (_has_any("per_day", [column for column, *_ in PER_DAY]), _draw_per_day),
    "per_scenario": (
        lambda view: any(row["frauds"] >= 1 and row["caught"] <= row["frauds"] for row in view.tables["per_scenario"]),
        _draw_per_scenario,
    ),
    "thresholds": (_has_any("thresholds", [column for column, *_ in THRESHOLDS]), _draw_thresholds),
    "feature_importances": (
        lambda view: sum(value for _, value in view.importances) > 0,
        _alone(_panel_feature_importances, count=MAX_BARS, letters=52, title_at="left"),
    ),
    "grid": (lambda view: bool(view.grid), _draw_grid),
}


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _markdown_heading(report: Mapping[str, Any], view: _View) -> str:
    outcome = report.get("outcome")
    if outcome == "trained" or outcome is None:
        best = _mapping(report.get("best"))
        text = _code(view.caption, 200)
        if best.get("learner"):
            learner = str(best["learner"])
            params = ", ".join(f"{name}={value}" for name, value in _mapping(best.get("params")).items())
            text += f"\n\nBest candidate: {_code(LEARNERS.get(learner, learner))}"
            text += f" with {_code(params, 200)}" if params else ""
        return text
    return f"Outcome: {_code(outcome)}. {_code(report.get('reason', 'no reason given'), 500)}"


def _markdown_metrics(view: _View) -> str:
    if not view.metrics:
        return ""
    champion = view.champion
    header = ["metric", "model", "interval"]
    if champion:
        header.append(f"champion {_code(champion[0])}" if champion[0] else "champion")
    rows = []
    for name, value in list(view.metrics.items())[:40]:
        bounds = view.intervals.get(name)
        cells = [_code(name), _figure(value), f"{_figure(bounds[0])} to {_figure(bounds[1])}" if bounds else ""]
        if champion:
            cells.append(_figure(champion[1].get(name)))
        rows.append(cells)
    return _markdown_table(header, rows)


def _markdown_thresholds(view: _View) -> str:
    rows = [
        [
            _figure(row["alerts_per_day"]),
            *(_share_of(row, column) for column in ("precision", "recall")),
            "" if "amount_caught" not in row else f"{row['amount_caught']:,.0f}",
            _share_of(row, "amount_share"),
        ]
        for row in view.tables["thresholds"][:20]
    ]
    header = ["alerts a day", "precision", "recall", "amount caught", "share of the frauds' amount"]
    return _markdown_table(header, rows) if rows else ""


def _markdown_grid(view: _View) -> str:
    rows = [
        [_code(learner), _code(", ".join(f"{name}={value}" for name, value in params.items()), 200), f"{score:.4f}"]
        for learner, params, score in view.grid[:5]
    ]
    if not rows:
        return ""
    title = f"candidates: best {len(rows)} of {len(view.grid)}"
    return _markdown_table([title, "parameters", "validation average precision"], rows)


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(value: Any, limit: int = 60) -> str:
    """A code span, the only markup in which links, HTML and emphasis are plain text.

    The two characters that could end the span or the table cell are replaced by look-alikes, because their escapes
    differ between Markdown readers.
    """
    text = _text(value, limit).replace("`", "ˋ").replace("|", "¦").strip()
    return f"`{text or '(empty)'}`"


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    if abs(value) >= 1e15:
        return f"{value:.3g}"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4f}"


def _share_of(row: Row, column: str) -> str:
    """A share in percent, with the ends of its interval where they are known."""
    if column not in row:
        return ""
    ends = _ends(row, column)
    return f"{100 * row[column]:.1f} %" + (f" ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})" if ends else "")
