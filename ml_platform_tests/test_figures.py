"""Pictures of a training report: what they say, that they are the same each time, that odd data cannot harm them."""

from __future__ import annotations

import base64
import re
import struct
import subprocess
import sys
import warnings
from collections.abc import Mapping
from datetime import date, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from ml_platform.model import plots
from ml_platform.model.evaluation import wilson_interval

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "overview",
    "roc",
    "precision_recall",
    "score_distribution",
    "calibration",
    "per_day",
    "per_scenario",
    "thresholds",
    "feature_importances",
    "grid",
}
INTERVALS = {"test_average_precision": (0.507, 0.588), "test_roc_auc": (0.884, 0.917)}
#: Tables whose picture has another name.
PICTURE_OF = {"score_histogram": "score_distribution"}
BUDGETS = (10, 20, 50, 100, 200, 500)


def with_bounds(name: str, found: Any) -> dict[str, float]:
    """A share with its interval, as the training job reports them."""
    share = float(found.mean())
    low, high = wilson_interval(share, len(found))
    return {name: share, f"{name}_lower": low, f"{name}_upper": high}


def realistic_report(days: int = 7, rows_per_day: int = 3000) -> dict[str, Any]:
    """The report of a model on invented scores: few frauds, of which a fifth look like any other row."""
    import numpy as np
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

    random = np.random.default_rng(7)
    rows = days * rows_per_day
    day = np.repeat(np.arange(days), rows_per_day)
    label = random.random(rows) < 0.01
    scenario = np.where(label, random.choice([1, 2, 3], rows, p=[0.05, 0.7, 0.25]), 0)
    suspicious = random.random(rows) < np.where(label, 0.8, 0.015)
    score = np.where(suspicious, random.beta(np.where(label, 4, 1.2), 1.8, rows), random.beta(0.6, 200, rows))
    amount = np.where(scenario == 1, random.uniform(220, 400, rows), random.gamma(2, 27, rows))

    def alerts(budget: int) -> Any:
        chosen = np.zeros(rows, dtype=bool)
        for number in range(days):
            inside = np.flatnonzero(day == number)
            chosen[inside[np.argsort(-score[inside], kind="stable")[:budget]]] = True
        return chosen

    def thinned(x: Any, y: Any, names: tuple[str, str]) -> list[dict[str, float]]:
        # Evenly along the curve, so that its steep parts keep their points.
        length = np.cumsum(np.hypot(np.diff(x, prepend=x[0]), np.diff(y, prepend=y[0])))
        kept = np.unique(np.searchsorted(length, np.linspace(0, length[-1], 200)).clip(max=len(x) - 1))
        return [{names[0]: float(x[number]), names[1]: float(y[number])} for number in kept]

    fpr, tpr, _ = roc_curve(label, score)
    precision, recall, _ = precision_recall_curve(label, score)
    edges = np.linspace(0, 1, 21)
    genuine, frauds = (np.histogram(score[label == value], edges)[0] for value in (False, True))
    budgeted = alerts(100)
    average_precision, roc_auc = float(average_precision_score(label, score)), float(roc_auc_score(label, score))
    importances = np.sort(random.dirichlet(np.full(27, 0.35)))[::-1]
    names = ["terminal_known_fraud_count_21d", "customer_amount_ratio_to_recent_maximum_30d", "tx_amount"]
    names += [f"customer_mean_amount_{number}d" for number in range(24)]
    grid = [
        {"learner": "xgboost", "params": {"max_depth": depth, "rounds": iterations, "max_bin": 1024}}
        for depth in (4, 5, 6)
        for iterations in (20, 50)
    ]
    grid += [{"learner": "another", "params": {"rounds": 100, "max_depth": depth}} for depth in (8, 12)]
    grid += [
        {"learner": "logistic_regression", "params": {"C": reg, "max_iter": iterations}}
        for reg in (0, 0.1, 0.5)
        for iterations in (100, 500, 1000)
    ]
    for number, candidate in enumerate(grid):
        candidate["validation_average_precision"] = 0.74 - 0.008 * number
    first = date(2018, 7, 4)
    return {
        "outcome": "trained",
        "cutoff": "2018-06-11",
        "windows": {
            "test": {
                "first_date": first.isoformat(),
                "last_date": (first + timedelta(days=days - 1)).isoformat(),
                "rows": rows,
                "frauds": int(label.sum()),
            }
        },
        "metrics": {
            "test_average_precision": average_precision,
            "test_roc_auc": roc_auc,
            "test_card_precision_at_100": 0.271,
            "test_rows": rows,
            "test_frauds": int(label.sum()),
            "champion_test_average_precision": average_precision - 0.051,
            "champion_test_roc_auc": roc_auc - 0.02,
        },
        "champion": {"version": "3", "status": "scored"},
        "grid": grid,
        "best": grid[0],
        "feature_importances": dict(zip(names, importances.tolist(), strict=True)),
        "tables": {
            "roc": thinned(fpr, tpr, ("false_positive_rate", "true_positive_rate")),
            "precision_recall": thinned(recall[::-1], precision[::-1], ("recall", "precision")),
            "score_histogram": [
                {
                    "lower": float(edges[number]),
                    "upper": float(edges[number + 1]),
                    "genuine": int(genuine[number]),
                    "frauds": int(frauds[number]),
                }
                for number in range(20)
            ],
            "calibration": [
                {"mean_score": float(score[part].mean()), "fraud_share": float(label[part].mean()), "rows": len(part)}
                for part in np.array_split(np.argsort(score, kind="stable"), 10)
            ],
            "per_day": [
                {
                    "date": (first + timedelta(days=number)).isoformat(),
                    "rows": rows_per_day,
                    "frauds": int(label[day == number].sum()),
                    "average_precision": float(average_precision_score(label[day == number], score[day == number])),
                    "roc_auc": float(roc_auc_score(label[day == number], score[day == number])),
                    **with_bounds("precision_at_budget", label[budgeted & (day == number)]),
                    **with_bounds("recall_at_budget", budgeted[label & (day == number)]),
                }
                for number in range(days)
            ],
            "per_scenario": [
                {
                    "scenario": number,
                    "frauds": int((scenario == number).sum()),
                    "caught": int(budgeted[scenario == number].sum()),
                    **with_bounds("recall_at_budget", budgeted[scenario == number]),
                }
                for number in (1, 2, 3)
            ],
            "thresholds": [
                {
                    "alerts_per_day": budget,
                    **with_bounds("precision", label[chosen]),
                    **with_bounds("recall", chosen[label]),
                    "amount_caught": float(amount[chosen & label].sum()),
                    "amount_share": float(amount[chosen & label].sum() / amount[label].sum()),
                }
                for budget in BUDGETS
                for chosen in [alerts(budget)]
            ],
        },
    }


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return realistic_report()


