"""What training costs as the rows grow: the whole default search, phase by phase.

The features are built once; each size is a share of the customers, drawn by a hash. One warm Spark session; the rounds
are interleaved, so that a disturbance of the machine meets all sizes.
"""

from __future__ import annotations

import statistics
import time
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    ROWS_PER_CUSTOMER,
    markdown,
    options,
    say,
    simulate,
    spark_session,
    work_directory,
    write_results,
)
from ml_platform.bare_jobs import clean, features, train
from ml_platform.simulator import Simulation
from spark_jobs import train_model

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

EPOCH = date(2018, 4, 1)

#: Files of 30 days that hold the default windows: 60 days to train, 7 of delay, 7 to test, and history before them.
FILES = 4


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument(
        "--thousand-rows",
        type=float,
        nargs="+",
        default=[144, 288, 575],
        metavar="N",
        help="rows to train on (default: 144 288 575)",
    )
    parser.add_argument("--rounds", type=int, default=1, help="times that each is measured (default: 1)")
    parser.add_argument("--driver-memory", help="memory of Spark's driver (default: a third of the machine's, to 8 GB)")
    arguments = parser.parse_args()
    with work_directory(arguments.work) as work:
        spark = spark_session(arguments.driver_memory)
        results = measure(spark, sorted(arguments.thousand_rows), arguments.rounds, work)
    write_results(arguments.json, results, lambda: table(results))


def measure(spark: SparkSession, sizes: list[float], rounds: int, work: Path) -> list[dict[str, Any]]:
    """Seconds of each phase for each size, `rounds` times."""
    from pyspark.sql import functions as F

    # The train window is two files long.
    customers = round(sizes[-1] * 1e3 / 2 / ROWS_PER_CUSTOMER)
    simulation = Simulation(start=EPOCH, customers=customers, terminals=2 * customers, fault_rate=0)
    lake = work / "lake"
    reports = clean(spark, simulate(work / "raw", simulation, FILES), lake, EPOCH)
    features(spark, reports, lake)
    keys = list(reports)
    for size in sizes:
        for key in reports:
            table = f"transaction_features/raw_file={key}"
            spark.read.parquet(f"file://{lake}/{table}").where(
                F.expr(f"pmod(xxhash64(customer_id), 10000) < {10_000 * size / sizes[-1]}")
            ).write.mode("overwrite").parquet(f"file://{work}/{size:g}/{table}")
    say("warming up")
    train(spark, keys, work / f"{sizes[0]:g}", candidates=train_model.DEFAULTS["candidates"][:1])
    results = []
    for number in range(rounds):
        for size in sizes:
            started = time.monotonic()
            report = train(spark, keys, work / f"{size:g}")
            if report["outcome"] != "trained":
                raise SystemExit(f"no model: {report['reason']}")
            seconds = {**report["seconds"], "total": time.monotonic() - started}
            results.append({"rows": report["windows"]["train"]["rows"], "seconds": seconds})
            say(f"round {number + 1}: {results[-1]}")
    return results


def table(results: list[dict[str, Any]]) -> str:
    """A row for each size: median seconds of the phases, and of all per thousand rows."""
    phases = [name for name in results[0]["seconds"] if name != "total"]
    lines = []
    for rows in sorted({result["rows"] for result in results}):
        seconds = [result["seconds"] for result in results if result["rows"] == rows]
        medians = {name: statistics.median(times[name] for times in seconds) for name in [*phases, "total"]}
        lines.append(
            [
                f"{rows:,}",
                *[f"{medians[phase]:.1f}" for phase in phases],
                f"{medians['total']:.1f}",
                f"{medians['total'] / rows * 1e3:.2f}",
            ]
        )
    return markdown(["rows trained on", *phases, "all, s", "s per thousand rows"], lines)


if __name__ == "__main__":
    main()
