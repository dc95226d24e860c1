"""Plots of a training report, and a Markdown summary with these plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ml_platform.escaping import markdown, markdown_table
from ml_platform.model.card import METRIC_LABELS
from ml_platform.model.plot_elements import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PURPLE,
    SKY,
    VERMILION,
    add_legend,
    add_note,
    as_percent,
    markdown_image,
    name_rows,
    new_figure,
    png_of,
    set_labels,
    shorten,
    styled,
)
from spark_jobs.evaluation.metrics import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = Mapping[str, Any]
Row = Mapping[str, Any]
Intervals = Mapping[str, tuple[float, float]]
Panel = Callable[["Axes", Report, Intervals], None]

#: Maximum numbers of features, candidates and date labels in a plot; more would be unreadable.
MAX_FEATURES = 10
MAX_CANDIDATES = 20
MAX_DATES = 7

#: Plotted columns of the tables ``per_day`` and ``thresholds``, with label, colour and marker.
PER_DAY = {
    "average_precision": ("average precision", BLUE, "o"),
    "roc_auc": ("ROC AUC", GREEN, "s"),
    "precision_at_budget": ("precision at budget", VERMILION, "^"),
    "recall_at_budget": ("recall at budget", PURPLE, "D"),
}
THRESHOLDS = {
    "precision": ("precision", VERMILION, "^"),
    "recall": ("recall", PURPLE, "D"),
    "amount_share": ("share of the frauds' amount", GREEN, "s"),
}


def draw_figures(report: Report, *, intervals: Intervals | None = None) -> dict[str, bytes]:
    """Draw the plots of a training report as PNG: name → bytes, the most useful first.

    ``overview`` has up to six panels (precision and recall, alert budgets, figures per day, scores, calibration,
    importances); ``per_scenario``, ``grid`` (the candidates of the search) and ``roc`` are separate plots. A panel
    without data is omitted, because an empty axis would look like a result. The same report gives the same bytes.

    Args:
        report: report of the job ``train_model``; `ml_platform.model.evaluation` documents its tables.
        intervals: metric (``test_average_precision``, ``test_roc_auc``) → its lower and upper bound.
    """
    return {name: png_of(figure) for name, figure in build_figures(report, intervals or {}).items()}


def build_figures(report: Report, intervals: Intervals) -> dict[str, Figure]:
    """Build the plots of `draw_figures` as matplotlib figures."""
    data = {**report.get("tables", {}), **{name: report.get(name) for name in ("grid", "feature_importances")}}
    figures = {}
    panels = [panel for name, panel in OVERVIEW.items() if data.get(name)]
    if panels:
        # As wide as the dialog of Dagster's UI, which is about 980 pixels.
        figures["overview"] = new_figure(_caption(report), width=9.6, height=10.2)
        # Subfigures have separate layouts, so that long names in one panel do not narrow the panel above it.
        for panel, cell in zip(panels, figures["overview"].subfigures(3, 2, squeeze=False).flat, strict=False):
            panel(styled(cell.subplots()), report, intervals)
    for name, panel in DETAILS.items():
        if data.get(name):
            figures[name] = new_figure(_caption(report), width=7, height=4)
            panel(styled(figures[name].subplots()), report, intervals)
    return figures


def markdown_summary(
    report: Report, pngs: Mapping[str, bytes], *, intervals: Intervals | None = None, limit: int
) -> str:
    """Summarize a training report as Markdown, for the metadata of a Dagster asset.

    Contains tables of the metrics, with intervals and the champion's values, and of the alert budgets, then the plots
    as ``data:`` URIs. Dagster stores metadata in its database and loads it with every page that shows it, so the text
    stays within `limit` bytes: plots that do not fit are only named. The tables alone take less than 5 kB.

    Args:
        report: report of the job ``train_model``, of any outcome.
        pngs: the plots of `draw_figures`.
        intervals: as in `draw_figures`.
        limit: maximum size of the text in bytes.
    """
    if report["outcome"] != "trained":
        return f"No model: {markdown(shorten(report['reason'], 500))}\n"
    best = report["best"]
    best_candidate = ", ".join([best["learner"], *(f"{name}={value}" for name, value in best["params"].items())])
    parts = [
        markdown(_caption(report)),
        f"Best of {len(report['grid'])} candidates: {markdown(shorten(best_candidate, 300))}",
        "Figures of the held-out week, with 95% intervals:",
        _metrics_table(report, intervals or {}),
        "What a number of alerts a day would have caught in that week, with 95% intervals:",
        _thresholds_table(report.get("tables", {}).get("thresholds", [])),
    ]
    # Reserve 200 bytes for the line that names omitted plots.
    remaining = limit - 200 - sum(len(part.encode()) + 2 for part in parts)
    omitted = []
    for name, png in pngs.items():
        image = markdown_image(name, png)
        if len(image) + 2 <= remaining:
            remaining -= len(image) + 2
            parts.append(image)
        else:
            omitted.append(name)
    if omitted:
        parts.append(f"Only in MLflow, to keep this entry small: {', '.join(omitted)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


# --- Panels -----------------------------------------------------------------------------------------------------------


def _precision_recall(ax: Axes, report: Report, intervals: Intervals) -> None:
    curve, budgets = report["tables"]["precision_recall"], report["tables"]["thresholds"]
    # Average precision is the area under these steps: each precision applies from the previous recall.
    ax.plot(_column(curve, "recall"), _column(curve, "precision"), color=BLUE, drawstyle="steps-pre", label="model")
    base_rate = report["metrics"]["test_frauds"] / report["metrics"]["test_rows"]
    ax.axhline(base_rate, color=GREY, linewidth=1, linestyle="--", label=f"no skill ({100 * base_rate:.2g}% frauds)")
    points = list(zip(_column(budgets, "recall"), _column(budgets, "precision"), strict=True))
    ax.plot(*zip(*points, strict=True), "o", color=VERMILION, markersize=5, label="alerts a day")
    for row, point in zip(budgets, points, strict=True):
        add_note(ax, f"{row['alerts_per_day']}", point, offset=(5, 6), color=VERMILION)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.08))
    as_percent(ax.xaxis, ax.yaxis)
    title = _title("Average precision", "test_average_precision", report, intervals)
    set_labels(ax, title, "recall (share of frauds found)", "precision (share of alerts that are frauds)")
    add_legend(ax, "best")


def _thresholds(ax: Axes, report: Report, intervals: Intervals) -> None:
    rows = report["tables"]["thresholds"]
    _share_lines(ax, rows, THRESHOLDS, partial(ax.fill_between, linewidth=0))
    ax.set_xticks(range(len(rows)), [f"{row['alerts_per_day']:,}" for row in rows])
    set_labels(ax, "Daily budgets of alerts\nBands: 95% intervals", "alerts a day", "")


def _per_day(ax: Axes, report: Report, intervals: Intervals) -> None:
    days = report["tables"]["per_day"]
    _share_lines(ax, days, PER_DAY, partial(ax.vlines, linewidth=3))
    title = "Figures per day (bars: 95% intervals)"
    if "test_average_precision" in intervals:
        ax.axhspan(*intervals["test_average_precision"], color=BLUE, alpha=0.12, linewidth=0)
        title += "\nBand: interval of the average precision"
    shown = range(0, len(days), math.ceil(len(days) / MAX_DATES))
    # The year is in the caption.
    dates = [f"{shorten(days[place]['date'][5:], 10)}\n{days[place]['frauds']:,}" for place in shown]
    ax.set_xticks(shown, dates, parse_math=False)
    set_labels(ax, title, "day (UTC) and its number of frauds", "")


def _score_histogram(ax: Axes, report: Report, intervals: Intervals) -> None:
    bins = report["tables"]["score_histogram"]
    middles = [(row["lower"] + row["upper"]) / 2 for row in bins]
    for column, colour, width in (("genuine", SKY, 0.94), ("frauds", VERMILION, 0.46)):
        widths = [(row["upper"] - row["lower"]) * width for row in bins]
        ax.bar(middles, _column(bins, column), width=widths, color=colour, label=column)
    ax.set_yscale("log")
    # A bin with one row stays visible.
    ax.set_ylim(bottom=0.6)
    ax.yaxis.set_major_formatter("{x:,.0f}")
    set_labels(ax, "Scores of genuine rows and frauds", "score (probability of fraud)", "rows (log scale)")
    add_legend(ax, "upper right")


def _calibration(ax: Axes, report: Report, intervals: Intervals) -> None:
    bins = report["tables"]["calibration"]
    scores, shares, rows = (_column(bins, name) for name in ("mean_score", "fraud_share", "rows"))
    # Rows are treated as independent, although rows of one card are correlated.
    lower, upper = zip(*(wilson_interval(share, count) for share, count in zip(shares, rows, strict=True)), strict=True)
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfect calibration")
    ax.vlines(scores, lower, upper, color=BLUE, linewidth=1.2, label="95% interval")
    ax.plot(scores, shares, "o", color=BLUE, markersize=5, label="bin of rows")
    # A symmetric log scale, because most scores are far below 1% and bins without frauds are at 0.
    for set_scale in (ax.set_xscale, ax.set_yscale):
        set_scale("symlog", linthresh=1e-4, linscale=0.4)
    limits, ticks = (-2e-5, min(1, 2 * max(*scores, *upper))), (0, 1e-4, 1e-3, 1e-2, 0.1, 1)
    ax.set(xticks=ticks, yticks=ticks, xlim=limits, ylim=limits)
    as_percent(ax.xaxis, ax.yaxis)
    expected = sum(row["mean_score"] * row["rows"] for row in bins)
    actual = sum(row["fraud_share"] * row["rows"] for row in bins)
    title = f"Calibration\n{expected:,.0f} frauds expected, {actual:,.0f} found"
    set_labels(ax, title, "mean score of the bin (log scale)", "share of frauds (log scale)")
    add_legend(ax, "upper left")


def _feature_importances(ax: Axes, report: Report, intervals: Intervals) -> None:
    importances = sorted(report["feature_importances"].items(), key=lambda item: (-item[1], item[0]))
    best = importances[:MAX_FEATURES]
    total = sum(report["feature_importances"].values()) or 1.0
    shares = [value / total for _, value in best]
    ax.barh(range(len(best)), shares, height=0.68, color=BLUE)
    for place, share in enumerate(shares):
        add_note(ax, f"{100 * share:.1f}%", (share, place))
    name_rows(ax, [name for name, _ in best], limit=34)
    ax.set_xlim(0, 1.3 * max(shares) or 1.0)
    as_percent(ax.xaxis)
    set_labels(ax, f"Top {len(best)} of {len(importances)} features", "share of all importances", "")


def _per_scenario(ax: Axes, report: Report, intervals: Intervals) -> None:
    rows = report["tables"]["per_scenario"]
    places, upper = range(len(rows)), _column(rows, "recall_at_budget_upper")
    ax.barh(places, _column(rows, "recall_at_budget"), height=0.55, color=SKY)
    ax.hlines(places, _column(rows, "recall_at_budget_lower"), upper, color=INK, linewidth=1.4)
    for place, row in enumerate(rows):
        add_note(ax, f"{row['caught']:,} of {row['frauds']:,}", (upper[place], place))
    name_rows(ax, [f"scenario {row['scenario']}" for row in rows])
    # Leave room for the counts to the right of a full bar.
    ax.set(xlim=(0, 1.2), xticks=(0, 0.2, 0.4, 0.6, 0.8, 1))
    as_percent(ax.xaxis)
    title = "Frauds caught per scenario at the daily alert budget (lines: 95% intervals)"
    set_labels(ax, title, "recall (share of the scenario's frauds that are among the alerts)", "")


def _grid(ax: Axes, report: Report, intervals: Intervals) -> None:
    # The sort is stable: ties keep the search order.
    grid = sorted(report["grid"], key=lambda candidate: -candidate["validation_average_precision"])
    best = grid[:MAX_CANDIDATES]
    scores = _column(best, "validation_average_precision")
    colours = [BLUE if candidate["learner"] == best[0]["learner"] else VERMILION for candidate in best]
    ax.scatter(scores, range(len(best)), color=colours, s=30)
    labels = []
    for place, candidate in enumerate(best):
        add_note(ax, f"{scores[place]:.4f}", (scores[place], place))
        # Show only the parameters in which the learner's candidates differ.
        others = [other["params"] for other in grid if other["learner"] == candidate["learner"]]
        params = candidate["params"].items()
        varied = [f"{name} {value}" for name, value in params if any(other.get(name) != value for other in others)]
        labels.append(candidate["learner"] + (f": {', '.join(varied)}" if varied else ""))
    name_rows(ax, labels)
    # Leave room for the numbers next to the points.
    spread = max(scores[0] - scores[-1], 0.01)
    ax.set_xlim(scores[-1] - 0.1 * spread, scores[0] + 0.25 * spread)
    title = f"Search: best {len(best)} of {len(grid)} candidates"
    set_labels(ax, title, "average precision on the validation window (axis does not begin at 0)", "")


def _roc(ax: Axes, report: Report, intervals: Intervals) -> None:
    curve = report["tables"]["roc"]
    x, y = _column(curve, "false_positive_rate"), _column(curve, "true_positive_rate")
    ax.plot(x, y, color=BLUE, label="model")
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="chance")
    as_percent(ax.xaxis, ax.yaxis)
    title = _title("Area under the ROC curve", "test_roc_auc", report, intervals)
    set_labels(ax, title, "false positive rate (share of genuine rows)", "true positive rate (share of frauds)")
    add_legend(ax, "lower right")


#: Tables of the report and their panels in reading order: those in the overview, and separate plots.
OVERVIEW: dict[str, Panel] = {
    "precision_recall": _precision_recall,
    "thresholds": _thresholds,
    "per_day": _per_day,
    "score_histogram": _score_histogram,
    "calibration": _calibration,
    "feature_importances": _feature_importances,
}
DETAILS: dict[str, Panel] = {"per_scenario": _per_scenario, "grid": _grid, "roc": _roc}


# --- Plot elements ----------------------------------------------------------------------------------------------------


def _title(name: str, metric: str, report: Report, intervals: Intervals) -> str:
    """Title of a metric with its interval and the champion's value, if known."""
    title = f"{name} {report['metrics'][metric]:.3f}"
    if metric in intervals:
        title += " ({:.3f} to {:.3f})".format(*intervals[metric])
    champion = report["metrics"].get(f"champion_{metric}")
    if champion is not None:
        title += f"\nChampion (version {report['champion']['version']}): {champion:.3f}"
    return title