@pytest.fixture(scope="module")
def built(report: dict[str, Any]) -> Mapping[str, Any]:
    return plots.build_figures(report, intervals=INTERVALS)


@pytest.fixture(scope="module")
def pictures(built: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: plots._png(figure) for name, figure in built.items()}


def only(report: Mapping[str, Any], *tables: str) -> dict[str, Any]:
    """The report with these tables and without grid and importances."""
    rest = {name: value for name, value in report.items() if name not in ("grid", "feature_importances")}
    return rest | {"tables": {name: report["tables"][name] for name in tables}}


def texts(figure: Any) -> list[str]:
    """All texts of a figure, drawn or not."""
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def chunks(png: bytes) -> list[bytes]:
    """The types of a PNG's chunks (https://www.w3.org/TR/png-3/#5Chunk-layout)."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        found.append(png[at + 4 : at + 8])
        at += 12 + length
    assert at == len(png)
    return found


def test_every_picture_is_a_small_png_of_the_expected_size(pictures: dict[str, bytes]):
    assert set(pictures) == NAMES
    for name, png in pictures.items():
        assert len(png) < 80_000, name
        # Nothing but the image: no date, no software, no text.
        assert set(chunks(png)) == {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
        width, height = struct.unpack(">II", png[16:24])
        assert (width, height) == ((1320, 748) if name == "overview" else (770, 495))


def test_the_colours_survive_the_palette(pictures: dict[str, bytes]):
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(pictures["overview"])).convert("RGB")
    found = {"#{:02X}{:02X}{:02X}".format(*colour) for _, colour in image.getcolors(1000)}
    used = {plots.BLUE, plots.VERMILION, plots.GREEN, plots.PURPLE, plots.SKY, plots.GREY, "#FFFFFF"}
    assert used <= found


def test_equal_reports_give_equal_bytes(report: dict[str, Any], pictures: dict[str, bytes]):
    again = only(report, "calibration", "thresholds")
    again["tables"]["thresholds"] = again["tables"]["thresholds"][::-1]
    again["tables"]["calibration"] = [dict(reversed(list(row.items()))) for row in again["tables"]["calibration"]]
    drawn = plots.draw_figures(again, intervals=INTERVALS)
    assert set(drawn) == {"overview", "calibration", "thresholds"}
    assert drawn["calibration"] == pictures["calibration"]
    assert drawn["thresholds"] == pictures["thresholds"]


def test_other_numbers_give_another_picture(report: dict[str, Any], pictures: dict[str, bytes]):
    other = only(report, "per_scenario")
    other["tables"]["per_scenario"] = [row | {"caught": row["caught"] // 2} for row in other["tables"]["per_scenario"]]
    assert plots.draw_figures(other)["per_scenario"] != pictures["per_scenario"]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("roc", {"false positive rate (share of genuine rows)", "true positive rate (share of frauds)"}),
        ("precision_recall", {"recall (share of frauds found)", "precision (share of alerts that are frauds)"}),
        ("score_distribution", {"score (probability of fraud, 0 to 1)", "rows (log scale)"}),
        ("calibration", {"mean score of the bin (log scale)", "share of frauds (log scale)"}),
        ("per_day", {"day (UTC)", "count (log scale)", "metric", "07-04\n2018", "07-10"}),
        ("per_scenario", {"recall (share of the scenario's frauds that are among the alerts)", "fraud scenario"}),
        ("thresholds", {"alerts a day (log scale)", "share", "amount (unit of tx_amount)"}),
        ("feature_importances", {"importance (share of the sum)", "customer_amount_ratio_to_recent_maximum_30d"}),
        ("grid", {"average precision on the validation window (axis does not begin at 0)"}),
    ],
)
def test_axes_and_captions_say_what_is_shown(built: Mapping[str, Any], report: dict[str, Any], name: str, labels: set):
    shown = texts(built[name])
    assert labels <= set(shown)
    frauds = report["metrics"]["test_frauds"]
    caption = f"Held-out test 2018-07-04 to 2018-07-10: 21,000 rows, {frauds} frauds. Model cut-off 2018-06-11."
    assert built[name].get_supxlabel() == caption


def test_titles_have_interval_and_champion(built: Mapping[str, Any], report: dict[str, Any]):
    metrics = report["metrics"]
    assert built["roc"].get_suptitle() == (
        f"Area under the ROC curve {metrics['test_roc_auc']:.3f} (0.884 to 0.917)\n"
        f"Champion (version 3): {metrics['champion_test_roc_auc']:.3f}"
    )
    assert built["precision_recall"].axes[0].get_title(loc="left") == (
        f"Average precision {metrics['test_average_precision']:.3f} (0.507 to 0.588)\n"
        f"Champion (version 3): {metrics['champion_test_average_precision']:.3f}"
    )


def test_a_given_champion_replaces_the_reported_one(report: dict[str, Any]):
    champion = {"version": 12, "metrics": {"test_average_precision": 0.125}}
    title = plots.build_figures(only(report, "precision_recall"), champion=champion)["precision_recall"]
    assert title.axes[0].get_title(loc="left").endswith("\nChampion (version 12): 0.125")


@pytest.mark.parametrize("interval", [None, (None, 0.5), (float("nan"), 0.5), (0.5,)])
def test_an_interval_that_is_none_is_not_shown(report: dict[str, Any], interval: Any):
    drawn = plots.build_figures(only(report, "precision_recall"), intervals={"test_average_precision": interval})
    assert " to " not in drawn["precision_recall"].axes[0].get_title(loc="left")


def test_points_are_the_table(built: Mapping[str, Any], report: dict[str, Any]):
    tables = report["tables"]
    curve, base_rate, budgets = built["precision_recall"].axes[0].lines
    assert curve.get_xydata().tolist() == [[row["recall"], row["precision"]] for row in tables["precision_recall"]]
    rate = report["metrics"]["test_frauds"] / report["metrics"]["test_rows"]
    assert set(base_rate.get_ydata()) == {rate}
    assert budgets.get_xydata().tolist() == [[row["recall"], row["precision"]] for row in tables["thresholds"]]
    bars = built["feature_importances"].axes[0].patches
    assert len(bars) == plots.MAX_BARS
    best = sorted(report["feature_importances"].values(), reverse=True)[: plots.MAX_BARS]
    assert [bar.get_width() for bar in bars] == pytest.approx(best)
    histogram = built["score_distribution"].axes[0].patches
    assert [bar.get_height() for bar in histogram] == [
        row[column] for column in ("genuine", "frauds") for row in tables["score_histogram"]
    ]


def test_intervals_are_drawn_where_they_are_known(report: dict[str, Any]):
    def drawn(name: str, change: Any) -> int:
        changed = only(report, name)
        changed["tables"][name] = [change(row) for row in changed["tables"][name]]
        return len(plots.build_figures(changed)[name].axes[0].collections)

    def without(row: dict[str, Any]) -> dict[str, Any]:
        return {column: value for column, value in row.items() if not column.endswith("_lower")}

    def misplaced(row: dict[str, Any]) -> dict[str, Any]:
        return {column: 0.0 if column.endswith("_upper") else value or 0.1 for column, value in row.items()}

    for name, count in (("thresholds", 2), ("per_day", 2), ("per_scenario", 6)):
        assert (drawn(name, dict), drawn(name, without), drawn(name, misplaced)) == (count, 0, 0), name


def test_counts_that_are_alike_have_a_linear_axis(report: dict[str, Any]):
    alike = only(report, "score_histogram")
    alike["tables"]["score_histogram"] = [
        {"lower": low / 2, "upper": low / 2 + 0.5, "genuine": 10 + low, "frauds": 7} for low in (0, 1)
    ]
    ax = plots.build_figures(alike)["score_distribution"].axes[0]
    assert (ax.get_yscale(), ax.get_ylabel()) == ("linear", "rows")


def test_the_search_names_learner_and_only_what_differs(built: Mapping[str, Any]):
    ax = built["grid"].axes[0]
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels[0] == "XGBoost: max_depth 4, rounds 20"
    assert "another: max_depth 8" in labels
    assert ax.get_title(loc="left") == "Search: 17 candidates"


def test_panels_stay_inside_the_pictures_and_apart(built: Mapping[str, Any], pictures: dict[str, bytes]):
    for name in pictures:
        canvas = built[name].canvas
        width, height = canvas.get_width_height()
        # With titles, labels and legends.
        boxes = [ax.get_tightbbox(canvas.get_renderer()) for ax in built[name].axes]
        for box in boxes:
            assert box.x0 >= 0, name
            assert box.y0 >= 0, name
            assert box.x1 <= width, name
            assert box.y1 <= height, name
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])], name


@pytest.mark.parametrize(
    "empty",
    [
        {},
        {"outcome": "too_little_data", "reason": "There are 20 days of data."},
        {"outcome": "trained", "tables": None, "grid": None, "feature_importances": None, "metrics": None},
        {"tables": {name: [] for name in plots.TABLES}, "grid": [], "feature_importances": {}},
        {"tables": dict.fromkeys(plots.TABLES), "grid": [None], "feature_importances": {"a": None}},
        {"tables": {name: [{}] for name in plots.TABLES}, "grid": [{}], "feature_importances": {"a": 0.0}},
        {"tables": {name: {"a": 1} for name in plots.TABLES}, "grid": "x", "feature_importances": [1]},
        {"tables": [1], "windows": {"test": None}, "champion": "x"},
    ],
)
def test_nothing_to_draw_gives_no_picture(empty: dict[str, Any]):
    assert plots.draw_figures(empty) == {}
    assert plots.markdown_summary(empty, {})


@pytest.mark.parametrize("table", sorted(plots.TABLES))
def test_a_picture_needs_its_own_table_alone(report: dict[str, Any], table: str):
    assert set(plots.build_figures(only(report, table))) - {"overview"} == {PICTURE_OF.get(table, table)}


JUNK = [None, float("nan"), float("inf"), -float("inf"), -1, "0.5", True, 1e300, 10**400, {}, [1]]


@pytest.mark.parametrize("junk", JUNK, ids=lambda value: repr(value)[:12])
def test_values_that_are_none_are_not_drawn(report: dict[str, Any], junk: Any):
    spoilt = {
        "tables": {name: [dict.fromkeys(row, junk) for row in rows] for name, rows in report["tables"].items()},
        "grid": [entry | {"validation_average_precision": junk} for entry in report["grid"]],
    }
    assert plots.build_figures(spoilt) == {}


def test_entries_with_undefined_values_are_skipped_one_by_one(report: dict[str, Any]):
    days = [dict(row) for row in report["tables"]["per_day"]]
    days[1] |= {"average_precision": None, "recall_at_budget": float("nan")}
    days[2]["frauds"] = None
    spoilt = only(report, "per_day", "roc", "thresholds")
    spoilt["tables"]["per_day"] = [*days, "x"]
    spoilt["tables"]["roc"] = [
        {**row, "true_positive_rate": None} if n == 3 else row for n, row in enumerate(spoilt["tables"]["roc"])
    ]
    spoilt["tables"]["thresholds"] = [
        {**row, "amount_caught": None, "recall": None} for row in report["tables"]["thresholds"]
    ]
    drawn = plots.build_figures(spoilt)
    lines = {line.get_label(): line.get_xydata() for line in drawn["per_day"].axes[0].lines}
    assert [len(lines[name]) for name in ("average precision", "ROC AUC", "recall at the alert budget")] == [5, 6, 5]
    assert len(drawn["roc"].axes[0].lines[0].get_xydata()) == len(report["tables"]["roc"]) - 1
    assert len(drawn["thresholds"].axes) == 1
    assert all(png.startswith(b"\x89PNG") for png in plots.draw_figures(spoilt).values())


EDGES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "one day": {
        "per_day": [{"date": "2018-07-04", "rows": 5, "frauds": 0, "roc_auc": None, "precision_at_budget": 0.0}],
        "thresholds": [{"alerts_per_day": 100, "precision": 0.0, "recall": 0.0, "amount_caught": 0, "amount_share": 0}],
    },
    "days without dates": {
        "per_day": [{"rows": 3, "frauds": 1, "roc_auc": 0.5}, {"date": 4, "rows": 3, "frauds": 1, "roc_auc": 1}]
    },
    "no frauds": {
        "calibration": [{"mean_score": 0.0, "fraud_share": 0.0, "rows": 10}],
        "score_histogram": [{"lower": 0.0, "upper": 0.05, "genuine": 0, "frauds": 0}],
        "per_scenario": [{"scenario": 1, "frauds": 0, "caught": 0}, {"scenario": 2, "frauds": 1, "caught": 0}],
    },
    "far apart": {
        "calibration": [
            {"mean_score": 1e-300, "fraud_share": 0.0, "rows": 1e15},
            {"mean_score": 1.0, "fraud_share": 1.0, "rows": 1},
        ],
        "thresholds": [{"alerts_per_day": 0, "precision": 1.0}, {"alerts_per_day": 1e15, "recall": 1.0}],
        "score_histogram": [{"lower": 0.0, "upper": 1.0, "genuine": 1e15, "frauds": 1}],
    },
    "curves of two points": {
        "roc": [{"false_positive_rate": value, "true_positive_rate": value} for value in (0, 1)],
        "precision_recall": [{"recall": 1.0, "precision": 0.0}],
    },
}


@pytest.mark.parametrize("tables", EDGES.values(), ids=EDGES.keys())
def test_the_smallest_and_largest_tables_are_drawn(tables: dict[str, list[dict[str, Any]]]):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = plots.draw_figures({"tables": tables})
    assert set(drawn) - {"overview"} == {PICTURE_OF.get(name, name) for name in tables}
    assert all(len(png) < 80_000 for png in drawn.values())


def test_many_days_have_few_labels():
    days = [
        {"date": (date(2018, 1, 1) + timedelta(days=n)).isoformat(), "rows": 10**6, "frauds": n, "roc_auc": 0.9}
        for n in range(400)
    ]
    figure = plots.build_figures({"tables": {"per_day": days}})["per_day"]
    labels = [text.get_text() for text in figure.axes[1].get_xticklabels()]
    assert labels == ["01-01\n2018", "02-20", "04-11", "05-31", "07-20", "09-08", "10-28", "12-17"]
    first, last = (
        plots.build_figures({"tables": {"per_day": days[at : at + 2]}})["per_day"].axes[1] for at in (363, 364)
    )
    assert [text.get_text() for text in first.get_xticklabels()] == ["12-30\n2018", "12-31"]
    assert [text.get_text() for text in last.get_xticklabels()] == ["12-31\n2018", "01-01\n2019"]


def test_days_and_budgets_without_any_figure_are_no_picture():
    tables = {"per_day": [{"date": "2018-07-04", "rows": 5, "frauds": 0}], "thresholds": [{"alerts_per_day": 10}]}
    assert plots.draw_figures({"tables": tables}) == {}


HOSTILE = [
    "$\\frac{",
    "<script>alert(1)</script>",
    "a|b\n| c | d |",
    "`code` ``two`` \\`",
    "[x](javascript:alert(1)) ![y](https://example.com/z.png)",
    "https://example.com/ www.example.com me@example.com",
    "\u202eright to left\u2066",
    "\x00\x1b[31m\r\n# heading",
    "\u0442\u0435\u0440\u043c\u0438\u043d\u0430\u043b",
    "\u4e2d\u6587 \U0001f600 a\u0301\u0302\u0303",
    "_hidden **bold** ~~gone~~ &lt;b&gt;",
    "x" * 5000,
    "",
]


def hostile_report() -> dict[str, Any]:
    """Every text that could come from data is hostile."""
    days = [{"date": name, "rows": 10, "frauds": 1, "roc_auc": 0.9} for name in HOSTILE]
    return {
        "outcome": "trained",
        "cutoff": "<b>$x$</b>|`\n",
        "windows": {"test": {"first_date": "[a](b)", "last_date": "$\\alpha", "rows": 10, "frauds": 2}},
        "metrics": {**dict.fromkeys(HOSTILE, 0.5), "champion_test_roc_auc": 0.4},
        "champion": {"version": "</td>|`$"},
        "feature_importances": {name: number + 1 for number, name in enumerate(HOSTILE)},
        "best": {"learner": "`<i>", "params": {"a|b": "`\n\n# c"}},
        "grid": [
            {"learner": name, "params": {name: name, "n": number}, "validation_average_precision": 0.5}
            for number, name in enumerate(HOSTILE)
        ],
        "tables": {
            "per_day": days,
            "per_scenario": [{"scenario": name, "frauds": 3, "caught": 2} for name in HOSTILE],
            "precision_recall": [{"recall": 0.0, "precision": 1.0}, {"recall": 1.0, "precision": 0.1}],
        },
    }


def test_hostile_names_are_drawn_literally():
    from matplotlib.text import Text

    with warnings.catch_warnings():
        # A character that the font lacks is a warning.
        warnings.simplefilter("error")
        built = plots.build_figures(hostile_report())
        for figure in built.values():
            plots._png(figure)
    assert set(built) == {"overview", "per_day", "per_scenario", "precision_recall", "feature_importances", "grid"}
    labels = [text.get_text() for text in built["feature_importances"].axes[0].get_yticklabels()]
    assert "$\\frac{" in labels
    assert "<script>alert(1)</script>" in labels
    assert "a|b\\n| c | d |" in labels
    assert "\u0442\u0435\u0440\u043c\u0438\u043d\u0430\u043b" in labels
    assert "\\u202eright to left\\u2066" in labels
    assert "\\u4e2d\\u6587 \\U0001f600 a\\u0301\\u0302\\u0303" in labels
    assert max(map(len, labels)) == 52
    assert "xxxxxxxxxxxxxxx…xxxxxxxx" in [text.get_text() for text in built["grid"].axes[0].get_yticklabels()]
    for figure in built.values():
        assert not [text for text in figure.findobj(Text) if "$" in text.get_text() and text.get_parse_math()]


def markdown_tokens(text: str) -> list[Any]:
    """What a Markdown reader that allows HTML and tables sees, flat."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    return [part for token in tokens for part in (token, *(token.children or []))]


