"""Metrics and tables of scores against plain Python written from their definitions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ml_platform.lake.storage import LocalStore
from ml_platform.model import evaluation
from ml_platform.model.evaluation import evaluation_tables
from spark_jobs.evaluation import metrics as figures
from spark_jobs.evaluation.metrics import evaluate

Row = dict[str, Any]


def random_week(seed: int, days: int = 5, rows_per_day: int = 120, cards: int = 40, digits: int = 1) -> pd.DataFrame:
    """Rows of some days with many equal scores, unknown customers, and a last day with three rows only."""
    draw = random.Random(seed)
    rows: list[Row] = []
    for day in range(18_322, 18_322 + days):
        for _ in range(rows_per_day if day < 18_322 + days - 1 else 3):
            fraud = int(draw.random() < 0.15)
            rows.append(
                {
                    "transaction_id": len(rows),
                    "day": day,
                    "customer_id": draw.choice([math.nan, *range(cards)]),
                    "tx_amount": round(draw.random() * 100, 2),
                    "tx_fraud": fraud,
                    "tx_fraud_scenario": fraud * draw.choice([1, 2, 3]),
                    "score": round(min(1.0, draw.random() * 0.8 + 0.3 * fraud), digits),
                }
            )
    return pd.DataFrame(rows)


def frame(labels: list[int], scores: list[float], **columns: Any) -> pd.DataFrame:
    """Rows of one day, one customer each."""
    number = range(len(labels))
    base = {"transaction_id": number, "day": 0, "customer_id": [float(n) for n in number], "tx_amount": 1.0}
    return pd.DataFrame({**base, "tx_fraud": labels, "tx_fraud_scenario": labels, "score": scores, **columns})


def alerts_of(rows: list[Row], budget: int) -> list[Row]:
    """The rows with the highest scores of each day; of equals the lower transaction_id first."""
    alerts = []
    for day in sorted({row["day"] for row in rows}):
        ordered = sorted(
            (row for row in rows if row["day"] == day), key=lambda row: (-row["score"], row["transaction_id"])
        )
        alerts += ordered[:budget]
    return alerts


def check_share(
    entry: Row, name: str, part: list[Row], whole: list[Row], of: Callable[[Row], float] = lambda row: 1.0
) -> None:
    """A share and its bounds in `entry` against what they are by definition, customer by customer."""
    customers: dict[Any, list[float]] = {}
    for index, rows in enumerate((part, whole)):
        for row in rows:
            unknown = math.isnan(row["customer_id"])
            key = ("row", row["transaction_id"]) if unknown else row["customer_id"]
            customers.setdefault(key, [0.0, 0.0])[index] += of(row)
    total = sum(y for _, y in customers.values())
    share = sum(x for x, _ in customers.values()) / total
    number = len(customers)
    variance = sum((x - share * y) ** 2 for x, y in customers.values()) / total**2 * number / max(1, number - 1)
    bounds = figures.share_interval(share, variance, customers=number, rows=len(whole))
    found = (entry[name], entry[f"{name}_lower"], entry[f"{name}_upper"])
    assert found == pytest.approx((share, *bounds), abs=1e-9)


class TestMetrics:
    @pytest.mark.parametrize(("seed", "budget"), [(1, 1), (2, 10), (3, 500)])
    def test_a_budget_is_that_of_each_day(self, seed: int, budget: int):
        scores = random_week(seed)
        rows = scores.to_dict("records")
        alerts = alerts_of(rows, budget)
        caught = sum(row["tx_fraud"] for row in alerts)
        metrics = evaluate(scores, "score", budget)
        assert metrics["precision_at_budget"] == pytest.approx(caught / len(alerts))
        assert metrics["recall_at_budget"] == pytest.approx(caught / scores["tx_fraud"].sum())
        assert (metrics["rows"], metrics["frauds"]) == (len(rows), scores["tx_fraud"].sum())

    def test_ranking_metrics_are_scikit_learns_with_ties(self):
        from sklearn.metrics import average_precision_score, roc_auc_score

        scores = random_week(7)
        metrics = evaluate(scores, "score", 100)
        assert metrics["average_precision"] == average_precision_score(scores["tx_fraud"], scores["score"])
        assert metrics["roc_auc"] == roc_auc_score(scores["tx_fraud"], scores["score"])
        alike = evaluate(frame([1, 0, 0, 0] * 5, [0.3] * 20), "score", 100)
        assert (alike["average_precision"], alike["roc_auc"]) == (0.25, 0.5)

    @pytest.mark.parametrize(
        ("labels", "undefined"),
        [([0, 0], {"average_precision", "roc_auc", "recall_at_budget"}), ([1, 1], {"average_precision", "roc_auc"})],
    )
    def test_metrics_that_one_class_leaves_undefined(self, labels: list[int], undefined: set[str]):
        metrics = evaluate(frame(labels, [0.1, 0.2]), "score", 1)
        assert {name for name, value in metrics.items() if value is None} == undefined

    def test_the_order_of_the_rows_does_not_matter(self):
        scores = random_week(4)
        shuffled = scores.sample(frac=1, random_state=1)
        assert evaluate(shuffled, "score", 15) == evaluate(scores, "score", 15)


def handbook_card_precision(rows: list[Row], k: int) -> float:
    """Day by day: each card's highest score and label, the k best cards, the found ones gone from then on."""
    found: set[float] = set()
    shares = []
    for day in sorted({row["day"] for row in rows}):
        cards: dict[float, tuple[float, int]] = {}
        for row in rows:
            customer = row["customer_id"]
            if row["day"] == day and not math.isnan(customer) and customer not in found:
                highest, compromised = cards.get(customer, (row["score"], row["tx_fraud"]))
                cards[customer] = (max(highest, row["score"]), max(compromised, row["tx_fraud"]))
        top = sorted(cards, key=lambda customer: (-cards[customer][0], customer))[:k]
        compromised_cards = [customer for customer in top if cards[customer][1]]
        found.update(compromised_cards)
        shares.append(len(compromised_cards) / k)
    return sum(shares) / len(shares)