def _caption(report: Report) -> str:
    test = report["windows"]["test"]
    text = (
        f"Held-out test {test['first_date']} to {test['last_date']}: {test['rows']:,} rows, {test['frauds']:,} frauds."
    )
    return shorten(f"{text} Model cut-off {report['cutoff']}.", 300)


def _share_lines(
    ax: Axes, rows: Sequence[Row], columns: Mapping[str, tuple[str, str, str]], draw_intervals: Callable[..., Any]
) -> None:
    """Plot lines of shares with their intervals; the legend is below the axes, where it covers no line."""
    places = range(len(rows))
    for column, (label, colour, marker) in columns.items():
        ax.plot(places, _column(rows, column), color=colour, marker=marker, markersize=4.5, label=label)
        if f"{column}_lower" in rows[0]:
            bounds = (_column(rows, f"{column}_{end}") for end in ("lower", "upper"))
            draw_intervals(places, *bounds, color=colour, alpha=0.25)
    ax.set(ylim=(-0.02, 1.04), yticks=(0, 0.2, 0.4, 0.6, 0.8, 1))
    as_percent(ax.yaxis)
    add_legend(ax, "upper left", columns=2, below=True)


def _column(rows: Sequence[Row], name: str) -> list[float]:
    """Column of a table; undefined values become NaN, which matplotlib does not draw."""
    return [math.nan if row[name] is None else row[name] for row in rows]


