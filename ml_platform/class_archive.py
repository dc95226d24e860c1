"""Makes the archive of Spark's classes that `local_spark` starts sessions with: ``make classes``.

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

from ml_platform.local_spark import CLASS_ARCHIVE, default_spark_config, quoted_option
from ml_platform.simulator import Simulation
from spark_jobs import build_features, clean_transactions, train_model
from spark_jobs.features import FEATURES

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

EPOCH = date(2018, 4, 1)

#: How long Java may take to write the archive.
WRITE_TIMEOUT_S = 300

#: One fit of each kind of learner.
CANDIDATES = [
    {"learner": "logistic_regression", "grid": {"maxIter": [2]}},
    {"learner": "gbt", "grid": {"maxIter": [2], "maxDepth": [2]}},
]


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
    from pyspark.sql import SparkSession

    work = archive.parent
    config = default_spark_config("local[*]") | {
        "spark.driver.defaultJavaOptions": f"{quoted_option('ArchiveClassesAtExit', archive)} -Xlog:cds*=off",
        "spark.sql.warehouse.dir": str(work / "warehouse"),
    }
    builder = SparkSession.builder.appName("class_archive")
    for name, value in config.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    java: Any = spark.sparkContext._gateway.proc  # type: ignore[union-attr]
    try:
        spark.sparkContext.setLogLevel("ERROR")
        spark.sparkContext.pythonExec = sys.executable
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
    simulation = Simulation(start=EPOCH, customers=300, terminals=300)
    items: list[dict[str, Any]] = []
    for index in range(2):
        raw = work / simulation.file_name(index)
        with raw.open("wb") as out:
            simulation.write_file(index, out)
        items.append(
            {
                "partition": raw.stem,
                "raw": {"uri": raw.as_uri(), "size": raw.stat().st_size, "fingerprint": ""},
                "output_uri": (work / "cleaned" / raw.stem).as_uri(),
                "rejected_uri": (work / "rejected" / raw.stem).as_uri(),
            }
        )
    cleaned = _reports(
        clean_transactions.run(spark, {"run_id": "class_archive", "epoch": EPOCH.isoformat(), "partitions": items})
    )
    features = [
        {
            "partition": item["partition"],
            "cleaned_uri": item["output_uri"],
            "tx_datetime_min": cleaned[item["partition"]]["tx_datetime"]["min"],
            "history": [earlier["output_uri"] for earlier in items[:index]],
            "cleaned_bytes": item["raw"]["size"],
            "inputs": {},
            "output_uri": (work / "features" / item["partition"]).as_uri(),
        }
        for index, item in enumerate(items)
    ]
    _reports(build_features.run(spark, {"run_id": "class_archive", "partitions": features}))
    train_model.run(
        spark,
        {
            "run_id": "class_archive",
            "cutoff": features[-1]["partition"],
            "feature_uris": [item["output_uri"] for item in features],
            "cutoff_uri": features[-1]["output_uri"],
            "features": list(FEATURES),
            "output_uri": (work / "model").as_uri(),
            "min_frauds": 1,
            "candidates": CANDIDATES,
        },
    )


def _reports(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for key, verdict in report["partitions"].items():
        if verdict["status"] != "succeeded":
            raise RuntimeError(f"{key}: {verdict['error']}")
    return {key: verdict["report"] for key, verdict in report["partitions"].items()}


if __name__ == "__main__":
    main()
