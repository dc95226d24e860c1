"""Builds the class-data archive with which `ml_platform.spark.session` starts Spark: ``make classes``.

All jobs but score_transactions run once on a small simulated data set, and Java archives the classes that they load.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_platform.dev.simulator import Simulation
from ml_platform.spark import bare_jobs
from ml_platform.spark.session import CLASS_ARCHIVE, default_spark_config, java_options, local_session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

EPOCH = date(2018, 4, 1)

#: Time limit for Java to write the archive.
WRITE_TIMEOUT_S = 300

#: One learner is enough: all learners load the same Java classes.
CANDIDATES = [{"learner": "logistic_regression", "grid": {}}]


def main() -> None:
    """Build the archive; on failure, leave an empty file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CLASS_ARCHIVE, help=f"file to write (default: {CLASS_ARCHIVE})")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.record)
        return
    output = arguments.output.absolute()
    try:
        build(output)
    except (OSError, RuntimeError) as error:
        # The archive is optional. The empty file keeps later builds from trying again.
        with suppress(OSError):
            output.write_bytes(b"")
        print(f"could not build Spark's class archive; Spark will start more slowly: {error}", file=sys.stderr)


def build(output: Path) -> None:
    """Write the archive atomically: Java crashes on a truncated one.

    Raises OSError if the directory cannot be written, RuntimeError if the jobs fail or Java writes no archive.
    """
    with tempfile.TemporaryDirectory(prefix=".spark-classes-", dir=output.parent) as directory:
        draft = Path(directory) / output.name
        # A separate process, because Java's output cannot be captured within this one.
        process = subprocess.run(
            [sys.executable, "-m", __spec__.name, "--record", str(draft)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            check=False,
        )
        if process.returncode != 0 or not draft.is_file():
            raise RuntimeError((process.stdout.strip() or "Java wrote no archive").splitlines()[-1])
        draft.replace(output)


def record(archive: Path) -> None:
    """Run the jobs in a session whose JVM writes `archive` when it exits, and wait for it.

    The jobs' outputs are left next to the archive. Raises RuntimeError if a job or Java fails.
    """
    work = archive.parent
    config = default_spark_config("local[*]") | {
        # The C2 compiler would take a third of this one-minute run, and its output is not archived.
        "spark.driver.defaultJavaOptions": java_options(archive, write=True) + " -XX:TieredStopAtLevel=1",
        "spark.sql.warehouse.dir": str(work / "warehouse"),
    }
    spark = local_session("class_archive", config)
    java: Any = spark.sparkContext._gateway.proc  # type: ignore[union-attr]
    try:
        run_jobs(spark, work)
    finally:
        spark.stop()
        # The JVM exits when its standard input is closed.
        java.stdin.close()
        status = java.wait(WRITE_TIMEOUT_S)
    if status != 0:
        raise RuntimeError(f"Java exited with status {status}")


def run_jobs(spark: SparkSession, work: Path) -> None:
    """Run the jobs once, without scoring: clean, build features, train. Raises RuntimeError if a job fails."""
    simulation = Simulation(start=EPOCH, customers=100, terminals=100)
    raw = [work / simulation.file_name(index) for index in range(2)]
    for index, path in enumerate(raw):
        with path.open("wb") as out:
            simulation.write_file(index, out)
    cleaned = bare_jobs.clean(spark, raw, work, EPOCH)
    bare_jobs.features(spark, cleaned, work)
    bare_jobs.train(spark, list(cleaned), work, min_frauds=1, candidates=CANDIDATES)


if __name__ == "__main__":
    main()
