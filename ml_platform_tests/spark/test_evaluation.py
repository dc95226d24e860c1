"""The figures against scikit-learn, and against plain Python written from their definitions."""

from __future__ import annotations

import random
from datetime import datetime, timedelta, timezone

import pytest

from spark_jobs import evaluation

pytestmark = pytest.mark.spark

SCHEMA = "transaction_id bigint, tx_datetime timestamp, customer_id bigint, tx_fraud int, score double"
MIDNIGHT = datetime(2020, 3, 1, tzinfo=timezone.utc)


def scored(spark, labels, scores):
    """A frame of scores of one second."""
    rows = [(i, MIDNIGHT, i, label, score) for i, (label, score) in enumerate(zip(labels, scores))]  # noqa: B905
    return spark.createDataFrame(rows, SCHEMA)


def random_week(seed, days=5, rows_per_day=120, cards=40, digits=1):
    """Rows of some days with many equal scores, unknown customers, and a last day with three cards only."""
    draw = random.Random(seed)
    rows = []
    for day in range(days):
        for _ in range(rows_per_day if day < days - 1 else 3):
            customer = draw.choice([None, *range(cards)])
            fraud = int(draw.random() < 0.15)
            score = round(min(1.0, draw.random() * 0.8 + 0.3 * fraud), digits)
            # The first and the last second of a day belong to it.
            second = draw.choice([0, 86_399, draw.randrange(86_400)])
            rows.append((len(rows), MIDNIGHT + timedelta(days=day, seconds=second), customer, fraud, score))
    return rows


def rows_by_day(rows):
    days = {}
    for row in rows:
        days.setdefault(row[1].date(), []).append(row)
    return [days[day] for day in sorted(days)]


class TestRankingMetrics:
    @pytest.mark.parametrize(
        ("digits", "rows_per_partition"),
        [(1, 10_000), (2, 40), (15, 40)],
        ids=["many ties, one partition", "ties, many partitions", "no ties, many partitions"],
    )
    def test_equals_scikit_learn(self, spark, digits, rows_per_partition):
        from sklearn.metrics import average_precision_score, roc_auc_score

        draw = random.Random(digits)
        labels = [int(draw.random() < 0.1) for _ in range(600)]
        scores = [round(draw.gauss(0.5 * label, 1), digits) for label in labels]
        result = evaluation.ranking_metrics(scored(spark, labels, scores), rows_per_partition=rows_per_partition)
        assert result["average_precision"] == pytest.approx(average_precision_score(labels, scores), abs=1e-11)
        assert result["roc_auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-11)
        assert (result["rows"], result["frauds"]) == (600, sum(labels))

    def test_equal_scores_rank_nothing(self, spark):
        result = evaluation.ranking_metrics(scored(spark, [1, 0, 0, 0] * 5, [0.3] * 20), rows_per_partition=3)
        assert result == {"average_precision": 0.25, "roc_auc": 0.5, "rows": 20, "frauds": 5}

    @pytest.mark.parametrize("label", [0, 1])
    def test_one_class_has_no_figures(self, spark, label):
        result = evaluation.ranking_metrics(scored(spark, [label] * 4, [0.1, 0.2, 0.3, 0.3]))
        assert result == {"average_precision": None, "roc_auc": None, "rows": 4, "frauds": 4 * label}

    def test_rows_without_score_are_left_out(self, spark):
        result = evaluation.ranking_metrics(scored(spark, [1, 0, 1, 0], [0.9, 0.1, None, None]))
        assert result == {"average_precision": 1.0, "roc_auc": 1.0, "rows": 2, "frauds": 1}


def handbook_card_precision(rows, k):
    """Day by day: each card's highest score and label, the k best cards, the found ones gone from then on."""
    found, shares = set(), []
    for day in rows_by_day(rows):
        cards = {}
        for _, _, customer, fraud, score in day:
            if customer is not None and customer not in found:
                highest, compromised = cards.get(customer, (score, fraud))
                cards[customer] = (max(highest, score), max(compromised, fraud))
        top = sorted(cards, key=lambda customer: (-cards[customer][0], customer))[:k]
        compromised = [customer for customer in top if cards[customer][1]]
        found.update(compromised)
        shares.append(len(compromised) / k)
    return sum(shares) / len(shares)


class TestCardPrecision:
    @pytest.mark.parametrize(("seed", "k"), [(1, 5), (2, 12), (3, 60)])
    def test_equals_the_handbooks(self, spark, seed, k):
        rows = random_week(seed)
        expected = handbook_card_precision(rows, k)
        assert evaluation.card_precision(spark.createDataFrame(rows, SCHEMA), cards_per_day=k) == pytest.approx(
            expected
        )

    def test_a_found_card_makes_room_for_the_next(self, spark):
        rows = [
            (day * 3 + card, MIDNIGHT + timedelta(days=day), card, fraud, score)
            for day in range(2)
            for card, fraud, score in [(1, 1, 0.9), (2, 1, 0.8), (3, 0, 0.7)]
        ]
        assert evaluation.card_precision(spark.createDataFrame(rows, SCHEMA), cards_per_day=1) == 1.0

    def test_no_card_no_figure(self, spark):
        rows = [(1, MIDNIGHT, None, 1, 0.5), (2, MIDNIGHT, 4, 1, None)]
        assert evaluation.card_precision(spark.createDataFrame(rows, SCHEMA)) is None


class TestBudgetMetrics:
    @pytest.mark.parametrize(("seed", "alerts"), [(1, 1), (2, 10), (3, 500)])
    def test_equals_the_definition(self, spark, seed, alerts):
        rows = random_week(seed)
        raised = []
        for day in rows_by_day(rows):
            raised += sorted(day, key=lambda row: (-row[4], row[0]))[:alerts]
        caught = sum(row[3] for row in raised)
        result = evaluation.budget_metrics(spark.createDataFrame(rows, SCHEMA), alerts_per_day=alerts)
        assert result["precision"] == pytest.approx(caught / len(raised))
        assert result["recall"] == pytest.approx(caught / sum(row[3] for row in rows))

    def test_nothing_to_find(self, spark):
        frame = scored(spark, [0, 0], [0.1, 0.2])
        assert evaluation.budget_metrics(frame, alerts_per_day=1) == {"precision": 0.0, "recall": None}
        assert evaluation.budget_metrics(frame.limit(0)) == {"precision": None, "recall": None}


def test_days_are_utc_in_any_session(spark):
    rows = random_week(4)
    frame = spark.createDataFrame(rows, SCHEMA)
    zone = spark.conf.get("spark.sql.session.timeZone")
    utc = evaluation.budget_metrics(frame, alerts_per_day=3)
    try:
        spark.conf.set("spark.sql.session.timeZone", "Asia/Tokyo")
        assert evaluation.budget_metrics(frame, alerts_per_day=3) == utc
    finally:
        spark.conf.set("spark.sql.session.timeZone", zone)