def test_hostile_names_are_no_markup():
    drawn = {"overview": b"\x89PNG one", "grid": b"\x89PNG two"}
    text = plots.markdown_summary(hostile_report(), drawn)
    tokens = markdown_tokens(text)
    kinds = {token.type for token in tokens}
    assert kinds <= {
        "paragraph_open",
        "paragraph_close",
        "inline",
        "text",
        "code_inline",
        "image",
        "table_open",
        "table_close",
        "thead_open",
        "thead_close",
        "tbody_open",
        "tbody_close",
        "tr_open",
        "tr_close",
        "th_open",
        "th_close",
        "td_open",
        "td_close",
        "softbreak",
    }
    # Only code spans have anything of the names: a reader that turns bare addresses into links finds none in text.
    plain = " ".join(token.content for token in tokens if token.type == "text")
    assert not re.search(r"[<>`@$\[\]|]|://|www\.|script|\*\*|~~", plain)
    assert "<script>alert(1)</script>" in {token.content for token in tokens if token.type == "code_inline"}
    assert [token.attrs["src"][:22] for token in tokens if token.type == "image"] == ["data:image/png;base64,"] * 2
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5, 4}
    assert len(text.encode()) < 20_000


def shown(row: dict[str, float], column: str) -> str:
    low, high = row[f"{column}_lower"], row[f"{column}_upper"]
    return f"{100 * row[column]:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def test_the_summary_has_the_figures(report: dict[str, Any], pictures: dict[str, bytes]):
    text = plots.markdown_summary(report, pictures, intervals=INTERVALS)
    metrics = report["metrics"]
    lines = text.splitlines()
    assert "| metric | model | interval | champion `3` |" in lines
    assert (
        f"| `test_average_precision` | {metrics['test_average_precision']:.4f} | 0.5070 to 0.5880 "
        f"| {metrics['champion_test_average_precision']:.4f} |"
    ) in lines
    assert "| `test_rows` | 21,000 |  |  |" in lines
    assert "| `XGBoost` | `max_depth=4, rounds=20, max_bin=1024` | 0.7400 |" in lines
    hundred = next(row for row in report["tables"]["thresholds"] if row["alerts_per_day"] == 100)
    assert (
        f"| 100 | {shown(hundred, 'precision')} | {shown(hundred, 'recall')} | {hundred['amount_caught']:,.0f} "
        f"| {100 * hundred['amount_share']:.1f} % |"
    ) in lines
    assert "Best candidate: `XGBoost` with `max_depth=4, rounds=20, max_bin=1024`" in lines
    images = [token for token in markdown_tokens(text) if token.type == "image"]
    assert images[0].content == "Overview of the held-out test"
    assert base64.b64decode(images[0].attrs["src"].partition(",")[2]) == pictures["overview"]


