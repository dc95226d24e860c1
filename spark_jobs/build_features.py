"""Build the features of cleaned transactions: Parquet and a report out, one partition per raw file.

The features are the fifteen of the Fraud Detection Handbook (Le Borgne, Siblini, Lebichot, Bontempi: Reproducible
Machine Learning for Credit Card Fraud Detection, chapter 3, "Baseline feature transformation"), with exact windows.
A partition is built from its own rows and those of earlier partitions within `HISTORY_DAYS` before its first row.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from spark_jobs import runtime
from spark_jobs.schema import CLEANED_COLUMNS, REPORT_NAME, SCHEMA_VERSION, ddl

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession, WindowSpec

DAY_S = 86400

#: Lengths of the trailing windows, in days.
WINDOW_DAYS = (1, 7, 30)

#: A label counts as known only so many days after its transaction.
LABEL_DELAY_DAYS = 7

#: Days of history before its first row that a partition needs.
HISTORY_DAYS = max(WINDOW_DAYS) + LABEL_DELAY_DAYS

#: Columns of ``transaction_features`` beyond those of ``cleaned_transactions``: name, Spark type, description.
FEATURE_COLUMNS = (
    ("tx_during_weekend", "double", "1 on Saturday and Sunday (UTC), else 0."),
    ("tx_during_night", "double", "1 from 00:00 to 06:59 (UTC), else 0."),
    *[
        (name.format(days), "double", text.format("day" if days == 1 else f"{days} days"))
        for days in WINDOW_DAYS
        for name, text in (
            (
                "customer_tx_count_{}d",
                "The customer's transactions in the {} up to and including this one; 1 if unknown.",
            ),
            (
                "customer_mean_amount_{}d",
                "Mean amount of the customer's transactions in the {} up to it; if unknown, this amount.",
            ),
            (
                "terminal_tx_count_{}d",
                "The terminal's transactions in the {} that end a label delay ago; 0 if unknown.",
            ),
            (
                "terminal_fraud_risk_{}d",
                "Share of frauds among the terminal's transactions in these {}; 0 if there are none.",
            ),
        )
    ],
)

#: The inputs of a model, all doubles that are never NULL.
FEATURES = ("tx_amount", *[name for name, _, _ in FEATURE_COLUMNS])


def run(spark: SparkSession, request: dict[str, Any]) -> dict[str, Any]:
    """Build the features of the partitions of `request`, one verdict per partition.

    Request: ``run_id``; ``partitions``, a list of ``partition`` (key), ``cleaned_uri``, ``tx_datetime_min`` (ISO
    8601, of the partition's first row; None if it has none), ``history`` (list of the cleaned directories of
    earlier partitions), ``cleaned_bytes`` (size of the raw text behind all of these), ``inputs`` (what the rows
    came from; copied into the report), ``output_uri``.

    Returns ``run_id``, ``spark_version``, ``seconds`` and ``partitions``: key → ``status`` ``succeeded`` with the
    ``report`` that was also written to ``output_uri``, or ``failed`` with an ``error``.
    """
    started = time.monotonic()
    runtime.configure(spark)
    partitions = runtime.for_each_partition(
        request["partitions"], lambda item: build_partition(spark, item, request["run_id"]), what="features"
    )
    return {
        "run_id": request["run_id"],
        "spark_version": spark.version,
        "seconds": round(time.monotonic() - started, 3),
        "partitions": partitions,
    }


def build_partition(spark: SparkSession, item: dict[str, Any], run_id: str) -> dict[str, Any]:
    """Build one partition and return its report, which is written last."""
    from pyspark.sql import functions as F

    started = time.monotonic()
    files = runtime.Files(spark)
    report_uri = item["output_uri"] + "/" + REPORT_NAME
    # From here on the partition is incomplete, until its new report is there.
    files.delete(report_uri)
    runtime.set_shuffle_partitions(spark, item["cleaned_bytes"])

    rows = read_cleaned(spark, [item["cleaned_uri"]]).withColumn("is_history", F.lit(False))
    if item["history"] and item["tx_datetime_min"]:
        first = datetime.strptime(item["tx_datetime_min"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        history = read_cleaned(spark, item["history"]).withColumn("is_history", F.lit(True))
        rows = rows.union(history.where(F.col("tx_datetime") > F.lit(first - timedelta(days=HISTORY_DAYS))))
    features = add_features(rows).where("NOT is_history").drop("is_history")
    features, get_counts = runtime.observed(features, "features", *_count_columns())
    features.sortWithinPartitions("tx_datetime", "transaction_id").write.mode("overwrite").parquet(item["output_uri"])
    counts = get_counts()

    report = {
        "schema_version": SCHEMA_VERSION,
        "partition": item["partition"],
        "run_id": run_id,
        "inputs": item["inputs"],
        "features": list(FEATURES),
        "counts": counts,
        "spark_version": spark.version,
        "seconds": round(time.monotonic() - started, 3),
    }
    files.write_json(report_uri, report)
    return report


def read_cleaned(spark: SparkSession, uris: list[str]) -> DataFrame:
    """The rows of cleaned partitions, with the columns of CLEANED_COLUMNS."""
    names = [name for name, _, _ in CLEANED_COLUMNS]
    paths = [runtime.literal_path(uri) for uri in uris]
    return spark.read.schema(ddl(CLEANED_COLUMNS)).parquet(*paths).select(*names)


def add_features(rows: DataFrame) -> DataFrame:
    """`rows` (the columns of CLEANED_COLUMNS, and any others) with the columns of FEATURE_COLUMNS."""
    return add_terminal_features(add_customer_features(add_time_features(rows)))


def add_time_features(rows: DataFrame) -> DataFrame:
    """Weekend and night flags (UTC), from the handbook's code: night is hour <= 6."""
    from pyspark.sql import functions as F

    return rows.withColumn("tx_during_weekend", F.expr("double(dayofweek(tx_datetime) IN (1, 7))")).withColumn(
        "tx_during_night", F.expr("double(hour(tx_datetime) <= 6)")
    )


