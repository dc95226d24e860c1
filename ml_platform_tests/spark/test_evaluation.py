"""The figures against scikit-learn, and against plain Python written from their definitions."""

from __future__ import annotations

import math
import random
from datetime import datetime, timedelta, timezone

import pytest

from spark_jobs.training import evaluation

pytestmark = pytest.mark.spark

SCHEMA = "transaction_id bigint, tx_datetime timestamp, customer_id bigint, tx_fraud int, score double"
AMOUNTS = SCHEMA + ", tx_amount double"
MIDNIGHT = datetime(2020, 3, 1, tzinfo=timezone.utc)


def scored(spark, labels, scores):
    """A frame of scores of one second."""
    rows = [(i, MIDNIGHT, i, label, score) for i, (label, score) in enumerate(zip(labels, scores))]
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


def without_bounds(entry):
    return {name: value for name, value in entry.items() if not name.endswith(("_lower", "_upper"))}


def check_bounds(entry, name, part, whole, of=lambda row: 1):
    """The bounds of a share in `entry` against what they are by definition, customer by customer."""
    customers = {}
    for index, rows in enumerate((part, whole)):
        for row in rows:
            key = ("lone", row[0]) if row[2] is None else row[2]
            customers.setdefault(key, [0.0, 0.0])[index] += of(row)
    total = sum(y for _, y in customers.values())
    if not total:
        assert (entry[f"{name}_lower"], entry[f"{name}_upper"]) == (None, None)
        return
    share = sum(x for x, _ in customers.values()) / total
    number = sum(y > 0 for _, y in customers.values())
    variance = sum((x - share * y) ** 2 for x, y in customers.values()) / total**2 * number / max(1, number - 1)
    rows = sum(of(row) > 0 for row in whole)
    expected = evaluation.share_interval(share * total, total, variance, number, rows)
    assert (entry[f"{name}_lower"], entry[f"{name}_upper"]) == pytest.approx(expected, abs=1e-9)


def rows_by_day(rows):
    days = {}
    for row in rows:
        days.setdefault(row[1].date(), []).append(row)
    return [days[day] for day in sorted(days)]


@pytest.fixture
def shuffle_partitions(spark):
    """Sets how many partitions the session's shuffles have, and so a ranking."""
    name = "spark.sql.shuffle.partitions"
    before = spark.conf.get(name)
    yield lambda number: spark.conf.set(name, str(number))
    spark.conf.set(name, before)


