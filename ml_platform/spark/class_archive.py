"""Makes the archive of Spark's classes that `ml_platform.spark.session` starts sessions with: ``make classes``.

The jobs run once on a little simulated data, and Java keeps the classes that they needed.
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

#: How long Java may take to write the archive.
WRITE_TIMEOUT_S = 300

#: Java's part in a fit is the same whatever the learner.
CANDIDATES = [{"learner": "logistic_regression", "grid": {}}]


def main() -> None:
    """Make the archive, or leave an empty file where that fails."""
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
        # All works without it; the empty file says that it need not be tried again.
        with suppress(OSError):
            output.write_bytes(b"")
        print(f"Spark's class archive was not made; each start of Spark takes longer: {error}", file=sys.stderr)


def build(output: Path) -> None:
    """Write the archive, whole or not at all: Java crashes on half of one.

    Raises OSError if the directory cannot be written, RuntimeError if the jobs fail or Java writes no archive.
    """
    with tempfile.TemporaryDirectory(prefix=".spark-classes-", dir=output.parent) as directory:
        draft = Path(directory) / output.name
        # A process of its own, since what Java says cannot be kept off the screen otherwise.
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, "--record", str(draft)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0 or not draft.is_file():
            raise RuntimeError((done.stdout.strip() or "Java wrote none").splitlines()[-1])
        draft.replace(output)


def record(archive: Path) -> None:
    """Run the jobs in a session whose Java writes `archive` when it exits, and wait until it has.

    What the jobs write is left beside the archive. Raises RuntimeError if a job or Java fails.
    """
    work = archive.parent
    config = default_spark_config("local[*]") | {
        # In its minute, Java's second compiler is a third of the work, and the archive holds none of what it makes.
        "spark.driver.defaultJavaOptions": java_options(archive, write=True) + " -XX:TieredStopAtLevel=1",
        "spark.sql.warehouse.dir": str(work / "warehouse"),
    }
    spark = local_session("class_archive", config)
    java: Any = spark.sparkContext._gateway.proc  # type: ignore[union-attr]
    try:
        run_jobs(spark, work)
    finally:
        spark.stop()
        # Java exits when there is no more to read.
        java.stdin.close()
        status = java.wait(WRITE_TIMEOUT_S)
    if status != 0:
        raise RuntimeError(f"Java ended with status {status}")


def run_jobs(spark: SparkSession, work: Path) -> None:
    """Clean, build features and train, once each. Raises RuntimeError if a job fails."""
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
