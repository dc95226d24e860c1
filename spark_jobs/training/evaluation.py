"""Exact quality figures and tables of fraud scores, computed where the rows are.

A held-out week of the real data has eleven million rows, so nothing here collects rows, needs pandas, or
sorts everything in one partition. What reaches the driver is a few numbers per partition, and the best-ranked
rows of each day where a figure is defined by them.

A frame of scores has the columns of the lake's ``test_scores``: ``transaction_id``, ``tx_datetime``,
``customer_id``, ``tx_fraud`` (0/1) and a double column of scores, where higher means more suspicious.
"""

from __future__ import annotations

import math
from datetime import date, timedelta
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from spark_jobs import runtime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyspark.sql import Column, DataFrame

#: Cards that are checked each day in the card precision of the handbook.
CARDS_PER_DAY = 100

#: Budgets of `budget_table`, alerts per day.
BUDGETS = (10, 20, 50, 100, 200, 500)

#: Most points of a curve, and bins of `ranking_tables`.
CURVE_POINTS = 200
HISTOGRAM_BINS = 20
CALIBRATION_BINS = 10

#: Of the intervals of shares.
CONFIDENCE = 0.95

#: What the order of a sum may change of it.
SUM_NOISE = 1e-12

#: What stands for a day where all rows are ranked together.
ALL_DAYS = -(1 << 31)

#: Parts into which a day is split before its best rows are ranked, so that no task has to sort a whole day.
DAY_BUCKETS = 64


def evaluate(scores: DataFrame, score: str = "score", alerts_per_day: int = 100) -> dict[str, Any]:
    """All figures of one score column: ``average_precision``, ``roc_auc``, ``card_precision_at_100``,
    ``precision_at_budget``, ``recall_at_budget``, ``rows``, ``frauds``.

    A figure that is not defined on these rows is None (see each function). Rows whose score is NULL are left
    out.
    """
    return _figures(scores, score, alerts_per_day, _ranking(scores, score))


