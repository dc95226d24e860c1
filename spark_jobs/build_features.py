"""Build the features of cleaned transactions: Parquet and a report out, one partition per raw file.

A partition is built from its own rows and those of earlier partitions within `HISTORY_DAYS` before its first row. The
features are those of features/registry.py; the rows pass through numpy three times: to be gathered by terminal, then
by customer, and to be sorted and written.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Callable, Iterator

from spark_jobs import runtime
from spark_jobs.features.registry import FEATURE_COLUMNS, FEATURES, HISTORY_DAYS, REGISTRY, REPEATING
from spark_jobs.features.windows import DAY_S, NO_KEY, over_history
from spark_jobs.io import blocks, parquet_files
from spark_jobs.schema import CLEANED_COLUMNS, REPORT_NAME, SCHEMA_VERSION, ddl

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from spark_jobs.features.windows import Array, Columns, History
    from spark_jobs.progress import Progress

#: Raw text behind the rows that one Python process holds at a time, about a quarter of a million, 400 MB in all.
BYTES_PER_TASK = 16 << 20

#: The columns that a row is carried in: name, numpy type. `tx_unix_seconds` is the instant.
ROW_LAYOUT = (
    ("transaction_id", "i8"),
    ("tx_unix_seconds", "i8"),
    ("customer_id", "i8"),
    ("terminal_id", "i8"),
    ("tx_amount", "f8"),
    ("tx_time_seconds", "i8"),
    ("tx_fraud", "i4"),
    ("tx_fraud_scenario", "i4"),
    ("is_current", "u1"),
)


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
        lambda item, progress: build_partition(spark, item, request["run_id"], progress),
        what="features",
        size=lambda item: item["cleaned_bytes"],
    )
    return {
        "run_id": request["run_id"],
        "spark_version": spark.version,
        "seconds": round(time.monotonic() - started, 3),
        "partitions": partitions,
    }


def build_partition(spark: SparkSession, item: dict[str, Any], run_id: str, progress: Progress) -> dict[str, Any]:
    """Build one partition and return its report, which is written last."""
    from pyspark.sql import functions as F

    started = time.monotonic()
    files = runtime.Files(spark)
    report_uri = item["output_uri"] + "/" + REPORT_NAME
    # From here on the partition is incomplete, until its new report is there.
    files.delete(report_uri)

    rows = read_cleaned(spark, [item["cleaned_uri"]]).withColumn("is_current", F.lit(True))
    if item["history"] and item["tx_datetime_min"]:
        since = F.lit(item["tx_datetime_min"]).cast("timestamp") - F.expr(f"INTERVAL {HISTORY_DAYS} DAYS")
        history = read_cleaned(spark, item["history"]).withColumn("is_current", F.lit(False))
        rows = rows.union(history.where(F.col("tx_datetime") > since))
    tallies = runtime.gathering(spark)
    progress.follow(tallies)
    tasks = whole_rounds(spark, -(-item["cleaned_bytes"] // BYTES_PER_TASK))
    parquet_files.write(feature_files(rows, tasks, tallies.add), item["output_uri"])
    if len(tallies.value) != tasks:
        raise RuntimeError(f"{len(tallies.value)} of {tasks} tasks told what they wrote")
    counts = {name: sum(tally[name] for tally in tallies.value) for name in ("rows", "fraud_rows", "unusable_rows")}

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


def whole_rounds(spark: SparkSession, tasks: int) -> int:
    """At least so many tasks that all cores are busy to the end."""
    cores = spark.sparkContext.defaultParallelism
    return -(-max(tasks, 1) // cores) * cores


def feature_files(rows: DataFrame, tasks: int, tell: Callable[[list[dict[str, int]]], None]) -> DataFrame:
    """Files of the rows that are `is_current`, with FEATURE_COLUMNS, sorted by instant and id (see parquet_files).

    `rows` has the columns of CLEANED_COLUMNS and the boolean `is_current`; the others are history. `tasks` is how many
    parts the rows are gathered in at least. Each task that returns rows tells how many: ``rows``, ``fraud_rows``, and
    ``unusable_rows`` (with a feature that is no number or infinite).
    """
    from pyspark.sql import functions as F

    spark = runtime.session(rows)
    options = parquet_files.options(spark, REPEATING)
    tasks = whole_rounds(spark, tasks)
    keys = blocks.partition_keys(tasks)
    with_terminals = (*ROW_LAYOUT, *[(name, "f8") for name in _features_of("terminal")])

    def split(columns: Columns, layout: blocks.Layout, key: str) -> Columns:
        return blocks.split(columns, layout, _gathered_by(columns, key) % tasks, keys)

    def by_terminal(columns: Columns) -> Columns:
        return split(columns, ROW_LAYOUT, "terminal_id")

    def by_customer(packed: list[bytes]) -> Iterator[Columns]:
        columns = blocks.unpack(packed, ROW_LAYOUT)
        yield split({**columns, **_history_features(columns, "terminal")}, with_terminals, "customer_id")

    def finished(packed: list[bytes]) -> Iterator[Columns]:
        columns = blocks.unpack(packed, with_terminals)
        columns.update(_history_features(columns, "customer"))
        ordered = _with_all_columns(_current_in_order(columns))
        tell([_tally(ordered)])
        return parquet_files.files_of(ordered, (*CLEANED_COLUMNS, *FEATURE_COLUMNS), options)

    # numpy has no NULL integer, and slow timestamps: both come as plain integers.
    plain = {
        "tx_unix_seconds": "CAST(tx_datetime AS BIGINT)",
        "customer_id": f"coalesce(customer_id, {NO_KEY})",
        "terminal_id": f"coalesce(terminal_id, {NO_KEY})",
        "is_current": "CAST(is_current AS TINYINT)",
    }
    frame = rows.select(*[F.expr(plain.get(name, name)).alias(name) for name, _ in ROW_LAYOUT])
    frame = blocks.exchange(blocks.map_columns(frame, by_terminal, blocks.BLOCK_SCHEMA), tasks)
    frame = blocks.exchange(blocks.map_blocks(frame, by_customer, blocks.BLOCK_SCHEMA), tasks)
    return blocks.map_blocks(frame, finished, parquet_files.FILE_SCHEMA)


def _features_of(of: str) -> list[str]:
    """The names of the features of customers or terminals."""
    return [feature.name for feature in REGISTRY if feature.of == of]


def _gathered_by(columns: Columns, key: str) -> Array:
    """Numbers that are equal where rows have the same key, and otherwise as good as random."""
    # Rows without a key have nothing to do with each other, and go wherever there is room.
    numbers = columns[key].copy()
    alone = columns[key] == NO_KEY
    numbers[alone] = columns["transaction_id"][alone]
    return blocks.mixed(numbers)


def _history_features(columns: Columns, of: str) -> Columns:
    def compute(history: History) -> Columns:
        return {feature.name: feature.define(history) for feature in REGISTRY if feature.of == of}

    return over_history(columns, f"{of}_id", compute)


def _current_in_order(columns: Columns) -> Columns:
    """The rows that are `is_current`, sorted, without that column."""
    import numpy as np

    current = np.flatnonzero(columns.pop("is_current"))
    order = current[np.lexsort((columns["transaction_id"][current], columns["tx_unix_seconds"][current]))]
    return {name: values[order] for name, values in columns.items()}


def _with_all_columns(columns: Columns) -> Columns:
    """The columns of a table of features, from those that are carried and those of histories."""
    seconds = columns["tx_unix_seconds"]
    return {
        **columns,
        "tx_datetime": seconds,
        "tx_time_days": (columns["tx_time_seconds"] // DAY_S).astype("i4"),
        **{feature.name: feature.define(seconds) for feature in REGISTRY if feature.of == "transaction"},
    }


def _tally(columns: Columns) -> dict[str, int]:
    import numpy as np

    usable = np.ones(len(columns["tx_amount"]), dtype=bool)
    for name in FEATURES:
        usable &= np.isfinite(columns[name])
    return {
        "rows": len(usable),
        "fraud_rows": int(columns["tx_fraud"].sum()),
        "unusable_rows": int((~usable).sum()),
    }


if __name__ == "__main__":
    runtime.main(run, "build_features")
