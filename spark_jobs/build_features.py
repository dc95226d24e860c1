"""Build the features of cleaned transactions: Parquet and a report out, one partition per raw file.

A partition is built from its own rows and those of earlier partitions within `HISTORY_DAYS` before its first row. The
features are those of spark_jobs/features.py; the rows pass through pandas twice, gathered by customer and by terminal.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Callable, Iterator

from spark_jobs import runtime
from spark_jobs.features import FEATURE_COLUMNS, FEATURES, HISTORY_DAYS, REGISTRY
from spark_jobs.schema import CLEANED_COLUMNS, REPORT_NAME, SCHEMA_VERSION, ddl
from spark_jobs.windows import NO_KEY, with_columns

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import Column, DataFrame, SparkSession

    from spark_jobs.windows import Array, History

#: Raw text behind the rows that one Python process holds at a time, about half a million.
BYTES_PER_TASK = 32 << 20


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
        spark,
        request["partitions"],
        lambda item: build_partition(spark, item, request["run_id"]),
        what="features",
        size=lambda item: item["cleaned_bytes"],
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

    rows = read_cleaned(spark, [item["cleaned_uri"]]).withColumn("is_current", F.lit(True))
    if item["history"] and item["tx_datetime_min"]:
        first = datetime.strptime(item["tx_datetime_min"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        history = read_cleaned(spark, item["history"]).withColumn("is_current", F.lit(False))
        rows = rows.union(history.where(F.col("tx_datetime") > F.lit(first - timedelta(days=HISTORY_DAYS))))
    features = add_features(rows, tasks=-(-item["cleaned_bytes"] // BYTES_PER_TASK))
    features, get_counts = runtime.observed(features, "features", *_count_columns())
    ordered = features.sortWithinPartitions("tx_datetime", "transaction_id")
    # Most columns are measurements: looking for repetitions among them costs a sixth of the job and saves no space.
    ordered.write.mode("overwrite").option("parquet.enable.dictionary", "false").parquet(item["output_uri"])
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


def add_features(rows: DataFrame, *, tasks: int = 1) -> DataFrame:
    """The rows that are `is_current`, with the columns of FEATURE_COLUMNS.

    `rows` has the columns of CLEANED_COLUMNS and the boolean `is_current`; the others are history. `tasks` is how many
    parts the rows are gathered in at least.
    """
    from pyspark.sql import functions as F

    tasks = max(tasks, runtime.session(rows).sparkContext.defaultParallelism)
    plain = {
        "tx_unix_seconds": "CAST(tx_datetime AS BIGINT)",
        "customer_id": f"coalesce(customer_id, {NO_KEY})",
        "terminal_id": f"coalesce(terminal_id, {NO_KEY})",
    }
    # pandas has no NULL integer and slow timestamps: both go in as plain integers.
    carried = [name for name, _, _ in CLEANED_COLUMNS if name not in ("tx_datetime", "tx_time_days")]
    names = ["tx_unix_seconds", *carried, "is_current"]
    frame = rows.select(*[F.expr(plain.get(name, name)).alias(name) for name in names])
    frame = _with_history(frame, "terminal", tasks)
    frame = _with_history(frame, "customer", tasks, keep="is_current")
    restored = {
        "tx_datetime": "CAST(tx_unix_seconds AS TIMESTAMP)",
        "tx_time_days": "CAST(floor(tx_time_seconds / 86400) AS INT)",
        "customer_id": "IF(customer_id < 0, NULL, customer_id)",
        "terminal_id": "IF(terminal_id < 0, NULL, terminal_id)",
    }
    columns = [name for name, _, _ in (*CLEANED_COLUMNS, *FEATURE_COLUMNS)]
    of_transaction = {feature.name: str(feature.define) for feature in REGISTRY if feature.of == "transaction"}
    frame = frame.withColumn("tx_datetime", F.expr(restored.pop("tx_datetime")))
    return frame.select(*[F.expr({**restored, **of_transaction}.get(name, name)).alias(name) for name in columns])


def _with_history(frame: DataFrame, of: str, tasks: int, keep: str | None = None) -> DataFrame:
    """`frame` with the features of customers or terminals, and if `keep` only the rows where that column is true."""
    from pyspark.sql import functions as F

    key = f"{of}_id"
    columns = [(field.name, field.dataType.simpleString(), "") for field in frame.schema if field.name != keep]
    columns += [(feature.name, "double", "") for feature in REGISTRY if feature.of == of]
    # Rows without a key have nothing to do with each other, and go wherever there is room.
    alone = F.when(F.col(key) == NO_KEY, F.col("transaction_id"))
    return frame.repartition(tasks, F.col(key), alone).mapInPandas(_adder(of, key, keep), ddl(columns))


def _adder(of: str, key: str, keep: str | None) -> Callable[[Iterator[pd.DataFrame]], Iterator[pd.DataFrame]]:
    def compute(history: History) -> dict[str, Array]:
        return {feature.name: feature.define(history) for feature in REGISTRY if feature.of == of}  # type: ignore[operator]

    return lambda batches: with_columns(batches, key, compute, keep=keep)


def _count_columns() -> list[Column]:
    from pyspark.sql import functions as F

    # 0 times a number is 0; times NaN or an infinity it is NaN, and times NULL it is NULL.
    usable = "{} = 0".format(" + ".join(f"{feature} * 0" for feature in FEATURES))
    return [
        F.count(F.lit(1)).alias("rows"),
        F.expr("coalesce(sum(tx_fraud), 0)").alias("fraud_rows"),
        F.expr(f"count(IF({usable}, NULL, 1))").alias("unusable_rows"),
    ]


if __name__ == "__main__":
    runtime.main(run, "build_features")