class TestRankingMetrics:
    @pytest.mark.parametrize(
        ("digits", "partitions"),
        [(1, 1), (2, 15), (15, 15)],
        ids=["many ties, one partition", "ties, many partitions", "no ties, many partitions"],
    )
    def test_equals_scikit_learn(self, spark, shuffle_partitions, digits, partitions):
        from sklearn.metrics import average_precision_score, roc_auc_score

        draw = random.Random(digits)
        labels = [int(draw.random() < 0.1) for _ in range(600)]
        scores = [round(draw.gauss(0.5 * label, 1), digits) for label in labels]
        shuffle_partitions(partitions)
        result = evaluation.ranking_metrics(scored(spark, labels, scores))
        assert result["average_precision"] == pytest.approx(average_precision_score(labels, scores), abs=1e-11)
        assert result["roc_auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-11)
        assert (result["rows"], result["frauds"]) == (600, sum(labels))

    def test_equal_scores_rank_nothing(self, spark, shuffle_partitions):
        shuffle_partitions(7)
        result = evaluation.ranking_metrics(scored(spark, [1, 0, 0, 0] * 5, [0.3] * 20))
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


def longest_step(values):
    ordered = sorted(values)
    return max(ordered[i + 1] - ordered[i] for i in range(len(ordered) - 1))


class TestRankingTables:
    @pytest.fixture(params=[(1, 1), (2, 8), (15, 8)], ids=["many ties", "ties", "no ties"])
    def labels_scores_tables(self, spark, shuffle_partitions, request):
        digits, partitions = request.param
        draw = random.Random(digits)
        labels = [int(draw.random() < 0.25) for _ in range(1500)]
        scores = [round(min(1.0, draw.random() ** 2 + 0.4 * label * draw.random()), digits) for label in labels]
        shuffle_partitions(partitions)
        tables = evaluation.ranking_tables(scored(spark, labels, scores))
        return labels, scores, tables

    def test_curves_are_points_of_scikit_learns(self, labels_scores_tables):
        from sklearn.metrics import precision_recall_curve, roc_curve

        labels, scores, tables = labels_scores_tables
        false_positive_rates, true_positive_rates, _ = roc_curve(labels, scores, drop_intermediate=False)
        exact = {(round(x, 9), round(y, 9)) for x, y in zip(false_positive_rates, true_positive_rates)}
        roc = [(point["false_positive_rate"], point["true_positive_rate"]) for point in tables["roc"]]
        assert {(round(x, 9), round(y, 9)) for x, y in roc} <= exact
        assert roc == sorted(roc)
        assert (roc[0], roc[-1]) == ((0, 0), (1, 1))
        assert len(roc) <= 200
        # Even steps along the curve, where ties make no larger ones.
        assert longest_step(x + y for x, y in roc) < longest_step(x + y for x, y in exact) + 0.021

        precisions, recalls, _ = precision_recall_curve(labels, scores)
        exact = {(round(x, 9), round(y, 9)) for x, y in zip(recalls, precisions)}
        curve = [(point["recall"], point["precision"]) for point in tables["precision_recall"]]
        assert {(round(x, 9), round(y, 9)) for x, y in curve} <= exact
        assert [recall for recall, _ in curve] == sorted({recall for recall, _ in curve})
        assert curve[-1][0] == 1
        assert len(curve) <= 200
        assert longest_step(x for x, _ in curve) < longest_step(x for x, _ in exact) + 0.006

    def test_histogram_counts_every_row_once(self, labels_scores_tables):
        labels, scores, tables = labels_scores_tables
        bins = tables["score_histogram"]
        assert [(bin["lower"], bin["upper"]) for bin in bins] == [(i / 20, (i + 1) / 20) for i in range(20)]
        for bin in bins:
            inside = [
                label for label, score in zip(labels, scores) if min(int(score * 20), 19) == round(bin["lower"] * 20)
            ]
            assert (bin["genuine"], bin["frauds"]) == (len(inside) - sum(inside), sum(inside))

    def test_calibration_bins_are_of_equal_rows(self, labels_scores_tables):
        labels, scores, tables = labels_scores_tables
        bins = tables["calibration"]
        rest = sorted(zip(scores, labels))
        for bin in bins:
            inside, rest = rest[: bin["rows"]], rest[bin["rows"] :]
            assert bin["mean_score"] == pytest.approx(sum(score for score, _ in inside) / bin["rows"])
            assert bin["fraud_share"] == pytest.approx(sum(label for _, label in inside) / bin["rows"])
            assert not rest or inside[-1][0] < rest[0][0]
        assert rest == []
        if len(set(scores)) > 1000:
            assert [bin["rows"] for bin in bins] == pytest.approx([150] * 10, abs=8)

    def test_few_rows_and_one_class(self, spark):
        tables = evaluation.ranking_tables(scored(spark, [0, 0, 0], [0.0, 0.5, 1.0]))
        assert tables["roc"] == tables["precision_recall"] == []
        assert [bin["genuine"] for bin in tables["score_histogram"]] == [1] + [0] * 9 + [1] + [0] * 8 + [1]
        assert tables["calibration"] == [
            {"mean_score": score, "fraud_share": 0.0, "rows": 1} for score in (0.0, 0.5, 1.0)
        ]
        nothing = evaluation.ranking_tables(scored(spark, [1], [None]))
        assert nothing["roc"] == nothing["calibration"] == []
        assert sum(bin["genuine"] + bin["frauds"] for bin in nothing["score_histogram"]) == 0


def random_amounts(seed):
    """A week as `random_week`, with amounts, and the scenario of each row."""
    draw = random.Random(seed)
    rows = [(*row, round(draw.random() * 100, 2)) for row in random_week(seed)]
    return rows, [draw.choice([1, 2, 3]) if row[3] else 0 for row in rows]


def alerts_of(rows, budget):
    alerts = []
    for day in rows_by_day(rows):
        alerts += sorted(day, key=lambda row: (-row[4], row[0]))[:budget]
    return alerts


def labels_of(spark, rows, scenarios):
    schema = "transaction_id bigint, tx_datetime timestamp, tx_fraud_scenario int"
    return spark.createDataFrame([(row[0], row[1], scenario) for row, scenario in zip(rows, scenarios)], schema)


class TestTables:
    def test_each_day_is_as_if_it_were_alone(self, spark):
        rows, _ = random_amounts(1)
        rows.append((len(rows), MIDNIGHT, 1, 1, None, 5.0))
        table = evaluation.daily_metrics(spark.createDataFrame(rows, AMOUNTS), alerts_per_day=20)
        days = rows_by_day(row for row in rows if row[4] is not None)
        assert [day["date"] for day in table] == [rows[0][1].date().isoformat() for rows in days]
        for entry, day in ((table[0], days[0]), (table[-1], days[-1])):
            frame = spark.createDataFrame(day, AMOUNTS)
            budget = evaluation.budget_metrics(frame, alerts_per_day=20)
            assert without_bounds(entry) == {
                "date": entry["date"],
                **evaluation.ranking_metrics(frame),
                "precision_at_budget": budget["precision"],
                "recall_at_budget": budget["recall"],
            }
            alerts = alerts_of(day, 20)
            check_bounds(entry, "precision_at_budget", [row for row in alerts if row[3]], alerts)
            check_bounds(entry, "recall_at_budget", [row for row in alerts if row[3]], [row for row in day if row[3]])
        assert [entry["rows"] for entry in table] == [120, 120, 120, 120, 3]
        assert [entry["frauds"] for entry in table] == [sum(row[3] for row in day) for day in days]

    def test_scenarios(self, spark):
        rows, scenarios = random_amounts(2)
        frame = spark.createDataFrame(rows, AMOUNTS)
        labels = labels_of(spark, rows, scenarios)
        alerts = {row[0] for row in alerts_of(rows, 15)}
        table = evaluation.scenario_recall(frame, labels, alerts_per_day=15)
        assert [entry["scenario"] for entry in table] == [1, 2, 3]
        for entry in table:
            frauds = [row for row, number in zip(rows, scenarios) if number == entry["scenario"]]
            caught = [row for row in frauds if row[0] in alerts]
            assert without_bounds(entry) == {
                "scenario": entry["scenario"],
                "frauds": len(frauds),
                "caught": len(caught),
                "recall_at_budget": pytest.approx(len(caught) / len(frauds)),
            }
            check_bounds(entry, "recall_at_budget", caught, frauds)

    def test_budgets(self, spark):
        rows, _ = random_amounts(3)
        table = evaluation.budget_table(spark.createDataFrame(rows, AMOUNTS))
        assert [entry["alerts_per_day"] for entry in table] == [10, 20, 50, 100, 200, 500]
        frauds = [row for row in rows if row[3]]
        for entry in table:
            alerts = alerts_of(rows, entry["alerts_per_day"])
            caught = [row for row in alerts if row[3]]
            amount = sum(row[5] for row in caught)
            assert entry["precision"] == pytest.approx(len(caught) / len(alerts))
            assert entry["recall"] == pytest.approx(len(caught) / len(frauds))
            assert entry["amount_caught"] == pytest.approx(amount, abs=0.01)
            assert entry["amount_share"] == pytest.approx(amount / sum(row[5] for row in frauds))
            check_bounds(entry, "precision", caught, alerts)
            check_bounds(entry, "recall", caught, frauds)
            check_bounds(entry, "amount_share", caught, frauds, of=lambda row: row[5])
        for name in ("recall", "amount_caught", "amount_share"):
            assert [entry[name] for entry in table] == sorted(entry[name] for entry in table)
        assert table[-1]["recall"] == table[-1]["amount_share"] == 1

    def test_together_they_are_what_each_is_alone(self, spark, shuffle_partitions):
        rows, scenarios = random_amounts(4)
        frame, labels = spark.createDataFrame(rows, AMOUNTS), labels_of(spark, rows, scenarios)
        alone = (
            evaluation.evaluate(frame, alerts_per_day=15),
            {
                **evaluation.ranking_tables(frame),
                "per_day": evaluation.daily_metrics(frame, alerts_per_day=15),
                "per_scenario": evaluation.scenario_recall(frame, labels, alerts_per_day=15),
                "thresholds": evaluation.budget_table(frame),
            },
        )
        shuffle_partitions(8)  # so that a day's ranking, and that of the whole, is in several
        assert evaluation.evaluate_with_tables(frame, labels, alerts_per_day=15) == alone

    def test_nothing_to_find(self, spark):
        frame = spark.createDataFrame([(1, MIDNIGHT, 1, 0, 0.5, 3.0)], AMOUNTS)
        (entry, *_) = evaluation.budget_table(frame, budgets=(1, 2))
        undefined = {f"{name}{end}": None for name in ("recall", "amount_share") for end in ("", "_lower", "_upper")}
        assert entry == {
            "alerts_per_day": 1,
            "precision": 0.0,
            "precision_lower": 0.0,
            "precision_upper": pytest.approx(0.793450685622763),  # z^2 / (1 + z^2)
            "amount_caught": 0.0,
            **undefined,
        }
        (day,) = evaluation.daily_metrics(frame)
        assert (day["rows"], day["frauds"], day["average_precision"], day["recall_at_budget"]) == (1, 0, None, None)
        assert evaluation.daily_metrics(frame.limit(0)) == []
        assert evaluation.budget_table(frame.limit(0), budgets=(1,))[0]["precision"] is None


class TestIntervalsOfShares:
    @pytest.mark.parametrize(
        ("successes", "trials", "low", "high"),
        # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
        [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
    )
    def test_agree_with_the_literature(self, successes, trials, low, high):
        assert evaluation.wilson_interval(successes / trials, trials) == pytest.approx((low, high), abs=5e-5)

    @pytest.mark.parametrize(("share", "draws"), [(0.5, 0), (2, 1), (-1, 5), (math.nan, 5)])
    def test_of_no_share(self, share, draws):
        with pytest.raises(ValueError, match="is no share"):
            evaluation.wilson_interval(share, draws)

    @pytest.mark.parametrize(("part", "customers"), [(0, 4), (10, 4), (3, 1)])
    def test_where_nothing_or_everything_is_found_and_of_one_customer(self, part, customers):
        found = evaluation.share_interval(part, 10, 0.0, customers, 10)
        assert found == evaluation.wilson_interval(part / 10, customers)

    @pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 1000])
    def test_students_quantiles(self, degrees):
        from scipy.stats import t

        assert evaluation._student(degrees) == pytest.approx(t.ppf(0.975, degrees), rel=0.01)

    def test_there_are_never_more_draws_than_rows(self):
        lower, upper = evaluation.share_interval(2, 10, 1e-9, 5, 10)
        assert upper - lower > 0.4
        assert evaluation.share_interval(2, 10, 0.0, 5, 10) == (lower, upper)

    @pytest.mark.parametrize(("customers", "alike"), [(3, False), (3, True), (8, False), (60, True)])
    def test_cover_the_share(self, customers, alike):
        """Customers have two to six rows, each found by itself, or all of a customer's or none: `alike`."""
        draw = random.Random(7)
        covered = 0
        for _ in range(1000):
            sums = []
            for _ in range(customers):
                y = draw.randint(2, 6)
                x = y * (draw.random() < 0.3) if alike else sum(draw.random() < 0.3 for _ in range(y))
                sums.append((x, y))
            part, whole = (sum(column) for column in zip(*sums))
            squares = sum((x - part / whole * y) ** 2 for x, y in sums)
            variance = squares / whole**2 * customers / (customers - 1)
            lower, upper = evaluation.share_interval(part, whole, variance, customers, whole)
            covered += lower <= 0.3 <= upper
        # The standard error of 95 % of a thousand is 0.7 %.
        assert covered / 1000 >= 0.93

    def test_sums_in_another_order_are_no_variance(self, spark):
        """Of each customer the same share, and all of the amount: their squares leave rounding errors."""
        rows = [(n, MIDNIGHT, n % 7, 1, 1.0 - n / 100, 0.1 + n % 3) for n in range(35)]
        rows += [(100 + n, MIDNIGHT, n % 7, 1, 0.0, 0.1) for n in range(140)]
        (entry,) = evaluation.budget_table(spark.createDataFrame(rows, AMOUNTS), budgets=(35,))
        assert entry["recall"] == pytest.approx(0.2)
        assert (entry["recall_lower"], entry["recall_upper"]) == pytest.approx(
            evaluation.share_interval(35, 175, 0.0, 7, 175)
        )
        (entry,) = evaluation.budget_table(spark.createDataFrame(rows, AMOUNTS), budgets=(175,))
        assert (entry["amount_share"], entry["amount_share_upper"]) == (1.0, 1.0)
        assert entry["amount_share_lower"] == pytest.approx(evaluation.wilson_interval(1.0, 7)[0])


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
