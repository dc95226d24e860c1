"""Training time by number of rows and phase, compared with XGBoost alone on the same rows.

The features are built once; each size is a share of the customers, sampled by hash. Rounds are interleaved in one warm
Spark session, so that disturbances of the machine affect all sizes. Right after each training, XGBoost alone fits 100
rounds of depth 5 with 1,024 bins and 2 threads on a matrix in memory; the ratio compares this with the job's time from
the search to the written model.
"""

from __future__ import annotations

import os
import statistics
import time
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    ROWS_PER_CUSTOMER,
    log_progress,
    markdown,
    options,
    peak_memory,
    simulate,
    spark_session,
    work_directory,
    write_results,
)
from ml_platform.dev.simulator import Simulation
from ml_platform.spark.bare_jobs import clean, features, train

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
    parser.add_argument(
        "--terminals", type=int, help="terminals to simulate (default: twice the customers; 1000 give 5.9%% frauds)"
    )
    parser.add_argument("--rounds", type=int, default=1, help="number of measurements of each (default: 1)")
    parser.add_argument("--driver-memory", help="memory of Spark's driver (default: a third of the machine's, to 8 GB)")
    arguments = parser.parse_args()
    with work_directory(arguments.work) as work:
        spark = spark_session(arguments.driver_memory)
        results = measure(spark, sorted(arguments.thousand_rows), arguments.rounds, work, arguments.terminals)
    write_results(arguments.json, results, lambda: table(results))


def measure(
    spark: SparkSession, sizes: list[float], rounds: int, work: Path, terminals: int | None
) -> list[dict[str, Any]]:
    """Seconds of each phase for each size, `rounds` times."""
    from pyspark.sql import functions as F

    # The train window is two files long.
    customers = round(sizes[-1] * 1e3 / 2 / ROWS_PER_CUSTOMER)
    simulation = Simulation(start=EPOCH, customers=customers, terminals=terminals or 2 * customers, fault_rate=0)
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
    log_progress("warming up")
    train(spark, keys, work / f"{sizes[0]:g}", search_rows=20_000)
    results = []
    for number in range(rounds):
        for size in sizes:
            started = time.monotonic()
            with peak_memory(os.getpid()) as peak:
                report = train(spark, keys, work / f"{size:g}")
            if report["outcome"] != "trained":
                raise SystemExit(f"no model: {report['reason']}")
            seconds = {**report["seconds"], "total": time.monotonic() - started}
            result = {"rows": report["windows"]["train"]["rows"], "frauds": report["windows"]["train"]["frauds"]}
            result |= {"seconds": seconds, "best": report["best"], "sampling": report["sampling"], "peak_mb": peak()}
            result["alone"] = xgboost_alone(work / f"{size:g}", report)
            results.append(result)
            log_progress(f"round {number + 1}: {results[-1]}")
    return results


def xgboost_alone(lake: Path, report: dict[str, Any]) -> float | None:
    """Seconds of XGBoost alone to fit the same rows from a matrix in memory; None if the rows were sampled."""
    import numpy as np
    import xgboost
    from pyarrow import dataset

    if report["sampling"]:
        return None
    window = report["windows"]["train"]
    days = dataset.field("tx_time_days")
    rows = dataset.dataset(lake / "transaction_features", exclude_invalid_files=True).to_table(
        columns=["tx_fraud", *report["features"]],
        filter=(days >= window["first_day"]) & (days <= window["last_day"]),
    )
    matrix = np.column_stack([rows[name].to_numpy().astype("f4") for name in report["features"]])
    label = rows["tx_fraud"].to_numpy()
    started = time.monotonic()
    params = {"objective": "binary:logistic", "tree_method": "hist", "max_depth": 5, "learning_rate": 0.1, "nthread": 2}
    data = xgboost.QuantileDMatrix(matrix, label, max_bin=1024, nthread=2)
    xgboost.train({**params, "max_bin": 1024}, data, 100)
    return time.monotonic() - started


def table(results: list[dict[str, Any]]) -> str:
    """One row per size: median seconds of each phase and in total, and the ratio to XGBoost alone."""
    phases = [name for name in results[0]["seconds"] if name != "total"]
    lines = []
    for rows in sorted({result["rows"] for result in results}):
        same = [result for result in results if result["rows"] == rows]
        seconds = {name: statistics.median(one["seconds"][name] for one in same) for name in [*phases, "total"]}
        until_written = seconds["search"] + seconds["fit"]
        alone = [one["alone"] for one in same if one["alone"]]
        ratio = statistics.median(alone) if alone else None
        lines.append(
            [
                f"{rows:,}",
                *[f"{seconds[phase]:.1f}" for phase in phases],
                f"{seconds['total']:.1f}",
                f"{until_written:.1f}",
                f"{ratio:.1f}" if ratio else "",
                f"{until_written / ratio:.1f}" if ratio else "",
                f"{max(one['peak_mb'] for one in same):,.0f}",
            ]
        )
    header = ["rows trained on", *phases, "all, s", "search and fit, s", "XGBoost alone, s", "ratio", "peak MB"]
    return markdown(header, lines)


if __name__ == "__main__":
    main()
