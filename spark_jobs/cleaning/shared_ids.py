"""Ids that stand in two files, whose rows would count twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spark_jobs import runtime

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

#: Shared ids that a report names.
EXAMPLES = 3


def find_shared_ids(
    spark: SparkSession, uri: str, ids: dict[str, Any], neighbours: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Compare a cleaned partition with its neighbours: key → ``version`` compared with, ``rows`` shared, ``examples``.

    `ids` is the ``transaction_id`` of the partition's report. Neighbours are those whose bulk of ids overlaps its own;
    each has ``version``, ``uri`` and ``transaction_id``.
    """
    found = {}
    for key, other in neighbours.items():
        theirs = other["transaction_id"]
        if ids["min"] is None or theirs["min"] is None:
            continue
        if ids["p0_1"] > theirs["p99_9"] or theirs["p0_1"] > ids["p99_9"]:
            continue
        low, high = max(ids["min"], theirs["min"]), min(ids["max"], theirs["max"])
        shared = _ids(spark, uri, low, high).join(_ids(spark, other["uri"], low, high), "transaction_id")
        rows = shared.count()
        examples = [row[0] for row in shared.orderBy("transaction_id").limit(EXAMPLES).collect()] if rows else []
        found[key] = {"version": other["version"], "rows": rows, "examples": examples}
    return found


def _ids(spark: SparkSession, uri: str, low: int, high: int) -> DataFrame:
    frame = runtime.read_parquet(spark, uri).select("transaction_id")
    return frame.where(f"transaction_id BETWEEN {low} AND {high}")
