"""Whether a row costs more in a file of real size: cleaning and features of files of both sizes in one warm session."""

from __future__ import annotations

import os
import time
from datetime import date
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    ROWS_PER_CUSTOMER,
    markdown,
    options,
    peak_memory,
    say,
    simulate,
    spark_session,
    work_directory,
    write_results,
)
from ml_platform.bare_jobs import clean, features
from ml_platform.simulator import Simulation

if TYPE_CHECKING:
    from pathlib import Path

    from pyspark.sql import SparkSession

EPOCH = date(2019, 8, 22)


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument(
        "--million-rows", type=float, nargs="+", default=[4.9, 47], metavar="N", help="sizes (default: 4.9 47)"
    )
    parser.add_argument("--driver-memory", default="8g", help="memory of Spark's driver (default: 8g)")
    arguments = parser.parse_args()
    with work_directory(arguments.work) as work:
        spark = spark_session(arguments.driver_memory)
        results = measure(spark, sorted(arguments.million_rows), work)
    write_results(arguments.json, results, lambda: table(results))


def measure(spark: SparkSession, sizes: list[float], work: Path) -> list[dict[str, Any]]:
    """Seconds and memory of each job and size; the smallest goes first once more, to warm the session up."""
    results = []
    for number, size in enumerate([sizes[0], *sizes]):
        simulation = Simulation(
            start=EPOCH,
            customers=round(size * 1e6 / ROWS_PER_CUSTOMER),
            terminals=1000,
            without=("conflicting_duplicate",),
        )
        lake = work / f"{size:g}"
        raw = simulate(lake / "raw", simulation, 1)
        cleaned: dict[str, Any] = {}
        for job in ("cleaning", "features"):
            with peak_memory(os.getpid()) as peak:
                started = time.monotonic()
                if job == "cleaning":
                    cleaned = clean(spark, raw, lake, EPOCH)
                else:
                    features(spark, cleaned, lake)
                seconds = time.monotonic() - started
            (report,) = cleaned.values()
            result = {"job": job, "rows": report["counts"]["raw_rows"], "mb": report["raw"]["size"] / 1e6}
            result |= {"seconds": seconds, "memory_mb": peak()}
            say(str(result))
            if number:
                results.append(result)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """A row for each job and size."""
    lines = []
    for result in sorted(results, key=lambda result: (result["job"], result["rows"])):
        per_million = result["seconds"] / result["rows"] * 1e6
        least = next(one for one in results if one["job"] == result["job"])
        ratio = per_million / (least["seconds"] / least["rows"] * 1e6)
        lines.append(
            [
                *(result["job"], f"{result['rows']:,}", f"{result['mb']:,.0f}", f"{result['seconds']:.1f}"),
                *(f"{per_million:.2f}", f"{ratio:.2f}", f"{result['memory_mb']:,.0f}"),
            ]
        )
    header = ["job", "rows", "MB of text", "seconds", "s per million rows", "ratio", "peak MB, all processes"]
    return markdown(header, lines)


if __name__ == "__main__":
    main()
