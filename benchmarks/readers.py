"""Benefit of sorted rows and row groups in cleaned Parquet: DuckDB's time for typical queries.

The comparison is the same rows in random order, written with Spark's defaults.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

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
from ml_platform.spark.bare_jobs import clean

DAY = "tx_datetime >= TIMESTAMP '2019-09-05' AND tx_datetime < TIMESTAMP '2019-09-06'"
DAY_RANGE = ("tx_datetime", "TIMESTAMP", "2019-09-05 00:00:00", "2019-09-05 23:59:59")
#: Name → SQL, and the ranges that the statistics of a row group must overlap for it to be read.
QUERIES: dict[str, tuple[str, list[tuple[str, str, str, str]]]] = {
    "one day": (f"SELECT count(*), sum(tx_amount * tx_fraud) FROM {{table}} WHERE {DAY}", [DAY_RANGE]),
    "one customer's day": (
        f"SELECT count(*), max(tx_amount) FROM {{table}} WHERE customer_id = 42 AND {DAY}",
        [DAY_RANGE, ("customer_id", "BIGINT", "42", "42")],
    ),
    "all rows, two columns": ("SELECT sum(tx_amount), sum(tx_fraud) FROM {table}", []),
}
PLATFORM, RANDOM = "as the platform writes them", "in random order, Spark's defaults"


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument("--million-rows", type=float, default=4.9, help="size of the file (default: 4.9)")
    parser.add_argument("--rounds", type=int, default=5, help="number of measurements of each (default: 5)")
    arguments = parser.parse_args()
    with work_directory(arguments.work) as work:
        tables = write_tables(work, arguments.million_rows)
        results = measure(tables, arguments.rounds)
    write_results(arguments.json, results, lambda: table(results))


def write_tables(work: Path, million_rows: float) -> dict[str, Path]:
    """Write both tables and return their directories."""
    from pyspark.sql import functions as F

    raw = simulate(work / "raw", simulation(million_rows * 1e6), 1)
    spark = spark_session()
    clean(spark, raw, work, EPOCH)
    written = work / f"cleaned_transactions/raw_file={raw[0].stem}"
    rows = spark.read.parquet(f"file://{written}").cache()
    spark.conf.unset("spark.sql.parquet.compression.codec")
    files = len(list(written.glob("*.parquet")))
    rows.repartition(files, F.rand(0)).write.mode("overwrite").parquet(f"file://{work}/random")
    spark.stop()
    return {PLATFORM: written, RANDOM: work / "random"}


def measure(tables: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """Seconds of each query on each table, in `rounds` interleaved rounds."""
    import duckdb

    con = duckdb.connect()
    con.execute("SET TimeZone = 'UTC'")
    results = []
    for _ in range(rounds):
        for query, (sql, needs) in QUERIES.items():
            answers = set()
            for name, directory in tables.items():
                files = f"{directory}/*.parquet"
                started = time.monotonic()
                answer = con.execute(sql.format(table=f"read_parquet('{files}')")).fetchall()
                seconds = time.monotonic() - started
                answers.add(tuple(round(value or 0, 2) for value in answer[0]))
                needed, groups = _row_groups(con, files, needs)
                result = {"query": query, "table": name, "seconds": seconds, "needed": needed, "row_groups": groups}
                result |= {"mb": sum(file.stat().st_size for file in directory.glob("*.parquet")) / 1e6}
                results.append(result)
            if len(answers) != 1:
                raise SystemExit(f"{query}: the tables give different answers: {answers}")
    log_progress(f"{len(results)} measurements")
    return results


def _row_groups(con: Any, files: str, needs: list[tuple[str, str, str, str]]) -> tuple[int, int]:
    """(row groups that a query must read by their statistics, all row groups)."""
    overlaps = "true"
    for column, kind, low, high in needs:
        overlaps += (
            f" AND bool_or(path_in_schema = '{column}' AND try_cast(stats_max_value AS {kind}) >= {kind} '{low}' "
            f"AND try_cast(stats_min_value AS {kind}) <= {kind} '{high}')"
        )
    counts: tuple[int, int] = con.execute(
        f"SELECT count(*) FILTER (WHERE needed), count(*) FROM (SELECT {overlaps} AS needed "
        f"FROM parquet_metadata('{files}') GROUP BY file_name, row_group_id)"
    ).fetchall()[0]
    return counts


def table(results: list[dict[str, Any]]) -> str:
    """One row per query and table."""
    lines = []
    for query in QUERIES:
        for name in (PLATFORM, RANDOM):
            same = [result for result in results if (result["query"], result["table"]) == (query, name)]
            seconds = statistics.median(result["seconds"] for result in same)
            groups = f"{same[0]['needed']} of {same[0]['row_groups']}"
            lines.append([query, name, f"{1000 * seconds:.0f}", groups, f"{same[0]['mb']:.0f}"])
    return markdown(["query", "rows", "ms", "row groups needed", "MB of Parquet"], lines)


if __name__ == "__main__":
    main()
