"""Runs the Spark jobs on local directories in an existing session, without Dagster, MLflow or an engine.

Used by the benchmarks and the class archive. Nothing is skipped, and outputs are laid out as in the lake. Paths are
absolute. The image makes its class archive before it has the rest of the platform, so nothing of that is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spark_jobs import build_features, clean_transactions, train_model
from spark_jobs.features.registry import MODEL_INPUTS

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

RUN_ID = "bare"

Reports = dict[str, dict[str, Any]]


def partition_uri(lake: Path, table: str, key: str) -> str:
    """URI of a partition of a table."""
    return f"file://{lake}/{table}/raw_file={key}"


def clean(spark: SparkSession, raw: Sequence[Path], lake: Path, epoch: date) -> Reports:
    """Clean raw files into `lake`; reports by partition, in file order. Raises RuntimeError if one fails."""
    items = [
        {
            "partition": path.stem,
            "raw": {"uri": f"file://{path}", "size": path.stat().st_size, "fingerprint": RUN_ID},
            "output_uri": partition_uri(lake, "cleaned_transactions", path.stem),
            "rejected_uri": partition_uri(lake, "rejected_transactions", path.stem),
        }
        for path in raw
    ]
    request = {"run_id": RUN_ID, "epoch": epoch.isoformat(), "partitions": items}
    return _reports(clean_transactions.run(spark, request))


def features(spark: SparkSession, cleaned: Reports, lake: Path) -> Reports:
    """Build the features of cleaned partitions, each with the two before it as history; reports by partition.

    Raises RuntimeError if one fails.
    """
    keys = list(cleaned)
    items = []
    for index, key in enumerate(keys):
        history = keys[max(0, index - 2) : index]
        items.append(
            {
                "partition": key,
                "cleaned_uri": partition_uri(lake, "cleaned_transactions", key),
                "tx_datetime_min": cleaned[key]["tx_datetime"]["min"],
                "history": [partition_uri(lake, "cleaned_transactions", earlier) for earlier in history],
                "cleaned_bytes": sum(cleaned[part]["text_bytes"] for part in (key, *history)),
                "inputs": {},
                "output_uri": partition_uri(lake, "transaction_features", key),
            }
        )
    return _reports(build_features.run(spark, {"run_id": RUN_ID, "partitions": items}))


def train(spark: SparkSession, keys: Sequence[str], lake: Path, **settings: Any) -> dict[str, Any]:
    """Train on the features of all `keys`, the last of which is the cut-off; returns the job's report."""
    uris = [partition_uri(lake, "transaction_features", key) for key in keys]
    request = {
        "run_id": RUN_ID,
        "cutoff": keys[-1],
        "feature_uris": uris,
        "cutoff_uri": uris[-1],
        "features": list(MODEL_INPUTS),
        "output_uri": f"file://{lake}/model",
    }
    return train_model.run(spark, request | settings)


def _reports(report: dict[str, Any]) -> Reports:
    for key, verdict in report["partitions"].items():
        if verdict["status"] != "succeeded":
            raise RuntimeError(f"{key}: {verdict['error']}")
    return {key: verdict["report"] for key, verdict in report["partitions"].items()}
