"""What the benchmarks share: raw files, a Spark session like the platform's own, tables in Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_platform.local_spark import default_spark_config
from ml_platform.simulator import Simulation
from spark_jobs import build_features, clean_transactions

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


#: Transactions of a simulated customer in the 30 days of a file, about.
ROWS_PER_CUSTOMER = 57.6


def say(text: str) -> None:
    """Progress, on standard error: standard output has the results."""
    print(text, file=sys.stderr, flush=True)


def spark_session(driver_memory: str | None = None, **config: str) -> SparkSession:
    """A session set up as the platform's local engine sets up its own."""
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName("benchmark")
    for name, value in (default_spark_config("local[*]", driver_memory) | config).items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    spark.sparkContext.pythonExec = sys.executable
    return spark


def simulate(directory: Path, simulation: Simulation, files: int) -> list[Path]:
    """Write `files` raw files into `directory`, in order of time; those that are there already stay."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / simulation.file_name(index) for index in range(files)]
    for index, path in enumerate(paths):
        if not path.exists():
            say(f"simulating {path.name}")
            draft = path.with_suffix(".draft")
            with draft.open("wb") as out:
                simulation.write_file(index, out)
            draft.rename(path)
    return paths


def clean(spark: SparkSession, raw: Sequence[Path], lake: Path, epoch: date) -> dict[str, dict[str, Any]]:
    """Clean raw files into `lake`; reports by partition, in order of the files."""
    report = clean_transactions.run(
        spark,
        {
            "run_id": "benchmark",
            "epoch": epoch.isoformat(),
            "partitions": [
                {
                    "partition": path.stem,
                    "raw": {"uri": f"file://{path}", "size": path.stat().st_size, "fingerprint": "benchmark"},
                    "output_uri": f"file://{lake}/cleaned_transactions/raw_file={path.stem}",
                    "rejected_uri": f"file://{lake}/rejected_transactions/raw_file={path.stem}",
                }
                for path in raw
            ],
        },
    )
    return _reports(report)


def features(
    spark: SparkSession, reports: dict[str, dict[str, Any]], lake: Path, *, only: Iterable[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Build the features of cleaned partitions, each with the two before it as history; reports by partition."""
    keys = list(reports)

    def cleaned(key: str) -> str:
        return f"file://{lake}/cleaned_transactions/raw_file={key}"

    items = []
    for index, key in enumerate(keys):
        history = keys[max(0, index - 2) : index]
        items.append(
            {
                "partition": key,
                "cleaned_uri": cleaned(key),
                "tx_datetime_min": reports[key]["tx_datetime"]["min"],
                "history": [cleaned(earlier) for earlier in history],
                "cleaned_bytes": sum(reports[part]["raw"]["size"] for part in (key, *history)),
                "inputs": {},
                "output_uri": f"file://{lake}/transaction_features/raw_file={key}",
            }
        )
    wanted = None if only is None else set(only)
    items = [item for item in items if wanted is None or item["partition"] in wanted]
    return _reports(build_features.run(spark, {"run_id": "benchmark", "partitions": items}))


def _reports(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for key, verdict in report["partitions"].items():
        if verdict["status"] != "succeeded":
            raise SystemExit(f"{key}: {verdict['error']}")
    return {key: verdict["report"] for key, verdict in report["partitions"].items()}


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown; floats with three digits."""

    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def write_results(path: Path | None, results: Any, table: Callable[[], str]) -> None:
    """Print the table, and keep the raw figures as JSON where that is asked for."""
    print(table())
    if path is not None:
        path.write_text(json.dumps(results, indent=1))
