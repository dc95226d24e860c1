"""The handbook's twelve window features by Spark's range windows and by the platform's sorted numpy columns.

Both methods read the same cleaned rows in the same warm session and write Parquet, with terminals of even size and with
a few that have a large share of the rows. First it is checked that both give the same values.
Spark rescans a window for every row, so its cost grows with the rows of a terminal.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    EPOCH,
    log_progress,
    markdown,
    options,
    simulate,
    spark_session,
    work_directory,
    write_results,
)
from benchmarks.features import HOT_SHARE, HOT_TERMINALS, large_simulation, with_hot_terminals
from ml_platform.lake.resource import BYTES_PER_ROW
from ml_platform.spark.bare_jobs import clean
from spark_jobs import runtime
from spark_jobs.build_features import feature_files
from spark_jobs.features.registry import LABEL_DELAY_DAYS, WINDOW_DAYS
from spark_jobs.io import parquet_files
from spark_jobs.schema import DAY_S

if TYPE_CHECKING:
    from pathlib import Path

    from pyspark.sql import DataFrame

NAMES = [
    f"{name}_{days}d"
    for name in ("customer_tx_count", "customer_mean_amount", "terminal_tx_count", "terminal_fraud_risk")
    for days in WINDOW_DAYS
]


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument(
        "--million-rows", type=float, nargs="+", default=[0.25, 0.5, 1], metavar="N", help="sizes (0.25 0.5 1)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements of each (default: 3)")
    arguments = parser.parse_args()
    results = []
    with work_directory(arguments.work) as work:
        spark = spark_session()
        for size in sorted(arguments.million_rows):
            lake = work / f"{size:g}"
            clean(spark, simulate(lake / "raw", large_simulation(size), 1), lake, EPOCH)
            even = spark.read.parquet(f"file://{lake}/cleaned_transactions").drop("raw_file").coalesce(2).cache()
            for terminals, rows in (
                ("even", even),
                (f"{HOT_TERMINALS} terminals carry {HOT_SHARE:.0%}", with_hot_terminals(even)),
            ):
                results += compare(rows, arguments.rounds, {"rows": rows.count(), "terminals": terminals}, lake)
            even.unpersist()
    write_results(arguments.json, results, lambda: table(results))


def compare(rows: DataFrame, rounds: int, case: dict[str, Any], lake: Path) -> list[dict[str, Any]]:
    """Seconds of each method, `rounds` times. Raises SystemExit if their values differ."""
    from pyspark.sql import functions as F

    # With Spark's default of 200, the tasks' overhead would dominate here.
    spark = runtime.session(rows)
    runtime.set_shuffle_partitions(spark, BYTES_PER_ROW * case["rows"])
    methods = {"range windows": range_windows, "sorted columns": sorted_columns}
    outputs = []
    for way, compute in methods.items():
        compute(rows, f"file://{lake}/{way}")
        outputs.append(spark.read.parquet(f"file://{lake}/{way}").select("transaction_id", *NAMES))
    both = outputs[0].join(outputs[1].toDF("transaction_id", *[f"our_{name}" for name in NAMES]), "transaction_id")
    same = [F.expr(f"abs({name} - our_{name}) <= 1e-9 * greatest(1, abs({name}))") for name in NAMES]
    if both.count() != case["rows"]:
        raise SystemExit("the two methods do not give the same rows")
    for name, equal in zip(NAMES, same, strict=True):
        if differing := both.where(~equal).count():
            raise SystemExit(f"{name} differs in {differing} rows")
    results = []
    for _ in range(rounds):
        for way, compute in methods.items():
            started = time.monotonic()
            compute(rows, f"file://{lake}/{way}")
            results.append({**case, "way": way, "seconds": time.monotonic() - started})
            log_progress(str(results[-1]))
    return results


def range_windows(rows: DataFrame, uri: str) -> None:
    """Write the twelve features by Spark's windows; all rows must have a customer and a terminal."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    time_s = F.col("tx_datetime").cast("bigint")
    columns = {}
    for days in WINDOW_DAYS:
        trailing = Window.partitionBy("customer_id").orderBy(time_s).rangeBetween(1 - days * DAY_S, 0)
        late = -LABEL_DELAY_DAYS * DAY_S
        known = Window.partitionBy("terminal_id").orderBy(time_s).rangeBetween(late + 1 - days * DAY_S, late)
        columns[f"customer_tx_count_{days}d"] = F.count(F.lit(1)).over(trailing).cast("double")
        columns[f"customer_mean_amount_{days}d"] = F.avg("tx_amount").over(trailing)
        columns[f"terminal_tx_count_{days}d"] = F.count(F.lit(1)).over(known).cast("double")
        columns[f"terminal_fraud_risk_{days}d"] = F.coalesce(F.avg("tx_fraud").over(known), F.lit(0.0))
    features = rows.select("transaction_id", *[columns[name].alias(name) for name in NAMES])
    features.write.mode("overwrite").parquet(uri)


def sorted_columns(rows: DataFrame, uri: str) -> None:
    """The same by the platform, which also computes its other features and writes all columns."""
    from pyspark.sql import functions as F

    files = feature_files(rows.withColumn("is_current", F.lit(True)), 2, lambda tallies: None)
    parquet_files.write(files, uri)


def table(results: list[dict[str, Any]]) -> str:
    """One row per case: median seconds, and the ratio of Spark's windows to the platform's columns."""
    lines = []
    for case in dict.fromkeys((result["terminals"], result["rows"]) for result in results):
        median = {
            way: statistics.median(
                result["seconds"]
                for result in results
                if (result["terminals"], result["rows"], result["way"]) == (*case, way)
            )
            for way in ("range windows", "sorted columns")
        }
        ratio = median["range windows"] / median["sorted columns"]
        lines.append([case[0], f"{case[1]:,}", *[f"{value:.1f}" for value in median.values()], f"{ratio:.1f}"])
    header = ["terminals", "rows", "Spark's range windows, 12 features, s", "sorted columns, all features, s", "ratio"]
    return markdown(header, sorted(lines, key=lambda line: line[0] != "even"))


if __name__ == "__main__":
    main()
