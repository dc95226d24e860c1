"""How the jobs spread: a real standalone Spark cluster of one worker with one core, then of two.

`ml_platform/sizing.py` and docs/scaling.md reckon that twice the cores take half the time for the work on the rows.
Here the jobs run in a session that has run before, so that the start of Spark, which no worker shortens, is left out.
"""

from __future__ import annotations

import time
from datetime import date
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    ROWS_PER_CUSTOMER,
    markdown,
    options,
    say,
    simulate,
    work_directory,
    write_results,
)
from ml_platform.bare_jobs import clean, features
from ml_platform.local_spark import default_spark_config, local_session
from ml_platform.simulator import Simulation
from ml_platform_tests.standalone import StandaloneCluster

if TYPE_CHECKING:
    from pathlib import Path

EPOCH = date(2019, 8, 22)
EXECUTOR_MEMORY_MB = 2048


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument("--million-rows", type=float, default=4, metavar="N", help="size of the file (default: 4)")
    arguments = parser.parse_args()
    with work_directory(arguments.work) as work:
        simulation = Simulation(
            start=EPOCH,
            customers=round(arguments.million_rows * 1e6 / ROWS_PER_CUSTOMER),
            terminals=1000,
            fault_rate=0,
        )
        raw = simulate(work / "raw", simulation, 1)
        results = [result for workers in (1, 2) for result in measure(raw, work, workers)]
    write_results(arguments.json, results, lambda: table(results))


def measure(raw: list[Path], work: Path, workers: int) -> list[dict[str, Any]]:
    """Seconds of each job on so many workers of one core; the second time that it runs."""
    results = []
    directory = work / f"{workers} workers"
    directory.mkdir(parents=True)
    with StandaloneCluster(directory, {}, workers=workers, memory_mb=EXECUTOR_MEMORY_MB) as cluster:
        config = default_spark_config(cluster.master) | {
            "spark.executor.memory": f"{EXECUTOR_MEMORY_MB}m",
            "spark.executor.cores": "1",
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
        }
        spark = local_session("benchmark", config)
        try:
            for number in range(2):
                cleaned: dict[str, Any] = {}
                for job in ("cleaning", "features"):
                    started = time.monotonic()
                    if job == "cleaning":
                        cleaned = clean(spark, raw, directory, EPOCH)
                    else:
                        features(spark, cleaned, directory)
                    seconds = time.monotonic() - started
                    (report,) = cleaned.values()
                    result = {"job": job, "workers": workers, "rows": report["counts"]["raw_rows"], "seconds": seconds}
                    say(str(result))
                    if number:
                        results.append(result)
        finally:
            spark.stop()
    return results


def table(results: list[dict[str, Any]]) -> str:
    """A row for each job."""
    lines = []
    for job in dict.fromkeys(result["job"] for result in results):
        one, two = (result for result in results if result["job"] == job)
        lines.append(
            [
                *(job, f"{one['rows']:,}", f"{one['seconds']:.1f}", f"{two['seconds']:.1f}"),
                *(f"{one['seconds'] / two['seconds']:.2f}", f"{one['seconds'] / one['rows'] * 1e6:.1f}"),
                f"{2 * two['seconds'] / two['rows'] * 1e6:.1f}",
            ]
        )
    header = ["job", "rows", "one worker, s", "two workers, s", "times faster"]
    header += ["core-seconds per million rows, one worker", "two workers"]
    return markdown(header, lines)


if __name__ == "__main__":
    main()