class TestCardPrecision:
    @pytest.mark.parametrize(("seed", "k"), [(1, 5), (2, 12), (3, 60)])
    def test_equals_the_handbooks(self, seed: int, k: int):
        scores = random_week(seed)
        expected = handbook_card_precision(scores.to_dict("records"), k)
        assert figures.card_precision(scores, cards_per_day=k) == pytest.approx(expected)

    def test_a_found_card_makes_room_for_the_next(self):
        scores = frame([1, 1, 0] * 2, [0.9, 0.8, 0.7] * 2, day=[0] * 3 + [1] * 3, customer_id=[1.0, 2.0, 3.0] * 2)
        assert figures.card_precision(scores, cards_per_day=1) == 1.0

    def test_without_cards_there_is_no_metric(self):
        assert figures.card_precision(frame([1], [0.5], customer_id=[math.nan])) is None


def longest_step(values: Any) -> float:
    return float(np.diff(np.sort(values)).max())


class TestCurves:
    @pytest.fixture(params=[1, 2, 15], ids=["many ties", "ties", "no ties"])
    def scores(self, request: pytest.FixtureRequest) -> pd.DataFrame:
        draw = random.Random(request.param)
        labels = [int(draw.random() < 0.25) for _ in range(1500)]
        values = [round(min(1.0, draw.random() ** 2 + 0.4 * label * draw.random()), request.param) for label in labels]
        return frame(labels, values)

    def test_points_are_scikit_learns_in_even_steps(self, scores: pd.DataFrame):
        from sklearn.metrics import precision_recall_curve, roc_curve

        tables = evaluation_tables(scores, 100)
        x, y, _ = roc_curve(scores["tx_fraud"], scores["score"], drop_intermediate=False)
        roc = [(point["false_positive_rate"], point["true_positive_rate"]) for point in tables["roc"]]
        assert set(roc) <= set(zip(x.tolist(), y.tolist(), strict=True))
        assert roc == sorted(roc)
        assert (roc[0], roc[-1]) == ((0, 0), (1, 1))
        assert len(roc) <= 200
        assert longest_step([sum(point) for point in roc]) < longest_step(x + y) + 0.021

        precision, recall, _ = precision_recall_curve(scores["tx_fraud"], scores["score"])
        curve = [(point["recall"], point["precision"]) for point in tables["precision_recall"]]
        assert set(curve) <= set(zip(recall.tolist(), precision.tolist(), strict=True))
        assert [point[0] for point in curve] == sorted({point[0] for point in curve})
        assert curve[-1][0] == 1
        assert len(curve) <= 200
        assert longest_step([point[0] for point in curve]) < longest_step(recall) + 0.006

    def test_histogram_counts_every_row_once(self, scores: pd.DataFrame):
        bins = evaluation_tables(scores, 100)["score_histogram"]
        assert [bin["lower"] for bin in bins] == pytest.approx([i / 20 for i in range(20)])
        assert sum(bin["genuine"] for bin in bins) == (scores["tx_fraud"] == 0).sum()
        assert sum(bin["frauds"] for bin in bins) == scores["tx_fraud"].sum()
        ends = evaluation_tables(frame([0, 1, 1], [0.0, 0.5, 1.0]), 100)["score_histogram"]
        assert (ends[0]["genuine"], ends[10]["frauds"], ends[19]["frauds"]) == (1, 1, 1)

    def test_calibration_bins_are_of_equal_rows(self, scores: pd.DataFrame):
        bins = evaluation_tables(scores, 100)["calibration"]
        rest = sorted(zip(scores["score"], scores["tx_fraud"], strict=True))
        for bin in bins:
            inside, rest = rest[: bin["rows"]], rest[bin["rows"] :]
            assert bin["mean_score"] == pytest.approx(sum(score for score, _ in inside) / bin["rows"])
            assert bin["fraud_share"] == pytest.approx(sum(label for _, label in inside) / bin["rows"])
            assert not rest or inside[-1][0] < rest[0][0], "equal scores are in one bin"
        assert rest == []
        if scores["score"].nunique() > 1000:
            assert [bin["rows"] for bin in bins] == pytest.approx([150] * 10, abs=8)

    def test_one_class_has_no_curves(self):
        tables = evaluation_tables(frame([0, 0, 0], [0.0, 0.5, 1.0]), 100)
        assert tables["roc"] == tables["precision_recall"] == tables["per_scenario"] == []
        assert tables["calibration"] == [
            {"mean_score": score, "fraud_share": 0.0, "rows": 1} for score in (0.0, 0.5, 1.0)
        ]


