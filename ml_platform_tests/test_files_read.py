"""What a new file costs in a lake that has grown: the files that Spark opens, by Spark's own metrics."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest

from ml_platform.assets.cleaned import cleaned_transactions
from ml_platform.assets.features import transaction_features
from ml_platform.assets.raw import raw_transactions
from ml_platform.dev.simulator import Simulation
from ml_platform.lake.quality import QualityLimits
from ml_platform.lake.reports import CLEANED_TABLE as CLEANED
from ml_platform.lake.reports import FEATURES_TABLE as FEATURES
from ml_platform.lake.resource import LakeResource
from ml_platform_tests.fakes import SessionEngine

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

#: Files of 30 days; the history of features reaches into two of them.
SIMULATION = Simulation(customers=20, terminals=40, fault_rate=0)


def newest_queries(spark: SparkSession) -> Iterator[Any]:
    """The queries of the session, those that it has run for other tests included, the last one first."""
    spark.sparkContext._jsc.sc().listenerBus().waitUntilEmpty()
    queries = spark._jsparkSession.sharedState().statusStore().executionsList()
    return (queries.apply(number) for number in reversed(range(queries.size())))


def last_query(spark: SparkSession) -> int:
    """The number of the last query; -1 before the first."""
    return max((query.executionId() for query in newest_queries(spark)), default=-1)


def files_read(spark: SparkSession, after: int) -> int:
    """Files that the queries after number `after` have opened."""
    store = spark._jsparkSession.sharedState().statusStore()
    # By accumulator: a plan that was adapted while it ran lists the same scan several times.
    found: dict[tuple[int, int], int] = {}
    for query in itertools.takewhile(lambda query: query.executionId() > after, newest_queries(spark)):
        metrics, values = query.metrics(), store.executionMetrics(query.executionId())
        for metric in (metrics.apply(number) for number in range(metrics.size())):
            value = values.get(metric.accumulatorId())
            if metric.name() == "number of files read" and value.isDefined():
                found[query.executionId(), metric.accumulatorId()] = int(value.get().replace(",", ""))
    return sum(found.values())


def test_old_partitions_are_not_read(
    spark: SparkSession, session_engine: SessionEngine, lake: LakeResource, instance: dg.DagsterInstance
) -> None:
    keys = [SIMULATION.file_name(index).removesuffix(".txt") for index in range(5)]
    read: dict[str, list[int]] = {CLEANED: [], FEATURES: []}
    for index, key in enumerate(keys):
        with lake.raw.open_new(f"{key}.txt") as out:
            SIMULATION.write_file(index, out)
        instance.add_dynamic_partitions("raw_files", [key])
        for asset in (cleaned_transactions, transaction_features):
            before = last_query(spark)
            done = dg.materialize(
                [raw_transactions, cleaned_transactions, transaction_features],
                selection=[asset],
                partition_key=key,
                instance=instance,
                resources={"lake": lake, "spark": session_engine, "limits": QualityLimits()},
            )
            assert done.success
            read[asset.key.to_user_string()].append(files_read(spark, before))
    assert read[CLEANED] == [1] * len(keys)
    # The history reaches into the two partitions before; Spark reads both, and the partition itself.
    first, second, *others = read[FEATURES]
    assert 0 < first < second < others[0]
    assert others == others[:1] * len(others)
