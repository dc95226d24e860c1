"""Build the features of cleaned transactions: Parquet and a report, one partition per raw file.

A partition is built from its own rows and those of earlier partitions within `HISTORY_DAYS` before its first row. The
features are those of features/registry.py. Rows pass through numpy three times: they are shuffled by terminal, then by
customer, then sorted and written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Iterator

from spark_jobs import partitions, runtime
from spark_jobs.features.registry import DICTIONARY_COLUMNS, FEATURE_COLUMNS, HISTORY_DAYS, MODEL_INPUTS, REGISTRY
from spark_jobs.features.windows import over_history
from spark_jobs.io import blocks, parquet_files
from spark_jobs.schema import CLEANED_COLUMNS, DAY_S, NO_KEY, ddl

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from spark_jobs.features.windows import History
    from spark_jobs.io.blocks import Array, Columns
    from spark_jobs.progress import Progress

#: Raw text per task: 250,000 rows, which take 400 MB in a Python process.
BYTES_PER_TASK = 16 << 20

#: The shuffled columns of a row: name, numpy type. `tx_unix_seconds` is the instant.
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
    """Build the features of the partitions of `request`, one result per partition (see partitions.run_partitions).

    Request: ``run_id``; ``partitions``, a list of ``partition`` (key), ``cleaned_uri``, ``tx_datetime_min`` (ISO
    8601, of the partition's first row; None if it has no rows), ``history`` (list of the cleaned directories of
    earlier partitions), ``cleaned_bytes`` (size of the raw text behind all of these), ``inputs`` (the versions of the
    cleaned partitions; copied into the report), ``output_uri``.
    """
    return partitions.run_partitions(
        spark,
        request,
        lambda item, progress: build_partition(spark, item, progress),
        what="features",
        size=lambda item: item["cleaned_bytes"],
    )


def build_partition(spark: SparkSession, item: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Write the features of one partition; return the fields of its report."""
    from pyspark.sql import functions as F

    rows = read_cleaned(spark, [item["cleaned_uri"]]).withColumn("is_current", F.lit(True))
    if item["history"] and item["tx_datetime_min"]:
        since = F.lit(item["tx_datetime_min"]).cast("timestamp") - F.expr(f"INTERVAL {HISTORY_DAYS} DAYS")
        history = read_cleaned(spark, item["history"]).withColumn("is_current", F.lit(False))
        rows = rows.union(history.where(F.col("tx_datetime") > since))
    accumulator = partitions.list_accumulator(spark)
    progress.follow(accumulator)
    tasks = runtime.round_up_to_cores(spark, -(-item["cleaned_bytes"] // BYTES_PER_TASK))
    parquet_files.write(feature_files(rows, tasks, accumulator.add), item["output_uri"])
    tallies = partitions.tallies_of(accumulator, tasks)
    return {
        "inputs": item["inputs"],
        "features": list(MODEL_INPUTS),
        "counts": {name: sum(tally[name] for tally in tallies) for name in ("rows", "fraud_rows", "unusable_rows")},
    }


def read_cleaned(spark: SparkSession, uris: list[str]) -> DataFrame:
    """Read cleaned partitions, with the columns of CLEANED_COLUMNS."""
    names = [name for name, _, _ in CLEANED_COLUMNS]
    paths = [runtime.literal_path(uri) for uri in uris]
    return spark.read.schema(ddl(CLEANED_COLUMNS)).parquet(*paths).select(*names)


def feature_files(rows: DataFrame, tasks: int, report_tally: Callable[[list[dict[str, int]]], None]) -> DataFrame:
    """Parquet files (see parquet_files) of the `is_current` rows with their features, sorted by instant and id.

    `rows` has the columns of CLEANED_COLUMNS and the boolean `is_current`; the other rows are history. All are
    shuffled into `tasks` partitions, rounded up to a multiple of the cores. Each task that writes files has a tally:
    ``rows``, ``fraud_rows``, and ``unusable_rows`` (with a model input that is not finite).
    """
    from pyspark.sql import functions as F

    spark = runtime.session(rows)
    options = parquet_files.options(spark, DICTIONARY_COLUMNS)
    tasks = runtime.round_up_to_cores(spark, tasks)
    keys = blocks.partition_keys(tasks)
    terminal_features = [feature.name for feature in REGISTRY if feature.entity == "terminal"]
    with_terminal_features = (*ROW_LAYOUT, *[(name, "f8") for name in terminal_features])

    def split_by_terminal(columns: Columns) -> Columns:
        return blocks.split(columns, ROW_LAYOUT, _partition_of(columns, "terminal_id", tasks), keys)

    def split_by_customer(packed: list[bytes]) -> Iterator[Columns]:
        columns = blocks.unpack(packed, ROW_LAYOUT)
        columns.update(_entity_features(columns, "terminal"))
        yield blocks.split(columns, with_terminal_features, _partition_of(columns, "customer_id", tasks), keys)

    def finish(packed: list[bytes]) -> Iterator[Columns]:
        columns = blocks.unpack(packed, with_terminal_features)
        columns.update(_entity_features(columns, "customer"))
        columns = _with_derived_columns(_sorted_current(columns))
        report_tally([_tally(columns)])
        return parquet_files.files_of(columns, (*CLEANED_COLUMNS, *FEATURE_COLUMNS), options)

    # numpy has no NULL integers, and Arrow's timestamps are slow to convert: both become plain integers.
    plain = {
        "tx_unix_seconds": "CAST(tx_datetime AS BIGINT)",
        "customer_id": f"coalesce(customer_id, {NO_KEY})",
        "terminal_id": f"coalesce(terminal_id, {NO_KEY})",
        "is_current": "CAST(is_current AS TINYINT)",
    }
    frame = rows.select(*[F.expr(plain.get(name, name)).alias(name) for name, _ in ROW_LAYOUT])
    frame = blocks.exchange(blocks.map_columns(frame, split_by_terminal, blocks.BLOCK_SCHEMA), tasks)
    frame = blocks.exchange(blocks.map_blocks(frame, split_by_customer, blocks.BLOCK_SCHEMA), tasks)
    return blocks.map_blocks(frame, finish, parquet_files.FILE_SCHEMA)


def _partition_of(columns: Columns, key: str, tasks: int) -> Array:
    """Partition numbers, equal for rows with the same key; rows without a key are spread evenly."""
    import numpy as np

    keys: Array = columns[key]
    return blocks.hash_ids(np.where(keys == NO_KEY, columns["transaction_id"], keys)) % tasks


def _entity_features(columns: Columns, entity: str) -> Columns:
    def compute(history: History) -> Columns:
        return {feature.name: feature.compute(history) for feature in REGISTRY if feature.entity == entity}

    return over_history(columns, f"{entity}_id", compute)


def _sorted_current(columns: Columns) -> Columns:
    """The `is_current` rows, sorted by instant and id, without that column."""
    import numpy as np

    current = np.flatnonzero(columns.pop("is_current"))
    order = current[np.lexsort((columns["transaction_id"][current], columns["tx_unix_seconds"][current]))]
    return {name: values[order] for name, values in columns.items()}


def _with_derived_columns(columns: Columns) -> Columns:
    """Add the columns that depend on a single row only."""
    seconds = columns["tx_unix_seconds"]
    return {
        **columns,
        "tx_datetime": seconds,
        "tx_time_days": (columns["tx_time_seconds"] // DAY_S).astype("i4"),
        **{feature.name: feature.compute(seconds) for feature in REGISTRY if feature.entity == "transaction"},
    }


def _tally(columns: Columns) -> dict[str, int]:
    import numpy as np

    usable = np.ones(len(columns["tx_amount"]), dtype=bool)
    for name in MODEL_INPUTS:
        usable &= np.isfinite(columns[name])
    return {
        "rows": len(usable),
        "fraud_rows": int(columns["tx_fraud"].sum()),
        "unusable_rows": int((~usable).sum()),
    }


if __name__ == "__main__":
    runtime.main(run, "build_features")
