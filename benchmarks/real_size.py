"""Cost per row in a file of real size: cleaning and features of a small and a large file in one warm session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    markdown,
    options,
    simulate,
    simulation,
    spark_session,
    timed_jobs,
    work_directory,
    write_results,
)

if TYPE_CHECKING:
    from pathlib import Path

    from pyspark.sql import SparkSession


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
    """Seconds and memory of each job and size, after a warm-up with the smallest size."""
    results = []
    for number, size in enumerate([sizes[0], *sizes]):
        lake = work / f"{size:g}"
        raw = simulate(lake / "raw", simulation(size * 1e6, without=("conflicting_duplicate",)), 1)
        measured = timed_jobs(spark, raw, lake)
        if number:
            results += measured
    return results


def table(results: list[dict[str, Any]]) -> str:
    """One row per job and size."""
    lines = []
    for result in sorted(results, key=lambda result: (result["job"], result["rows"])):
        per_million = result["seconds"] / result["rows"] * 1e6
        smallest = next(one for one in results if one["job"] == result["job"])
        ratio = per_million / (smallest["seconds"] / smallest["rows"] * 1e6)
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
