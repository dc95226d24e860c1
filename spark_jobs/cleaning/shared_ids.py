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
    """Compare a cleaned partition with those whose ids overlap its own, in one job.

    `ids` is the ``transaction_id`` of the partition's report; each neighbour has ``version``, ``uri`` and
    ``transaction_id``. Returns key → ``version`` compared with, ``rows`` shared (None: the neighbour cannot be read),
    ``examples``.
    """
    overlapping = {key: other for key, other in neighbours.items() if _overlap(ids, other["transaction_id"])}
    if not overlapping:
        return {}
    try:
        found = _compare(spark, uri, ids, overlapping)
    except Exception:
        log.exception("cannot compare ids with those of %s; trying one by one", ", ".join(overlapping))
        found = {}
        for key, other in overlapping.items():
            try:
                found.update(_compare(spark, uri, ids, {key: other}))
            except Exception:
                log.exception("cannot compare ids with those of %s", key)
    return {
        key: {"version": other["version"], **found.get(key, {"rows": None, "examples": []})}
        for key, other in overlapping.items()
    }


def _overlap(ids: dict[str, Any], other: dict[str, Any]) -> bool:
    has_rows = ids["min"] is not None and other["min"] is not None
    return has_rows and ids["min"] <= other["max"] and other["min"] <= ids["max"]


def _compare(
    spark: SparkSession, uri: str, ids: dict[str, Any], neighbours: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """``rows`` and ``examples`` of each neighbour."""
    from pyspark.sql import functions as F

    # The last one in the path: directories above the lake may have such names, too.
    key_of_file = F.regexp_extract(F.input_file_name(), ".*raw_file=([^/]+)/", 1)
    theirs = _ids(spark, [other["uri"] for other in neighbours.values()], ids).withColumn("key", key_of_file)
    shared = theirs.join(_ids(spark, [uri], ids), "transaction_id")
    rows = {row["key"]: row["count"] for row in shared.groupBy("key").count().collect()}
    found = {key: {"rows": rows.get(key, 0), "examples": []} for key in neighbours}
    # One is enough to look at; others have their numbers.
    for key in sorted(rows)[:1]:
        first = shared.where(F.col("key") == key).orderBy("transaction_id").limit(EXAMPLES).collect()
        found[key]["examples"] = [row["transaction_id"] for row in first]
    return found


def _ids(spark: SparkSession, uris: list[str], ids: dict[str, Any]) -> DataFrame:
    """The ids of partitions within the range of `ids`."""
    paths = [runtime.literal_path(uri) for uri in uris]
    frame = spark.read.schema("transaction_id BIGINT").parquet(*paths)
    return frame.where("transaction_id BETWEEN {} AND {}".format(ids["min"], ids["max"]))
