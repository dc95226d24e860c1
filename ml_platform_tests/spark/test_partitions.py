"""Partitions of a request: their tallies and their share of the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator

import numpy as np
import pytest

from spark_jobs import partitions
from spark_jobs.io import blocks
from spark_jobs.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from pyspark.sql import SparkSession

pytestmark = [pytest.mark.spark, pytest.mark.images]


def test_each_task_reports_once(spark: SparkSession) -> None:
    accumulator = partitions.list_accumulator(spark)

    def counted(packed: list[bytes]) -> Iterator[dict[str, Any]]:
        accumulator.add([{"blocks": len(packed)}])
        yield {"blocks": np.array([len(packed)])}

    frame = spark.range(6).selectExpr("CAST(id AS INT) AS partition_key", "CAST('' AS BINARY) AS block").repartition(3)
    rows = blocks.map_blocks(frame, counted, "blocks bigint").collect()
    tallies = partitions.tallies_of(accumulator, 3)
    assert sum(tally["blocks"] for tally in tallies) == sum(row.blocks for row in rows) == 6
    with pytest.raises(RuntimeError, match="3 of 4 tasks"):
        partitions.tallies_of(accumulator, 4)


def test_the_error_of_a_task_is_one_line(spark: SparkSession, tmp_path: Path) -> None:
    def fail(packed: list[bytes]) -> Iterator[dict[str, Any]]:
        raise ValueError("no number in age\nof 5 rows")

    def build(item: dict[str, Any], progress: Progress) -> dict[str, Any]:
        blocks.map_blocks(spark.range(1).selectExpr("1", "CAST('' AS BINARY)"), fail, "blocks bigint").collect()
        return {}

    items = [{"partition": "a", "output_uri": f"file://{tmp_path}/a"}]
    request = {"run_id": "run", "partitions": items}
    verdict = partitions.run_partitions(spark, request, build, what="cleaning", size=lambda item: 1)["partitions"]["a"]
    assert verdict["status"] == "failed"
    assert verdict["error"].endswith("ValueError: no number in age")
    assert not (tmp_path / "a").exists()


def test_partitions_take_their_share_of_the_work(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[Any] = []
    monkeypatch.setattr(Progress, "enter", lambda self, *step: entered.append(step))
    sizes = {"a": 99, "b": 0, "c": 299}
    items = [{"partition": key, "output_uri": f"file://{tmp_path}/{key}"} for key in sizes]
    request = {"run_id": "run", "platform_version": "1.2.3", "partitions": items}
    results = partitions.run_partitions(
        spark, request, lambda item, progress: {}, what="cleaning", size=lambda item: sizes[item["partition"]]
    )["partitions"]
    assert {result["report"]["platform_version"] for result in results.values()} == {"1.2.3"}
    names, begins, ends = zip(*entered)
    assert names == ("1/3: a", "2/3: b", "3/3: c")
    assert begins == pytest.approx((0, 100 / 401, 101 / 401))
    assert ends == pytest.approx((100 / 401, 101 / 401, 1))