# --- Tables of the summary --------------------------------------------------------------------------------------------


def _metrics_table(report: Report, intervals: Intervals) -> str:
    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"

    metrics, champion = report["metrics"], report.get("champion") or {}
    rows = []
    for name, value in metrics.items():
        if not name.startswith("champion_") and name not in ("test_rows", "test_frauds"):
            interval = " to ".join(map(shown, intervals.get(name, ())))
            label = METRIC_LABELS.get(name.removeprefix("test_"), f"`{name}`")
            rows.append((label, shown(value), interval, shown(metrics.get(f"champion_{name}"))))
    return markdown_table(("metric", "model", "interval", f"champion {champion.get('version', '')}".strip()), rows)


def _thresholds_table(thresholds: Sequence[Row]) -> str:
    def shown(row: Row, column: str) -> str:
        share, lower, upper = (row[f"{column}{end}"] for end in ("", "_lower", "_upper"))
        return "" if share is None else f"{100 * share:.1f}% ({100 * lower:.1f} to {100 * upper:.1f})"

    rows = [
        (f"{row['alerts_per_day']:,}", *(shown(row, column) for column in THRESHOLDS), f"{row['amount_caught']:,.0f}")
        for row in thresholds
    ]
    header = ("alerts a day", *(label for label, *_ in THRESHOLDS.values()), "amount caught")
    return markdown_table(header, rows) if rows else ""
