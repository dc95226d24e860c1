"""Time to build features per million rows: growing partitions, and a few terminals with a large share of the rows.

All sizes are timed in turn in one warm Spark session, and the round is repeated, so that disturbances of the machine
affect all of them. The marginal cost between two sizes is the time of a further million rows.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    EPOCH,
    log_progress,
    markdown,
    options,
    simulate,
    simulation,
    spark_session,
    work_directory,
    write_results,
)
from ml_platform.spark.bare_jobs import clean, features

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from ml_platform.dev.simulator import Simulation


#: In the second data set of each size, HOT_TERMINALS terminals have HOT_SHARE of all rows.
HOT_TERMINALS = 10
HOT_SHARE = 0.3


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument(
        "--million-rows", type=float, nargs="+", default=[2, 8, 16], metavar="N", help="sizes (default: 2 8 16)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements of each (default: 3)")
    parser.add_argument("--driver-memory", help="memory of Spark's driver (default: a third of the machine's, to 8 GB)")
    arguments = parser.parse_args()
    with work_directory(arguments.work) as work:
        spark = spark_session(arguments.driver_memory)
        results = measure(spark, sorted(arguments.million_rows), arguments.rounds, work)
    write_results(arguments.json, results, lambda: table(results))


def measure(spark: SparkSession, sizes: list[float], rounds: int, work: Path) -> list[dict[str, Any]]:
    """Seconds of each size and distribution, `rounds` times."""
    data = {}
    for size in sizes:
        lake = work / f"{size:g}"
        data[size, "even"] = lake, clean(spark, simulate(lake / "raw", large_simulation(size), 1), lake, EPOCH)
        hot = work / f"{size:g}-hot"
        for key in data[size, "even"][1]:
            table = f"cleaned_transactions/raw_file={key}"
            rows = with_hot_terminals(spark.read.parquet(f"file://{lake}/{table}"))
            rows.write.mode("overwrite").parquet(f"file://{hot}/{table}")
        data[size, f"{HOT_TERMINALS} terminals carry {HOT_SHARE:.0%}"] = hot, data[size, "even"][1]
    log_progress("warming up")
    lake, reports = data[sizes[0], "even"]
    features(spark, reports, lake)
    results: list[dict[str, Any]] = []
    for number in range(rounds):
        for (size, terminals), (lake, reports) in data.items():
            started = time.monotonic()
            built = features(spark, reports, lake)
            seconds = time.monotonic() - started
            count = sum(report["counts"]["rows"] for report in built.values())
            results.append({"size": size, "terminals": terminals, "rows": count, "seconds": seconds})
            log_progress(f"round {number + 1}: {results[-1]}")
    return results


def large_simulation(million_rows: float) -> Simulation:
    """Simulation of clean files in which no terminal has a large share of the rows."""
    return simulation(million_rows * 1e6, terminals=10_000, fault_rate=0)


def with_hot_terminals(rows: DataFrame) -> DataFrame:
    """Move HOT_SHARE of the rows to HOT_TERMINALS terminals."""
    from pyspark.sql import functions as F

    drawn = f"pmod(xxhash64(transaction_id), {round(HOT_TERMINALS / HOT_SHARE)})"
    return rows.withColumn("terminal_id", F.expr(f"IF({drawn} < {HOT_TERMINALS}, {drawn}, terminal_id)"))


def table(results: list[dict[str, Any]]) -> str:
    """One row per size and distribution: median seconds, and the marginal cost over the next smaller size."""
    lines = []
    for terminals in dict.fromkeys(result["terminals"] for result in results):
        before: tuple[int, float] | None = None
        for size in dict.fromkeys(result["size"] for result in results):
            same = [result for result in results if (result["size"], result["terminals"]) == (size, terminals)]
            rows = same[0]["rows"]
            seconds = [result["seconds"] for result in same]
            median = statistics.median(seconds)
            marginal = "" if before is None else f"{(median - before[1]) / (rows - before[0]) * 1e6:.2f}"
            before = rows, median
            spread = f"{median:.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
            lines.append([terminals, f"{rows:,}", spread, f"{median / rows * 1e6:.2f}", marginal])
    return markdown(["terminals", "rows", "seconds", "s per million rows", "s per further million rows"], lines)


if __name__ == "__main__":
    main()