def evaluate_with_tables(
    scores: DataFrame, scenarios: DataFrame, score: str = "score", alerts_per_day: int = 100
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """(what `evaluate` gives, all tables of the same score column), from the same rankings of its rows.

    Each table is a list of flat dicts: `ranking_tables`, ``per_day`` (`daily_metrics`), ``per_scenario``
    (`scenario_recall`) and ``thresholds`` (`budget_table`). `scores` has also ``tx_amount``; `scenarios` is as in
    `scenario_recall`.
    """
    from pyspark.sql import functions as F

    rankings = _rankings(scores, score, [F.lit(ALL_DAYS), _utc_day()])
    ranking = rankings.pop(ALL_DAYS, _Ranking(0, 0))
    # The one ranking of the days serves all budgets.
    alerts = _alerts(scores, score, max(alerts_per_day, *BUDGETS)).persist()
    try:
        tables = {
            **ranking.tables(),
            "per_day": daily_metrics(scores, score, alerts_per_day, alerts, rankings),
            "per_scenario": scenario_recall(scores, scenarios, score, alerts_per_day, alerts),
            "thresholds": budget_table(scores, score, BUDGETS, alerts),
        }
        return _figures(scores, score, alerts_per_day, ranking, alerts), tables
    finally:
        alerts.unpersist()


def _figures(
    scores: DataFrame, score: str, alerts_per_day: int, ranking: _Ranking, alerts: DataFrame | None = None
) -> dict[str, Any]:
    ranked, budget = ranking.metrics(), budget_metrics(scores, score, alerts_per_day, alerts)
    return {
        "average_precision": ranked["average_precision"],
        "roc_auc": ranked["roc_auc"],
        "card_precision_at_100": card_precision(scores, score, CARDS_PER_DAY),
        "precision_at_budget": budget["precision"],
        "recall_at_budget": budget["recall"],
        "rows": ranked["rows"],
        "frauds": ranked["frauds"],
    }


def ranking_metrics(scores: DataFrame, score: str = "score", label: str = "tx_fraud") -> dict[str, Any]:
    """Average precision and area under the ROC curve, exact, with ties: one sort by score gives both.

    With the distinct scores in descending order, n_i rows and p_i frauds at the i-th, N_i and P_i their
    running sums up to and with i, and N and P the totals::

        average precision = sum_i (p_i / P) * (P_i / N_i)
        ROC AUC           = sum_i (n_i - p_i) * (P_i - p_i / 2) / (P * (N - P))

    The first is the step-wise sum of scikit-learn's ``average_precision_score`` (no interpolation; rows with
    equal scores enter together). The second is the probability that a fraud outranks a genuine row, ties
    counted as one half (Hanley and McNeil, 1982, https://doi.org/10.1148/radiology.143.1.7063747).

    Returns ``average_precision``, ``roc_auc`` (both None if there are no frauds or nothing but frauds),
    ``rows``, ``frauds``. Rounded to 12 decimals, because the order in which partial sums arrive changes the
    last ones.
    """
    return _ranking(scores, score, label).metrics()


def ranking_tables(scores: DataFrame, score: str = "score") -> dict[str, list[dict[str, Any]]]:
    """Curves and distributions of a score, from the sort of `ranking_metrics`; scores are probabilities.

    ``roc`` (``false_positive_rate``, ``true_positive_rate``): from (0, 0) to (1, 1), and ``precision_recall``
    (``recall``, ``precision``): by rising recall; at most `CURVE_POINTS` points each. They are points of the
    exact curves, one in each of as many equal steps along them; of the second, those at which frauds enter.
    Both are empty if there are no frauds or nothing but frauds.

    ``score_histogram`` (``lower``, ``upper``, ``genuine``, ``frauds``): rows by score in `HISTOGRAM_BINS` equal
    bins over [0, 1]; the last one includes 1.

    ``calibration`` (``mean_score``, ``fraud_share``, ``rows``): rows by rank in up to `CALIBRATION_BINS` bins of
    equal size, lowest scores first. Rows of equal score are in the same bin, so bins can differ in size.
    """
    return _ranking(scores, score).tables()


def daily_metrics(
    scores: DataFrame,
    score: str = "score",
    alerts_per_day: int = 100,
    alerts: DataFrame | None = None,
    rankings: dict[int, _Ranking] | None = None,
) -> list[dict[str, Any]]:
    """The figures of each UTC day that has rows: ``date``, ``rows``, ``frauds``, ``average_precision``,
    ``roc_auc`` (see `ranking_metrics`), ``precision_at_budget``, ``recall_at_budget`` (see `budget_metrics`), the last
    two also with ``…_lower`` and ``…_upper`` (see `share_interval`); None where a figure is not defined.
    `alerts`: those of a budget at least as large, and `rankings`: those of the days, if they are at hand.
    """
    from pyspark.sql import functions as F

    if rankings is None:
        rankings = _rankings(scores, score, [_utc_day()])
    found = _shares(
        _alerts_and_frauds(scores, score, _alerts(scores, score, alerts_per_day, alerts)),
        F.col("day"),
        {"precision_at_budget": PRECISION, "recall_at_budget": RECALL},
    )
    return [
        {
            "date": (date(1970, 1, 1) + timedelta(days=day)).isoformat(),
            **rankings[day].metrics(),
            **found[day],
        }
        for day in sorted(rankings)
    ]


def scenario_recall(
    scores: DataFrame,
    scenarios: DataFrame,
    score: str = "score",
    alerts_per_day: int = 100,
    alerts: DataFrame | None = None,
) -> list[dict[str, Any]]:
    """How many frauds of each scenario a fixed daily budget finds: ``scenario``, ``frauds``, ``caught``,
    ``recall_at_budget``, also with ``…_lower`` and ``…_upper`` (see `share_interval`).

    `scenarios` has ``transaction_id``, ``tx_datetime`` and ``tx_fraud_scenario`` of the frauds of `scores`, once
    each; its other rows do not matter. `alerts` as in `daily_metrics`.
    """
    from pyspark.sql import functions as F

    key = ["transaction_id", "tx_datetime"]
    caught = _alerts(scores, score, alerts_per_day, alerts).where("tx_fraud = 1")
    frauds = (
        scores.where(F.col(score).isNotNull() & (F.col("tx_fraud") == 1))
        .select(*key, "customer_id")
        .join(scenarios.select(*key, "tx_fraud_scenario"), key)
        .join(F.broadcast(caught.select(*key, F.lit(1).alias("caught"))), key, "left")
    )
    found = _shares(frauds, F.col("tx_fraud_scenario"), {"recall_at_budget": ("coalesce(caught, 0)", "1")}, counts=True)
    return [
        {
            "scenario": scenario,
            "frauds": int(found[scenario].pop("recall_at_budget_whole")),
            "caught": int(found[scenario].pop("recall_at_budget_part")),
            **found[scenario],
        }
        for scenario in sorted(found)
    ]


def budget_table(
    scores: DataFrame, score: str = "score", budgets: Sequence[int] = BUDGETS, alerts: DataFrame | None = None
) -> list[dict[str, Any]]:
    """What daily budgets of alerts would find: ``alerts_per_day``, ``precision``, ``recall`` (see
    `budget_metrics`), ``amount_caught`` (sum of ``tx_amount`` of the frauds among the alerts) and
    ``amount_share`` (the part of all frauds' amounts; None if that is 0). The shares also with ``…_lower`` and
    ``…_upper`` (see `share_interval`). `alerts` as in `daily_metrics`.
    """
    from pyspark.sql import functions as F

    rows = _alerts_and_frauds(scores, score, _alerts(scores, score, max(budgets), alerts))
    rows = rows.withColumn("budget", F.explode(F.array(*[F.lit(budget) for budget in budgets])))
    found = _shares(
        rows.where("is_alert = 0 OR rank <= budget"),
        F.col("budget"),
        {"precision": PRECISION, "recall": RECALL, "amount_share": tuple(f"{sql} * tx_amount" for sql in RECALL)},
        counts=True,
    )
    table = []
    for budget in budgets:
        entry = found.get(budget, {})
        shares = {
            f"{name}{suffix}": entry.get(f"{name}{suffix}")
            for name in ("precision", "recall", "amount_share")
            for suffix in ("", "_lower", "_upper")
        }
        if shares["amount_share"] is not None:
            # The last digits of a sum of amounts depend on its order.
            shares["amount_share"] = round(shares["amount_share"], 12)
        amount = round(entry.get("amount_share_part", 0.0), 2)
        table.append({"alerts_per_day": budget, "amount_caught": amount, **shares})
    return table


def wilson_interval(share: float, draws: float) -> tuple[float, float]:
    """Wilson's score interval, 95 %, of a share of so many independent draws; within 0 to 1, and defined at its ends.

    Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953. Raises ValueError for what is no share, or no draws.
    """
    if not (0 <= share <= 1 and draws > 0):
        raise ValueError(f"{share} of {draws} draws is no share: it takes 0 to 1, of more than 0")
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    scale = 1 + z * z / draws
    middle = (share + z * z / (2 * draws)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / draws + (z / (2 * draws)) ** 2)
    # At an end, rounding would put the bound a hair before it.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def share_interval(part: float, whole: float, variance: float, customers: int, rows: int) -> tuple[float, float]:
    """The interval of part / whole, sums over customers c of x_c and y_c, where 0 <= part <= whole > 0.

    It is Wilson's for as many draws as would have the same variance, at most `rows`, for the rows of one customer are
    not independent of each other; times (t_{rows-1} / t_{customers-1})^2 of Student's distribution, for few customers
    tell little of their variance: Korn and Graubard's effective sample size, 1998, Survey Methodology 24, 193 to 201.
    Where nothing or everything is found, and where there is one customer, each customer is one draw.

    `variance` is C / (C - 1) times the sum of (x_c - part / whole * y_c)^2 over whole^2, C the number of `customers`,
    those with y_c > 0: that of a ratio of sums over independent customers (Cochran, Sampling Techniques, 1977, chapter
    6). `rows` are those that add to whole.
    """
    share = min(1.0, part / whole)
    if customers < 2 or share in (0.0, 1.0):
        return wilson_interval(share, customers)
    draws = min(rows, share * (1 - share) / variance) if variance > 0 else rows
    return wilson_interval(share, draws * (_student(rows - 1) / _student(customers - 1)) ** 2)


def _student(degrees: int) -> float:
    """The (1 + CONFIDENCE) / 2 quantile of Student's t distribution, to 1 % from two degrees of freedom on.

    Exact for one and two; else the expansion of Abramowitz and Stegun, 1964, 26.7.5.
    """
    p = (1 + CONFIDENCE) / 2
    if degrees <= 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


class _Ranking:
    """Running sums along a ranking, at chosen places."""

    def __init__(self, rows: int, frauds: int) -> None:
        self.rows = rows
        self.frauds = frauds
        self.parts: list[Any] = []

    def metrics(self) -> dict[str, Any]:
        result: dict[str, Any] = {"average_precision": None, "roc_auc": None, "rows": self.rows, "frauds": self.frauds}
        if self.frauds not in (0, self.rows):
            precision = math.fsum(part["precision"] for part in self.parts)
            outranked = math.fsum(part["outranked"] for part in self.parts)
            result["average_precision"] = round(precision / self.frauds, 12)
            result["roc_auc"] = round(outranked / (self.frauds * (self.rows - self.frauds)), 12)
        return result

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        roc, precision_recall = [], []
        if self.frauds not in (0, self.rows):
            roc = [{"false_positive_rate": 0.0, "true_positive_rate": 0.0}]
            for parts in self._binned("roc_bin"):
                rows, frauds = (max(part[name] for part in parts) for name in ("rows_so_far", "frauds_so_far"))
                roc.append(
                    {
                        "false_positive_rate": (rows - frauds) / (self.rows - self.frauds),
                        "true_positive_rate": frauds / self.frauds,
                    }
                )
            for parts in self._binned("recall_bin"):
                entered = [part for part in parts if part["frauds"]]
                if entered:
                    frauds = max(part["frauds_so_far"] for part in entered)
                    rows = max(part["rows_at_fraud"] for part in entered)
                    precision_recall.append({"recall": frauds / self.frauds, "precision": frauds / rows})
        calibration = []
        for parts in reversed(self._binned("calibration_bin")):
            rows = sum(part["rows"] for part in parts)
            calibration.append(
                {
                    "mean_score": round(math.fsum(part["scores"] for part in parts) / rows, 12),
                    "fraud_share": sum(part["frauds"] for part in parts) / rows,
                    "rows": rows,
                }
            )
        histogram = [
            {"lower": index / HISTOGRAM_BINS, "upper": (index + 1) / HISTOGRAM_BINS, "genuine": 0, "frauds": 0}
            for index in range(HISTOGRAM_BINS)
        ]
        for part in self.parts:
            row = histogram[part["histogram_bin"]]
            row["genuine"] += part["rows"] - part["frauds"]
            row["frauds"] += part["frauds"]
        return {
            "roc": roc,
            "precision_recall": precision_recall,
            "score_histogram": histogram,
            "calibration": calibration,
        }

    def _binned(self, name: str) -> list[list[Any]]:
        """The parts in each bin, bins in order."""
        bins: dict[int, list[Any]] = {}
        for part in self.parts:
            bins.setdefault(part[name], []).append(part)
        return [bins[index] for index in sorted(bins)]


def _ranking(scores: DataFrame, score: str, label: str = "tx_fraud") -> _Ranking:
    """The ranking of all rows."""
    from pyspark.sql import functions as F

    return _rankings(scores, score, [F.lit(ALL_DAYS)], label).get(ALL_DAYS, _Ranking(0, 0))


def _rankings(scores: DataFrame, score: str, groups: Sequence[Column], label: str = "tx_fraud") -> dict[int, _Ranking]:
    """Group → its ranking by descending score. `groups` are integers, and a row is in as many groups as there are.

    The distinct scores are partitioned by range, into as many partitions as the session's shuffles have; the totals of
    each are collected and become the offsets of the running sums within the partitions after it. All bins follow
    the ranking, so the pieces that they cut it into, which are what is collected at last, are few.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    by_score = (
        scores.where(F.col(score).isNotNull())
        .select(
            F.explode(F.array(*groups)).alias("group"),
            F.col(score).cast("double").alias("score"),
            F.col(label).cast("bigint").alias("label"),
        )
        .groupBy("group", "score")
        .agg(F.count(F.lit(1)).alias("rows"), F.sum("label").alias("frauds"))
        .repartitionByRange(F.col("group"), F.col("score").desc())
        .withColumn("part", F.spark_partition_id())
        # The bounds of the ranges are sampled: without this, the second pass could see other partitions.
        .persist()
    )
    try:
        totals = (
            by_score.groupBy("group", "part")
            .agg(F.sum("rows").alias("rows"), F.sum("frauds").alias("frauds"))
            .collect()
        )
        rankings: dict[int, _Ranking] = {}
        offsets = []
        for total in sorted(totals, key=lambda row: row["part"]):
            ranking = rankings.setdefault(total["group"], _Ranking(0, 0))
            offsets.append((total["group"], total["part"], ranking.rows, ranking.frauds))
            ranking.rows += total["rows"]
            ranking.frauds += total["frauds"]
        if not rankings:
            return {}

        so_far = (
            Window.partitionBy("group", "part")
            .orderBy(F.col("score").desc())
            .rowsBetween(Window.unboundedPreceding, Window.currentRow)
        )
        before = runtime.session(scores).createDataFrame(
            [(*offset, rankings[offset[0]].rows, rankings[offset[0]].frauds) for offset in offsets],
            "group int, part int, rows_before bigint, frauds_before bigint, all_rows bigint, all_frauds bigint",
        )
        bins = {
            "roc_bin": "floor((frauds_so_far / all_frauds + (rows_so_far - frauds_so_far) / (all_rows - all_frauds))"
            f" / 2 * {CURVE_POINTS - 2})",
            "recall_bin": f"ceil({CURVE_POINTS} * frauds_so_far / all_frauds)",
            "calibration_bin": f"floor({CALIBRATION_BINS} * (rows_so_far - rows / 2) / all_rows)",
            "histogram_bin": f"greatest(0, least({HISTOGRAM_BINS - 1}, floor({HISTOGRAM_BINS} * score)))",
        }
        pieces = (
            by_score.join(F.broadcast(before), ["group", "part"])
            .withColumn("rows_so_far", F.col("rows_before") + F.sum("rows").over(so_far))
            .withColumn("frauds_so_far", F.col("frauds_before") + F.sum("frauds").over(so_far))
            .select("*", *[F.expr(sql).alias(name) for name, sql in bins.items()])
            .groupBy("group", "part", *bins)
            .agg(
                F.sum("rows").alias("rows"),
                F.sum("frauds").alias("frauds"),
                F.expr("sum(score * rows)").alias("scores"),
                F.expr("sum(frauds * (frauds_so_far / rows_so_far))").alias("precision"),
                F.expr("sum((rows - frauds) * (frauds_so_far - frauds / 2))").alias("outranked"),
                F.max("rows_so_far").alias("rows_so_far"),
                F.max("frauds_so_far").alias("frauds_so_far"),
                F.expr("max(IF(frauds > 0, rows_so_far, 0))").alias("rows_at_fraud"),
            )
            .collect()
        )
    finally:
        by_score.unpersist()
    for piece in pieces:
        rankings[piece["group"]].parts.append(piece)
    return rankings


def card_precision(scores: DataFrame, score: str = "score", cards_per_day: int = CARDS_PER_DAY) -> float | None:
    """Card precision@k: mean over the days of the share of compromised cards among the k most suspicious.

    As in the Fraud Detection Handbook, chapter 4, "Precision top-k metrics"
    (https://fraud-detection-handbook.github.io/fraud-detection-handbook/Chapter_4_PerformanceMetrics/TopKBased.html):
    a card's score of a day is the highest of its rows, a card is compromised on a day that has a fraud of it,
    and compromised cards that were among the k are left out on the days after. The divisor is k also on days
    with fewer cards. Here equal scores are ordered by customer_id, which the handbook leaves to chance. Rows
    without a customer are no card. None if no row has a customer and a score.
    """
    from pyspark.sql import functions as F

    cards = (
        scores.where(F.col(score).isNotNull() & F.col("customer_id").isNotNull())
        .groupBy(_utc_day().alias("day"), "customer_id")
        .agg(F.max(F.col(score).cast("double")).alias("score"), F.max("tx_fraud").alias("tx_fraud"))
    )
    days = sorted(row["day"] for row in cards.select("day").distinct().collect())
    if not days:
        return None
    # At most k cards are found a day, so the k best of those left on the n-th day are among its n * k best.
    best = _best_of_each_day(cards, "customer_id", cards_per_day * len(days)).collect()
    ranked: dict[int, list[Any]] = {day: [] for day in days}
    for row in sorted(best, key=lambda row: (-row["score"], row["customer_id"])):
        ranked[row["day"]].append(row)
    found: set[int] = set()
    shares = []
    for day in days:
        checked = [row for row in ranked[day] if row["customer_id"] not in found][:cards_per_day]
        compromised = [row["customer_id"] for row in checked if row["tx_fraud"] == 1]
        shares.append(len(compromised) / cards_per_day)
        found.update(compromised)
    return math.fsum(shares) / len(shares)


def budget_metrics(
    scores: DataFrame, score: str = "score", alerts_per_day: int = 100, alerts: DataFrame | None = None
) -> dict[str, float | None]:
    """Precision and recall of the alerts that a fixed daily budget raises.

    Each day's `alerts_per_day` transactions with the highest scores are alerts (equal scores: the lower
    transaction_id first; all of the day's if it has fewer). Over all days together::

        precision = frauds among the alerts / alerts        recall = frauds among the alerts / frauds

    Also known as precision and recall at k. Precision is None if there are no alerts, recall if there are no
    frauds. `alerts` as in `daily_metrics`.
    """
    from pyspark.sql import functions as F

    rows = _alerts_and_frauds(scores, score, _alerts(scores, score, alerts_per_day, alerts))
    caught, raised, frauds = (
        count or 0 for count in rows.agg(*[F.sum(F.expr(sql)) for sql in (*PRECISION, RECALL[1])]).collect()[0]
    )
    return {"precision": _share(caught, raised), "recall": _share(caught, frauds)}


def _alerts(scores: DataFrame, score: str, alerts_per_day: int, alerts: DataFrame | None = None) -> DataFrame:
    """The alerts of `budget_metrics`, with their ``day`` and their ``rank`` in it, from 1; out of `alerts` if there
    are those of a larger budget.
    """
    from pyspark.sql import functions as F

    if alerts is not None:
        return alerts.where(F.col("rank") <= alerts_per_day)
    wanted = ("transaction_id", "tx_datetime", "customer_id", "tx_amount", "tx_fraud")
    columns = [name for name in wanted if name in scores.columns]
    known = scores.where(F.col(score).isNotNull()).select(
        *columns, _utc_day().alias("day"), F.col(score).cast("double").alias("score")
    )
    return _best_of_each_day(known, "transaction_id", alerts_per_day)


def _best_of_each_day(frame: DataFrame, identity: str, limit: int) -> DataFrame:
    """The `limit` rows of each ``day`` with the highest ``score``, and their ``rank``; of equals, the lower `identity`
    first.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    best = frame.withColumn("bucket", F.expr(f"pmod(hash({identity}), {DAY_BUCKETS})"))
    for keys in (["day", "bucket"], ["day"]):
        order = Window.partitionBy(*keys).orderBy(F.col("score").desc(), F.col(identity))
        best = best.withColumn("rank", F.row_number().over(order)).where(F.col("rank") <= limit)
    return best.drop("bucket")


#: Part and whole of shares of rows of `_alerts_and_frauds`.
PRECISION = ("is_alert * tx_fraud", "is_alert")
RECALL = ("is_alert * tx_fraud", "(1 - is_alert) * tx_fraud")


def _alerts_and_frauds(scores: DataFrame, score: str, alerts: DataFrame) -> DataFrame:
    """The rows of `alerts` (``is_alert`` 1) and once more all frauds (0), so that either can be counted by customer."""
    from pyspark.sql import functions as F

    names = [name for name in ("transaction_id", "customer_id", "tx_amount", "tx_fraud") if name in scores.columns]
    frauds = scores.where(F.col(score).isNotNull() & (F.col("tx_fraud") == 1))
    frauds = frauds.select(*names, _utc_day().alias("day"), F.lit(None).cast("int").alias("rank"))
    return alerts.select(*names, "day", "rank", F.lit(1).alias("is_alert")).union(
        frauds.select("*", F.lit(0).alias("is_alert"))
    )


def _shares(
    rows: DataFrame, group: Column, shares: dict[str, tuple[str, ...]], counts: bool = False
) -> dict[Any, dict[str, Any]]:
    """Group → shares, given as (part, whole) in SQL, each with ``…_lower`` and ``…_upper`` (see `share_interval`)
    and, with `counts`, ``…_part`` and ``…_whole``. A share of nothing is None, and so are its bounds.
    """
    from pyspark.sql import functions as F

    sums = [
        F.sum(F.expr(f"double({sql})")).alias(f"{name}_{n}")
        for name, pair in shares.items()
        for n, sql in enumerate(pair)
    ]
    # A row without a customer is one of its own.
    lone = F.expr("IF(customer_id IS NULL, transaction_id, NULL)").alias("lone")
    counts_of = [
        F.sum(F.expr(f"IF(double({pair[1]}) > 0, 1, 0)")).alias(f"{name}_rows") for name, pair in shares.items()
    ]
    by_customer = rows.groupBy(group.alias("group"), "customer_id", lone).agg(*sums, *counts_of)
    moments = [
        F.sum(F.expr(sql.format(x=f"{name}_0", y=f"{name}_1", rows=f"{name}_rows"))).alias(f"{name}_{moment}")
        for name in shares
        for moment, sql in {
            "x": "{x}", "y": "{y}", "xx": "{x} * {x}", "xy": "{x} * {y}", "yy": "{y} * {y}", "n": "IF({y} > 0, 1, 0)",
            "all": "{rows}",
        }.items()
    ]  # fmt: skip
    found: dict[Any, dict[str, Any]] = {}
    for row in by_customer.groupBy("group").agg(*moments).collect():
        entry = found.setdefault(row["group"], {})
        for name in shares:
            x, y, xx, xy, yy = (row[f"{name}_{moment}"] for moment in ("x", "y", "xx", "xy", "yy"))
            bounds: tuple[float | None, ...] = (None, None, None)
            if y > 0:
                # What is all but for the order of its sum is all, and what is left of the squares may be no more.
                share = 1.0 if abs(y - x) <= SUM_NOISE * y else x / y
                squares = xx - 2 * share * xy + share * share * yy
                customers = row[f"{name}_n"]
                variance = 0.0
                if customers > 1 and squares > SUM_NOISE * (xx + share * share * yy):
                    variance = squares / (y * y) * customers / (customers - 1)
                ends = share_interval(share * y, y, variance, customers, row[f"{name}_all"])
                bounds = (share, *(round(end, 12) for end in ends))
            entry.update(zip((name, f"{name}_lower", f"{name}_upper"), bounds))
            if counts:
                entry.update({f"{name}_part": x, f"{name}_whole": y})
    return found


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _utc_day() -> Column:
    """Days from 1970-01-01 UTC to tx_datetime, whatever the time zone of the session is."""
    from pyspark.sql import functions as F

    return F.expr("CAST(floor(CAST(tx_datetime AS BIGINT) / 86400) AS INT)")