class TestTables:
    def test_each_day_is_as_if_it_were_alone(self):
        scores = random_week(1)
        table = evaluation_tables(scores, alerts_per_day=20)["per_day"]
        assert [day["date"] for day in table] == [f"2020-03-0{number}" for number in range(1, 6)]
        assert [day["rows"] for day in table] == [120, 120, 120, 120, 3]
        for entry, (_, rows) in zip(table, scores.groupby("day"), strict=True):
            alone = evaluate(rows, "score", 20)
            for name in ("frauds", "average_precision", "roc_auc", "precision_at_budget", "recall_at_budget"):
                assert entry[name] == alone[name]
        day = [row for row in scores.to_dict("records") if row["day"] == 18_322]
        alerts = alerts_of(day, 20)
        caught = [row for row in alerts if row["tx_fraud"]]
        check_share(table[0], "precision_at_budget", caught, alerts)
        check_share(table[0], "recall_at_budget", caught, [row for row in day if row["tx_fraud"]])

    def test_scenarios(self):
        rows = random_week(2).to_dict("records")
        alerts = {row["transaction_id"] for row in alerts_of(rows, 15)}
        table = evaluation_tables(pd.DataFrame(rows), alerts_per_day=15)["per_scenario"]
        assert [entry["scenario"] for entry in table] == [1, 2, 3]
        for entry in table:
            frauds = [row for row in rows if row["tx_fraud_scenario"] == entry["scenario"]]
            caught = [row for row in frauds if row["transaction_id"] in alerts]
            assert (entry["frauds"], entry["caught"]) == (len(frauds), len(caught))
            check_share(entry, "recall_at_budget", caught, frauds)

    def test_budgets(self):
        rows = random_week(3).to_dict("records")
        table = evaluation_tables(pd.DataFrame(rows), alerts_per_day=15)["thresholds"]
        assert [entry["alerts_per_day"] for entry in table] == [10, 15, 20, 50, 100, 200, 500]
        frauds = [row for row in rows if row["tx_fraud"]]
        for entry in table:
            alerts = alerts_of(rows, entry["alerts_per_day"])
            caught = [row for row in alerts if row["tx_fraud"]]
            assert entry["amount_caught"] == pytest.approx(sum(row["tx_amount"] for row in caught), abs=0.01)
            check_share(entry, "precision", caught, alerts)
            check_share(entry, "recall", caught, frauds)
            check_share(entry, "amount_share", caught, frauds, of=lambda row: row["tx_amount"])
        assert table[-1]["recall"] == table[-1]["amount_share"] == 1

    def test_budgets_without_frauds(self):
        entry = evaluation_tables(frame([0], [0.5]), 100)["thresholds"][0]
        assert (entry["precision"], entry["precision_lower"], entry["amount_caught"]) == (0.0, 0.0, 0.0)
        assert entry["precision_upper"] == pytest.approx(0.793450685622763)  # z^2 / (1 + z^2)
        for name in ("recall", "amount_share"):
            assert {entry[name], entry[f"{name}_lower"], entry[f"{name}_upper"]} == {None}


