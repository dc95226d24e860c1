"""Overhead of a partition: many small files in one session against one file with the same number of rows.

The files are cleaned and their features built in two halves, like two consecutive runs in a session; the first half
includes Spark's warm-up. The overhead per partition is the time that a half takes longer than the one large file in the
then warm session, divided by the number of its files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
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
    from pyspark.sql import SparkSession


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument("--partitions", type=int, default=40, help="small files in each half (default: 40)")
    parser.add_argument("--thousand-rows", type=float, default=100, help="size of a small file (default: 100)")
    arguments = parser.parse_args()
    with work_directory(arguments.work) as work:
        spark = spark_session()
        results = measure(spark, work, arguments.partitions, arguments.thousand_rows * 1e3)
    write_results(arguments.json, results, lambda: table(results))


def measure(spark: SparkSession, work: Path, partitions: int, rows: float) -> list[dict[str, Any]]:
    """Seconds of both halves and of the large file, for each job."""
    # Files of 30 days would need decades: the history of these is that of a few of them, as in real data.
    files = simulate(work / "small", simulation(rows, fault_rate=0), 2 * partitions)
    halves = {"first half": files[:partitions], "second half": files[partitions:]}
    reports: dict[str, dict[str, Any]] = {}
    results = []

    def timed(name: str, job: str, call: Callable[[], dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
        started = time.monotonic()
        reports = call()
        seconds = time.monotonic() - started
        results.append({"name": name, "job": job, "partitions": len(reports), "seconds": seconds})
        log_progress(str(results[-1]))
        return reports

    for name, raw in halves.items():
        reports |= timed(name, "cleaning", lambda raw=raw: clean(spark, raw, work / "lake", EPOCH))  # type: ignore[misc]
    for name, raw in halves.items():
        keys = [path.stem for path in raw]
        # Without history, because reading its rows is not overhead.
        timed(
            name,
            "features",
            lambda keys=keys: {key: features(spark, {key: reports[key]}, work / "lake")[key] for key in keys},  # type: ignore[misc]
        )
    whole = simulate(work / "large", simulation(partitions * rows, fault_rate=0), 1)
    cleaned = timed("one file", "cleaning", lambda: clean(spark, whole, work / "one", EPOCH))
    timed("one file", "features", lambda: features(spark, cleaned, work / "one"))
    return results


def table(results: list[dict[str, Any]]) -> str:
    """One row per job and half."""
    one = {result["job"]: result["seconds"] for result in results if result["name"] == "one file"}
    lines = [
        [
            result["job"],
            result["name"],
            result["partitions"],
            f"{result['seconds']:.1f}",
            f"{one[result['job']]:.1f}",
            f"{(result['seconds'] - one[result['job']]) / result['partitions']:.2f}",
        ]
        for result in results
        if result["name"] != "one file"
    ]
    header = ["job", "", "partitions", "seconds", "one file of as many rows, seconds", "overhead per partition, s"]
    return markdown(header, lines)


if __name__ == "__main__":
    main()
