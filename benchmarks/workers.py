"""Scaling of the jobs: a standalone Spark cluster of one worker with one core, then of two.

`ml_platform/dataproc/sizing.py` and docs/scaling.md assume that twice the cores halve the time of the work on rows.
The jobs run in a warm session, to exclude Spark's startup, which more workers do not shorten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.common import markdown, options, simulate, simulation, timed_jobs, work_directory, write_results
from ml_platform.spark.session import default_spark_config, local_session
from ml_platform_tests.standalone import StandaloneCluster

if TYPE_CHECKING:
    from pathlib import Path

EXECUTOR_MEMORY_MB = 2048


def main() -> None:
    """Print the table."""
    parser = options(__doc__)
    parser.add_argument("--million-rows", type=float, default=4, metavar="N", help="size of the file (default: 4)")
    arguments = parser.parse_args()
    with work_directory(arguments.work) as work:
        raw = simulate(work / "raw", simulation(arguments.million_rows * 1e6, fault_rate=0), 1)
        results = [result for workers in (1, 2) for result in measure(raw, work, workers)]
    write_results(arguments.json, results, lambda: table(results))


def measure(raw: list[Path], work: Path, workers: int) -> list[dict[str, Any]]:
    """Seconds of each job on `workers` workers of one core, in its second run."""
    directory = work / f"{workers} workers"
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
            timed_jobs(spark, raw, directory)
            return [{"workers": workers, **result} for result in timed_jobs(spark, raw, directory)]
        finally:
            spark.stop()


def table(results: list[dict[str, Any]]) -> str:
    """One row per job."""
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
