"""Ids that stand in two files, whose rows would count twice."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from spark_jobs import runtime

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger("spark_jobs")

#: Shared ids that a report names.
EXAMPLES = 3


def find_shared_ids(
    spark: SparkSession, uri: str, ids: dict[str, Any], neighbours: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Compare a cleaned partition with those whose ids overlap its own.

    `ids` is the ``transaction_id`` of the partition's report; each neighbour has ``version``, ``uri`` and
    ``transaction_id``. Returns key → ``version`` compared with, ``rows`` shared (None: the neighbour cannot be read),
    ``examples``.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, other in neighbours.items():
        theirs = other["transaction_id"]
        if ids["min"] is None or theirs["min"] is None:
            continue
        low, high = max(ids["min"], theirs["min"]), min(ids["max"], theirs["max"])
        if low > high:
            continue
        rows, examples = None, []
        own = _ids(spark, uri, low, high)
        try:
            shared = own.join(_ids(spark, other["uri"], low, high), "transaction_id")
            rows = shared.count()
            if rows:
                examples = [row[0] for row in shared.orderBy("transaction_id").limit(EXAMPLES).collect()]
        except Exception:
            log.exception("cannot compare ids with those of %s", key)
        found[key] = {"version": other["version"], "rows": rows, "examples": examples}
    return found


def _ids(spark: SparkSession, uri: str, low: int, high: int) -> DataFrame:
    frame = runtime.read_parquet(spark, uri).select("transaction_id")
    return frame.where(f"transaction_id BETWEEN {low} AND {high}")
