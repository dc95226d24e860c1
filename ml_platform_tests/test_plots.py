"""Pictures and summary of a training report: they show the report's numbers, and texts from data literally."""

from __future__ import annotations

import base64
import copy
import io
import math
import re
import subprocess
import sys
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from ml_platform.escaping import printable
from ml_platform.model import plots
from ml_platform.model.plot_elements import png_of
from spark_jobs.evaluation.metrics import wilson_interval

INTERVALS = {"test_average_precision": (0.507, 0.588), "test_roc_auc": (0.884, 0.917)}
NAMES = ["overview", "per_scenario", "grid", "roc"]
PANELS = list(plots.OVERVIEW)


def with_bounds(name: str, share: float) -> dict[str, float]:
    return {name: share, f"{name}_lower": 0.9 * share, f"{name}_upper": 0.9 * share + 0.1}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The report of a training with 25 candidates, a champion, and 1% frauds in the held-out week."""
    steps = [step / 200 for step in range(201)]
    grid = [
        {"learner": "logistic_regression", "params": {"C": 0.1, "max_iter": 100}, "validation_average_precision": 0.61},
        *(
            {"learner": "xgboost", "params": {"max_depth": depth, "rounds": rounds, "max_bin": 1024}}
            | {"validation_average_precision": 0.7 + depth / 100 + rounds / 10_000}
            for depth in range(2, 10)
            for rounds in (20, 50, 100)
        ),
    ]
    return {
        "outcome": "trained",
        "cutoff": "2018-06-11",
        "windows": {"test": {"first_date": "2018-07-04", "last_date": "2018-07-10", "rows": 21_000, "frauds": 210}},
        "metrics": {
            "test_average_precision": 0.548,
            "test_roc_auc": 0.9,
            "test_card_precision_at_100": None,
            "test_rows": 21_000,
            "test_frauds": 210,
            "champion_test_average_precision": 0.482,
            "champion_test_roc_auc": 0.867,
        },
        "champion": {"version": "3", "status": "scored"},
        "grid": grid,
        "best": grid[-1],
        "feature_importances": {f"customer_mean_amount_{number}d": number / 351 for number in range(27)},
        "tables": {
            "roc": [{"false_positive_rate": step**9, "true_positive_rate": step} for step in steps],
            "precision_recall": [
                {"recall": step, "precision": 0.98 - 0.96 * step**4 + 0.02 * math.sin(1000 * step)}
                for step in steps[1:]
            ],
            "score_histogram": [
                {"lower": bin / 20, "upper": (bin + 1) / 20, "genuine": 20_000 // 2**bin, "frauds": abs(bin - 9)}
                for bin in range(20)
            ],
            "calibration": [
                {"mean_score": 0.001 * 1.6**bin, "fraud_share": 0.0014 * bin**1.5, "rows": 2100} for bin in range(10)
            ],
            "per_day": [
                {"date": f"2018-07-{day:02}", "rows": 3000, "frauds": 20 + day}
                | {"average_precision": 0.5 + day / 100, "roc_auc": 0.9}
                | with_bounds("precision_at_budget", 0.2)
                | with_bounds("recall_at_budget", 0.7)
                for day in range(4, 11)
            ],
            "per_scenario": [
                {"scenario": scenario, "frauds": frauds, "caught": caught}
                | with_bounds("recall_at_budget", caught / frauds)
                for scenario, frauds, caught in ((1, 7, 7), (2, 150, 120), (3, 53, 34))
            ],
            "thresholds": [
                {"alerts_per_day": budget, "amount_caught": 12_345.6}
                | with_bounds("precision", 20 / (20 + budget))
                | with_bounds("recall", budget / (30 + budget))
                | with_bounds("amount_share", budget / (10 + budget))
                for budget in (10, 20, 50, 100, 200, 500)
            ],
        },
    }


@pytest.fixture(scope="module")
def figures(report: dict[str, Any]) -> dict[str, Any]:
    return plots.build_figures(report, INTERVALS)


@pytest.fixture(scope="module")
def pictures(figures: dict[str, Any]) -> dict[str, bytes]:
    return {name: png_of(figure) for name, figure in figures.items()}


@pytest.fixture(scope="module")
def axes(figures: dict[str, Any]) -> dict[str, Any]:
    """Axes by the table that they show."""
    panels = dict(zip(PANELS, figures["overview"].axes, strict=True))
    return panels | {name: figures[name].axes[0] for name in NAMES[1:]}


def points(artist: Any) -> list[tuple[float, float]]:
    """The points of a line."""
    return [tuple(point) for point in artist.get_xydata().tolist()]


def segments(collection: Any) -> list[tuple[float, ...]]:
    """The two ends of each of a collection's lines."""
    return [tuple(segment.ravel().tolist()) for segment in collection.get_segments()]


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def rendered(summary: str) -> list[Any]:
    """What a Markdown reader that allows HTML and tables makes of the summary, flat."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(summary)
    return [part for token in tokens for part in (token, *(token.children or []))]


def pairs(rows: list[dict[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    return [(row[x], row[y]) for row in rows]


def bounds(rows: list[dict[str, Any]], column: str) -> list[tuple[float, float]]:
    return pairs(rows, f"{column}_lower", f"{column}_upper")


def test_lines_bars_and_intervals_are_the_numbers_of_the_report(report: dict[str, Any], axes: dict[str, Any]):
    tables = report["tables"]
    curve, base_rate, budgets = axes["precision_recall"].lines
    assert points(curve) == pairs(tables["precision_recall"], "recall", "precision")
    assert set(base_rate.get_ydata()) == {0.01}
    assert points(budgets) == pairs(tables["thresholds"], "recall", "precision")
    assert [note.get_text() for note in axes["precision_recall"].texts] == ["10", "20", "50", "100", "200", "500"]
    assert points(axes["roc"].lines[0]) == pairs(tables["roc"], "false_positive_rate", "true_positive_rate")

    for table, columns in (("thresholds", plots.THRESHOLDS), ("per_day", plots.PER_DAY)):
        lines = {line.get_label(): line.get_ydata().tolist() for line in axes[table].lines}
        assert lines == {label: [row[name] for row in tables[table]] for name, (label, *_) in columns.items()}
    assert ticks(axes["thresholds"].xaxis) == ["10", "20", "50", "100", "200", "500"]
    for name, band in zip(plots.THRESHOLDS, axes["thresholds"].collections, strict=True):
        corners = {(round(x), y) for x, y in band.get_paths()[0].vertices.tolist()}
        assert corners == {
            (place, end) for place, ends in enumerate(bounds(tables["thresholds"], name)) for end in ends
        }
    assert ticks(axes["per_day"].xaxis) == [f"07-{day:02}\n{20 + day}" for day in range(4, 11)]
    for name, bars in zip(("precision_at_budget", "recall_at_budget"), axes["per_day"].collections, strict=True):
        ends = enumerate(bounds(tables["per_day"], name))
        assert segments(bars) == [(place, lower, place, upper) for place, (lower, upper) in ends]
    band = axes["per_day"].patches[0]
    assert (band.get_y(), band.get_y() + band.get_height()) == INTERVALS["test_average_precision"]

    heights = [bar.get_height() for bar in axes["score_histogram"].patches]
    assert heights == [row[column] for column in ("genuine", "frauds") for row in tables["score_histogram"]]
    bins = pairs(tables["calibration"], "mean_score", "fraud_share")
    assert points(axes["calibration"].lines[1]) == bins
    intervals = [(x, *wilson_interval(share, 2100)) for x, share in bins]
    assert segments(axes["calibration"].collections[0]) == [(x, lower, x, upper) for x, lower, upper in intervals]
    assert bins[0] == (0.001, 0), "a bin without frauds is drawn too"

    assert [bar.get_width() for bar in axes["feature_importances"].patches] == [n / 351 for n in range(26, 16, -1)]
    assert ticks(axes["feature_importances"].yaxis)[0] == "customer_mean_amount_26d"
    scenarios = tables["per_scenario"]
    assert [bar.get_width() for bar in axes["per_scenario"].patches] == [row["recall_at_budget"] for row in scenarios]
    ends = enumerate(bounds(scenarios, "recall_at_budget"))
    assert segments(axes["per_scenario"].collections[0]) == [(low, place, high, place) for place, (low, high) in ends]
    assert [note.get_text() for note in axes["per_scenario"].texts] == ["7 of 7", "120 of 150", "34 of 53"]
    assert ticks(axes["grid"].yaxis)[:2] == ["xgboost: max_depth 9, rounds 100", "xgboost: max_depth 9, rounds 50"]
    assert len(axes["grid"].collections[0].get_offsets()) == plots.MAX_CANDIDATES
    assert axes["grid"].collections[0].get_offsets()[0].tolist() == pytest.approx([0.8, 0])


def test_titles_have_intervals_and_the_champion(report: dict[str, Any], figures: dict[str, Any], axes: dict[str, Any]):
    titles = {name: ax.get_title(loc="left") for name, ax in axes.items()}
    assert titles["precision_recall"] == "Average precision 0.548 (0.507 to 0.588)\nChampion (version 3): 0.482"
    assert titles["roc"] == "Area under the ROC curve 0.900 (0.884 to 0.917)\nChampion (version 3): 0.867"
    assert titles["grid"] == "Search: best 20 of 25 candidates"
    assert titles["calibration"] == "Calibration\n381 frauds expected, 326 found"
    assert {figure.get_supxlabel() for figure in figures.values()} == {
        "Held-out test 2018-07-04 to 2018-07-10: 21,000 rows, 210 frauds. Model cut-off 2018-06-11."
    }
    without = report | {"champion": None, "metrics": {"test_roc_auc": 0.9}, "tables": {"roc": report["tables"]["roc"]}}
    roc = plots.build_figures(without, {})["roc"].axes[0]
    assert roc.get_title(loc="left") == "Area under the ROC curve 0.900"


def test_panels_stay_inside_the_pictures_and_apart(figures: dict[str, Any], pictures: dict[str, bytes]):
    for name, figure in figures.items():
        width, height = figure.canvas.get_width_height()
        # With titles, labels and legends.
        boxes = [ax.get_tightbbox(figure.canvas.get_renderer()) for ax in figure.axes]
        assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes), name
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])], name


def test_pictures_are_small_and_the_same_each_time(report: dict[str, Any], pictures: dict[str, bytes]):
    from PIL import Image

    assert list(pictures) == NAMES
    for png in pictures.values():
        image = Image.open(io.BytesIO(png))
        # No date and no software: the bytes depend on nothing but the report.
        assert (image.format, image.mode, image.info) == ("PNG", "P", {})
    assert sum(map(len, pictures.values())) < 100_000
    assert plots.draw_figures(copy.deepcopy(report), intervals=INTERVALS) == pictures


def test_a_panel_without_data_is_left_out(report: dict[str, Any]):
    too_little = {"outcome": "too_little_data", "reason": "20 days", "windows": {}}
    assert plots.draw_figures(too_little) == {}
    assert plots.markdown_summary(too_little, {}, limit=100_000) == "No model: 20 days\n"
    # One class: neither curves nor ranking metrics.
    tables = report["tables"] | {"roc": [], "precision_recall": [], "per_scenario": []}
    none = dict.fromkeys(
        ("average_precision", "roc_auc", *(f"recall_at_budget{end}" for end in ("", "_lower", "_upper")))
    )
    tables["per_day"] = [row | none for row in tables["per_day"]]
    metrics = {"test_average_precision": None, "test_roc_auc": None, "test_rows": 21_000, "test_frauds": 0}
    one_class = report | {"tables": tables, "metrics": metrics, "champion": None}
    figures = plots.build_figures(one_class, {})
    assert list(figures) == ["overview", "grid"]
    assert len(figures["overview"].axes) == len(PANELS) - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png_of(figures["overview"])
    assert "| ROC AUC |  |  |  |" in plots.markdown_summary(one_class, {}, limit=100_000)
    assert plots.build_figures(report | {"tables": {}, "feature_importances": {"a": 0.0}}, {}).keys() == {
        "overview",
        "grid",
    }


def test_many_days_have_few_labels(report: dict[str, Any]):
    day = report["tables"]["per_day"][0]
    days = [day | {"date": f"2018-07-{number:02}"} for number in range(1, 31)]
    figure = plots.build_figures(report | {"tables": {"per_day": days}, "feature_importances": {}}, {})["overview"]
    assert [label[:5] for label in ticks(figure.axes[0].xaxis)] == [f"07-{n:02}" for n in range(1, 31, 5)]


def hostile(report: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """The report with these texts wherever a text comes from data."""
    candidates = [
        {"learner": text, "params": {text: number}, "validation_average_precision": 0.5}
        for text in texts
        for number in (1, 2)
    ]
    days = [report["tables"]["per_day"][0] | {"date": f"2018-{text}"} for text in texts]
    test = {"first_date": texts[0], "last_date": texts[0], "rows": 10, "frauds": 2}
    return report | {
        "cutoff": texts[0],
        "windows": {"test": test},
        "grid": candidates,
        "best": candidates[0],
        "feature_importances": dict.fromkeys(texts, 1.0),
        "tables": {"per_day": days},
    }


def test_texts_from_data_are_drawn_literally(report: dict[str, Any]):
    from matplotlib.text import Text

    texts = ["$\\frac{", "$x$", "<b>bold</b>", "a\nb", "\x1b[31m\u202e", "x" * 5000]
    figures = plots.build_figures(hostile(report, texts), {})
    with warnings.catch_warnings():
        # Such as for a character that the font lacks.
        warnings.simplefilter("error")
        for figure in figures.values():
            png_of(figure)
    names = ticks(figures["overview"].axes[1].yaxis)
    assert names == ["\\x1b[31m\\u202e", "$\\frac{", "$x$", "<b>bold</b>", "a\\nb", "x" * 33 + "…"]
    assert ticks(figures["grid"].axes[0].yaxis)[0] == "$\\frac{: $\\frac{ 1"
    with_dollars = [text for figure in figures.values() for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(with_dollars) >= 9
    assert not [text for text in with_dollars if text.get_parse_math()]


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "![pixel](https://evil.example/p.png) [click](https://evil.example) <https://evil.example>",
        "`code` **bold** _emphasis_ | cell | &lt;b&gt;",
        "# heading\n\n    code\n```\nfence\n```",
        "x" * 5000,
    ],
)
def test_texts_from_data_stay_plain_text(report: dict[str, Any], text: str):
    summary = plots.markdown_summary(hostile(report, [text]) | {"tables": {}}, {}, limit=100_000)
    tokens = [token for token in rendered(summary) if token.type not in ("inline", "text", "code_inline")]
    assert {token.tag for token in tokens} == {"p", "table", "thead", "tbody", "tr", "th", "td"}
    plain = " ".join(token.content for token in rendered(summary) if token.type == "text").replace("\u200b", "")
    assert " ".join(printable(text).split())[:60] in plain
    assert len(summary.encode()) < 5_000


def test_the_summary_has_the_metrics_the_budgets_and_the_pictures(report: dict[str, Any], pictures: dict[str, bytes]):
    summary = plots.markdown_summary(report, pictures, intervals=INTERVALS, limit=200_000)
    lines = summary.splitlines()
    assert lines[0] == "Held-out test 2018-07-04 to 2018-07-10: 21,000 rows, 210 frauds. Model cut-off 2018-06-11."
    assert lines[2] == "Best of 25 candidates: xgboost, max_depth=9, rounds=100, max_bin=1024"
    for line in (
        "| metric | model | interval | champion 3 |",
        "| average precision | 0.5480 | 0.5070 to 0.5880 | 0.4820 |",
        "| alerts a day | precision | recall | share of the frauds' amount | amount caught |",
        "| 10 | 66.7% (60.0 to 70.0) | 25.0% (22.5 to 32.5) | 50.0% (45.0 to 55.0) | 12,346 |",
    ):
        assert line in lines
    images = [token for token in rendered(summary) if token.type == "image"]
    assert {
        image.content: base64.b64decode(image.attrs["src"].removeprefix("data:image/png;base64,")) for image in images
    } == pictures


@pytest.mark.parametrize("limit", [5_000, 50_000, 100_000])
def test_the_summary_stays_within_its_limit(report: dict[str, Any], pictures: dict[str, bytes], limit: int):
    summary = plots.markdown_summary(report, pictures, limit=limit)
    assert len(summary.encode()) <= limit
    shown = [token.content for token in rendered(summary) if token.type == "image"]
    named = re.findall(r"(\w+)(?=[,.])", summary.rpartition("small:")[2])
    assert sorted(shown + named) == sorted(NAMES), "a picture is either shown or named"
    assert limit < 100_000 or {"overview", "per_scenario", "grid"} <= set(shown)


def test_drawing_needs_no_display_and_leaves_no_global_state():
    code = """
import sys
from ml_platform.model import plots
assert not {"matplotlib", "numpy", "PIL"} & set(sys.modules), "imported too early"
import matplotlib
def parameters():
    # To look at the backend would choose one, and import pyplot.
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
before = parameters()
window = {"first_date": "2018-07-04", "last_date": "2018-07-10", "rows": 10, "frauds": 2}
report = {"windows": {"test": window}, "cutoff": "a", "feature_importances": {"a": 1.0}}
assert set(plots.draw_figures(report)) == {"overview"}
assert "matplotlib.pyplot" not in sys.modules, "pyplot"
assert parameters() == before, "rcParams"
"""
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=root, timeout=120)