@pytest.mark.parametrize("limit", [20_000, 60_000, 100_000, 150_000])
def test_the_summary_stays_within_its_limit(report: dict[str, Any], pictures: dict[str, bytes], limit: int):
    text = plots.markdown_summary(report, pictures, limit=limit)
    assert len(text.encode()) <= limit
    shown = [token.content for token in markdown_tokens(text) if token.type == "image"]
    left_out = re.findall(r"to keep this entry small: (.*)\.", text)
    # A picture is embedded, named, or part of the overview.
    named = left_out[0].split(", ") if left_out else []
    expected = len(NAMES) - (len(plots.OVERVIEW) if plots.ALT_TEXTS["overview"] in shown else 0)
    assert len(shown) + len(named) == expected
    # Without room for the overview, its panels take its place.
    assert limit < 30_000 or plots.ALT_TEXTS["overview"] in shown or plots.ALT_TEXTS["precision_recall"] in shown


def test_the_summary_of_no_model_is_its_reason():
    text = plots.markdown_summary({"outcome": "too_little_data", "reason": "There are 20 days."}, {})
    assert text == "Outcome: `too_little_data`. `There are 20 days.`\n"


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
curve = [{"recall": 0.0, "precision": 1.0}, {"recall": 1.0, "precision": 0.1}]
assert set(plots.draw_figures({"tables": {"precision_recall": curve}})) == {"overview", "precision_recall"}
assert "matplotlib.pyplot" not in sys.modules, "pyplot"
assert parameters() == before, "rcParams"
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=120)
