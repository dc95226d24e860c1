"""Exact quality figures of fraud scores, computed where the rows are.

A held-out week of the real data has eleven million rows, so nothing here collects rows, needs pandas, or
sorts everything in one partition. What reaches the driver is a few numbers per partition, and the best-ranked
rows of each day where a figure is defined by them.

A frame of scores has the columns of the lake's ``test_scores``: ``transaction_id``, ``tx_datetime``,
``customer_id``, ``tx_fraud`` (0/1) and a double column of scores, where higher means more suspicious.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from spark_jobs import runtime

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

#: Cards that are checked each day in the card precision of the handbook.
CARDS_PER_DAY = 100

#: Parts into which a day is split before its best rows are ranked, so that no task has to sort a whole day.
DAY_BUCKETS = 64


def evaluate(scores: DataFrame, score: str = "score", alerts_per_day: int = 100) -> dict[str, Any]:
    """All figures of one score column: ``average_precision``, ``roc_auc``, ``card_precision_at_100``,
    ``precision_at_budget``, ``recall_at_budget``, ``rows``, ``frauds``.

    A figure that is not defined on these rows is None (see each function). Rows whose score is NULL are left
    out.
    """
    ranking = ranking_metrics(scores, score)
    budget = budget_metrics(scores, score, alerts_per_day)
    return {
        "average_precision": ranking["average_precision"],
        "roc_auc": ranking["roc_auc"],
        "card_precision_at_100": card_precision(scores, score, CARDS_PER_DAY),
        "precision_at_budget": budget["precision"],
        "recall_at_budget": budget["recall"],
        "rows": ranking["rows"],
        "frauds": ranking["frauds"],
    }


def ranking_metrics(
    scores: DataFrame, score: str = "score", label: str = "tx_fraud", rows_per_partition: int = 250_000
) -> dict[str, Any]:
    """Average precision and area under the ROC curve, exact, with ties: one sort by score gives both.

    With the distinct scores in descending order, n_i rows and p_i frauds at the i-th, N_i and P_i their
    running sums up to and with i, and N and P the totals::

        average precision = sum_i (p_i / P) * (P_i / N_i)
        ROC AUC           = sum_i (n_i - p_i) * (P_i - p_i / 2) / (P * (N - P))

    The first is the step-wise sum of scikit-learn's ``average_precision_score`` (no interpolation; rows with
    equal scores enter together). The second is the probability that a fraud outranks a genuine row, ties
    counted as one half (Hanley and McNeil, 1982, https://doi.org/10.1148/radiology.143.1.7063747).

    The distinct scores are partitioned by range, each partition's totals (`rows_per_partition` rows or so)
    are collected and become the offsets of the running sums within the partitions after it.

    Returns ``average_precision``, ``roc_auc`` (both None if there are no frauds or nothing but frauds),
    ``rows``, ``frauds``. Rounded to 12 decimals, because the order in which partial sums arrive changes the
    last ones.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    known = scores.where(F.col(score).isNotNull())
    partitions = max(1, math.ceil(known.count() / rows_per_partition))
    by_score = (
        known.groupBy(F.col(score).cast("double").alias("score"))
        .agg(F.count(F.lit(1)).alias("rows"), F.sum(F.col(label).cast("bigint")).alias("frauds"))
        .repartitionByRange(partitions, F.col("score").desc())
        .withColumn("part", F.spark_partition_id())
        # The bounds of the ranges are sampled: without this, the second pass could see other partitions.
        .persist()
    )
    try:
        totals = by_score.groupBy("part").agg(F.sum("rows").alias("rows"), F.sum("frauds").alias("frauds")).collect()
        offsets: list[tuple[int, int, int]] = []
        rows = frauds = 0
        for total in sorted(totals, key=lambda row: row["part"]):
            offsets.append((total["part"], rows, frauds))
            rows, frauds = rows + total["rows"], frauds + total["frauds"]
        result: dict[str, Any] = {"average_precision": None, "roc_auc": None, "rows": rows, "frauds": frauds}
        if frauds in (0, rows):
            return result

        so_far = (
            Window.partitionBy("part")
            .orderBy(F.col("score").desc())
            .rowsBetween(Window.unboundedPreceding, Window.currentRow)
        )
        before = runtime.session(scores).createDataFrame(offsets, "part int, rows_before bigint, frauds_before bigint")
        running = by_score.join(F.broadcast(before), "part").select(
            "part",
            "rows",
            "frauds",
            (F.col("rows_before") + F.sum("rows").over(so_far)).alias("rows_so_far"),
            (F.col("frauds_before") + F.sum("frauds").over(so_far)).alias("frauds_so_far"),
        )
        sums = (
            running.groupBy("part")
            .agg(
                F.expr("sum(frauds * (frauds_so_far / rows_so_far))").alias("precision"),
                F.expr("sum((rows - frauds) * (frauds_so_far - frauds / 2))").alias("outranked"),
            )
            .collect()
        )
    finally:
        by_score.unpersist()
    precision = math.fsum(row["precision"] for row in sums)
    outranked = math.fsum(row["outranked"] for row in sums)
    result["average_precision"] = round(precision / frauds, 12)
    result["roc_auc"] = round(outranked / (frauds * (rows - frauds)), 12)
    return result


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


def budget_metrics(scores: DataFrame, score: str = "score", alerts_per_day: int = 100) -> dict[str, float | None]:
    """Precision and recall of the alerts that a fixed daily budget raises.

    Each day's `alerts_per_day` transactions with the highest scores are alerts (equal scores: the lower
    transaction_id first; all of the day's if it has fewer). Over all days together::

        precision = frauds among the alerts / alerts        recall = frauds among the alerts / frauds

    Also known as precision and recall at k. Precision is None if there are no alerts, recall if there are no
    frauds.
    """
    from pyspark.sql import functions as F

    rows = scores.where(F.col(score).isNotNull()).select(
        _utc_day().alias("day"), "transaction_id", F.col(score).cast("double").alias("score"), "tx_fraud"
    )
    frauds = rows.agg(F.sum("tx_fraud")).collect()[0][0] or 0
    alerts = (
        _best_of_each_day(rows, "transaction_id", alerts_per_day)
        .agg(F.count(F.lit(1)).alias("rows"), F.sum("tx_fraud").alias("frauds"))
        .collect()[0]
    )
    caught = alerts["frauds"] or 0
    return {
        "precision": caught / alerts["rows"] if alerts["rows"] else None,
        "recall": caught / frauds if frauds else None,
    }


def _best_of_each_day(frame: DataFrame, identity: str, limit: int) -> DataFrame:
    """The `limit` rows of each ``day`` with the highest ``score``; of equals, the lower `identity` first."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    best = frame.withColumn("bucket", F.expr(f"pmod(hash({identity}), {DAY_BUCKETS})"))
    for keys in (["day", "bucket"], ["day"]):
        order = Window.partitionBy(*keys).orderBy(F.col("score").desc(), F.col(identity))
        best = best.withColumn("rank", F.row_number().over(order)).where(F.col("rank") <= limit)
    return best.drop("bucket", "rank")


def _utc_day() -> Column:
    """Days from 1970-01-01 UTC to tx_datetime, whatever the time zone of the session is."""
    from pyspark.sql import functions as F

    return F.expr("CAST(floor(CAST(tx_datetime AS BIGINT) / 86400) AS INT)")