class TestIntervalsOfShares:
    @pytest.mark.parametrize(
        ("successes", "trials", "low", "high"),
        # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
        [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
    )
    def test_agree_with_the_literature(self, successes: int, trials: int, low: float, high: float):
        assert figures.wilson_interval(successes / trials, trials) == pytest.approx((low, high), abs=5e-5)

    @pytest.mark.parametrize(("share", "customers"), [(0.0, 4), (1.0, 4), (0.3, 1)])
    def test_extreme_shares_and_one_customer_have_wilsons_interval(self, share: float, customers: int):
        found = figures.share_interval(share, 0.0, customers=customers, rows=10)
        assert found == figures.wilson_interval(share, customers)

    def test_there_are_never_more_draws_than_rows(self):
        lower, upper = figures.share_interval(0.2, 1e-9, customers=5, rows=10)
        assert upper - lower > 0.4
        assert figures.share_interval(0.2, 0.0, customers=5, rows=10) == (lower, upper)

    @pytest.mark.parametrize(("customers", "alike"), [(3, False), (8, False), (60, True)])
    def test_intervals_cover_the_share(self, customers: int, alike: bool):
        """Customers have two to six rows, each found by itself, or all of a customer's or none: `alike`."""
        draw = random.Random(7)
        covered = 0
        for _ in range(1000):
            sums = []
            for _ in range(customers):
                y = draw.randint(2, 6)
                x = y * (draw.random() < 0.3) if alike else sum(draw.random() < 0.3 for _ in range(y))
                sums.append((x, y))
            part, whole = (sum(column) for column in zip(*sums, strict=True))
            squares = sum((x - part / whole * y) ** 2 for x, y in sums)
            variance = squares / whole**2 * customers / (customers - 1)
            lower, upper = figures.share_interval(part / whole, variance, customers=customers, rows=whole)
            covered += lower <= 0.3 <= upper
        # The standard error of 95% of a thousand is 0.7%.
        assert covered / 1000 >= 0.93


def test_days_are_utc_and_of_any_year(tmp_path: Path):
    """Also of years that the nanoseconds of pandas cannot hold."""
    import pyarrow as pa
    from pyarrow import parquet

    instants = ["0001-01-02T00:00:00", "1969-12-31T23:59:59", "1970-01-01T00:00:00", "2020-03-01T23:59:59"]
    columns = {
        "transaction_id": [3, 2, 1, 0],
        "tx_datetime": pa.array(np.array(instants, "datetime64[us]"), pa.timestamp("us", tz="UTC")),
        "customer_id": pa.array([1, None, 2, 3], pa.int64()),
        "score": [0.1, 0.2, 0.3, 0.4],
    }
    (tmp_path / "scores").mkdir()
    parquet.write_table(pa.table(columns), tmp_path / "scores" / "part-0.parquet")
    scores = evaluation.read_test_scores(LocalStore(str(tmp_path)), "scores")
    assert scores["transaction_id"].tolist() == [0, 1, 2, 3]
    assert scores["day"].tolist() == [18_322, 0, -1, -719_161]
    assert scores["customer_id"].isna().tolist() == [False, False, True, False]