def add_customer_features(rows: DataFrame) -> DataFrame:
    """Number and mean amount of the customer's transactions in (t - window, t], this one included.

    Transactions of the same second see each other.
    """
    from pyspark.sql import functions as F

    for days in WINDOW_DAYS:
        window = _window("customer_id", 1 - days * DAY_S, 0)
        rows = rows.withColumn(f"customer_tx_count_{days}d", F.count(F.lit(1)).over(window).cast("double"))
        rows = rows.withColumn(f"customer_mean_amount_{days}d", F.avg("tx_amount").over(window))
    return rows


def add_terminal_features(rows: DataFrame) -> DataFrame:
    """Number of the terminal's transactions in (t - delay - window, t - delay], and the share of frauds among them.

    The delay of LABEL_DELAY_DAYS is how long a fraud stays unknown.
    """
    from pyspark.sql import functions as F

    for days in WINDOW_DAYS:
        window = _window("terminal_id", 1 - (days + LABEL_DELAY_DAYS) * DAY_S, -LABEL_DELAY_DAYS * DAY_S)
        count = F.count(F.lit(1)).over(window).cast("double")
        risk = F.coalesce(F.avg("tx_fraud").over(window), F.lit(0.0))
        rows = rows.withColumn(f"terminal_tx_count_{days}d", count)
        rows = rows.withColumn(f"terminal_fraud_risk_{days}d", risk)
    return rows


def _window(key: str, first: int, last: int) -> WindowSpec:
    """Rows of the same key from `first` to `last` seconds after the current one (both included).

    Rows without a key have nothing to do with each other: each stands alone.
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    alone = F.when(F.col(key).isNull(), F.col("transaction_id"))
    return Window.partitionBy(key, alone).orderBy("tx_time_seconds").rangeBetween(first, last)


def _count_columns() -> list[Column]:
    from pyspark.sql import functions as F

    unusable = " OR ".join(f"{f} IS NULL OR isnan({f}) OR abs({f}) = double('Infinity')" for f in FEATURES)
    return [
        F.count(F.lit(1)).alias("rows"),
        F.expr("coalesce(sum(tx_fraud), 0)").alias("fraud_rows"),
        F.expr(f"count(IF({unusable}, 1, NULL))").alias("unusable_rows"),
    ]


if __name__ == "__main__":
    runtime.main(run, "build_features")
