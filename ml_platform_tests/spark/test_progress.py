"""A long job says how far it is."""

import logging
import re
import threading
import time

import numpy as np
import pytest

from spark_jobs import progress, runtime
from spark_jobs.io import blocks
from spark_jobs.progress import Progress, _duration

pytestmark = pytest.mark.spark


@pytest.fixture
def said(monkeypatch, caplog):
    """The lines so far; one a tenth of a second."""
    monkeypatch.setattr(progress, "INTERVAL_S", 0.1)
    caplog.set_level(logging.INFO, logger="spark_jobs")
    return lambda: [record.getMessage() for record in caplog.records]


def slow_query(spark, seconds_per_task=0.4, tasks=4):
    wait = f"reflect('java.lang.Thread', 'sleep', {int(seconds_per_task * 1000)}L)"
    return spark.range(0, 1000 * tasks, 1, tasks).selectExpr("id", f"IF(id % 1000 = 0, {wait}, NULL) AS waited")


def test_a_running_job_says_its_tasks_and_how_long_it_still_takes(spark, said):
    with Progress(spark, "cleaning") as telling:
        telling.enter("2/4: 2019-10-21", 0.25, 0.5)
        slow_query(spark, tasks=8).write.format("noop").mode("overwrite").save()
    lines = [line for line in said() if " tasks" in line]
    assert lines, said()
    for line in lines:
        assert re.match(r"cleaning 2/4: 2019-10-21, \d+ of 8 tasks, ", line), line
    done = [int(re.search(r"(\d+) of 8", line)[1]) for line in lines]
    assert done == sorted(done)
    assert done[-1] > 0
    assert all(re.search(r"\d+ s so far, about \d+ (s|min) left$", line) for line in lines)


def test_the_rows_per_second_of_a_stage_that_reads_are_told(spark, said, tmp_path):
    path = str(tmp_path / "rows")
    spark.range(200_000).write.parquet(path)
    rows = spark.read.parquet(path).repartition(4)
    wait = "reflect('java.lang.Thread', 'sleep', 1L)"
    with Progress(spark, "features"):
        rows.selectExpr(f"IF(id % 200 = 0, {wait}, NULL) AS waited").write.format("noop").mode("overwrite").save()
    assert any(re.search(r"[\d,]+ rows/s", line) for line in said()), said()


def test_where_blocks_are_read_the_rows_that_tasks_tell_are_told(spark, said):
    block = "array_join(transform(sequence(1, 1000), n -> sha2(string(n * (id + 7)), 256)), '')"
    moved = spark.range(4).selectExpr("CAST(id AS INT) AS partition_key", f"CAST({block} AS BINARY) AS block")
    tallies = partitions.list_accumulator(spark)

    def written(packed):
        time.sleep(0.3)
        tallies.add([{"rows": 1000 * len(packed)}])
        yield {"blocks": np.array([len(packed)])}

    with Progress(spark, "cleaning") as telling:
        telling.follow(tallies)
        blocks.map_blocks(moved.repartition(8, "partition_key"), written, "blocks bigint").collect()
    speeds = [float(found[1].replace(",", "")) for line in said() if (found := re.search(r"([\d,]+) rows/s", line))]
    # Four blocks are no more than four a second; a thousand rows of the first are more for four minutes.
    assert max(speeds, default=0) > 4, said()


def test_nothing_is_said_once_it_is_over(spark, said):
    with Progress(spark, "cleaning"):
        time.sleep(0.25)
    count = len(said())
    assert count >= 1
    time.sleep(0.3)
    assert len(said()) == count
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_no_time_left_is_told_at_the_very_beginning(spark):
    telling = Progress(spark, "cleaning")
    telling.enter("1/40: a", 0.0, 0.025)
    assert "left" not in telling.line()
    telling.enter("21/40: b", 0.5, 0.525)
    assert "left" in telling.line()


def test_the_work_goes_on_where_progress_cannot_be_told(spark, said, monkeypatch):
    monkeypatch.setattr(Progress, "line", lambda self: 1 / 0)
    with Progress(spark, "cleaning"):
        time.sleep(0.25)
    assert said() == []


def test_partitions_take_their_share_of_the_work(spark, monkeypatch):
    entered = []
    monkeypatch.setattr(Progress, "enter", lambda self, *told: entered.append(told))
    items = [{"partition": key, "size": size} for key, size in (("a", 99), ("b", 0), ("c", 299))]
    runtime.for_each_partition(spark, items, lambda item, progress: {}, what="cleaning", size=lambda item: item["size"])
    names, begins, ends = zip(*entered)
    assert names == ("1/3: a", "2/3: b", "3/3: c")
    assert begins == pytest.approx((0, 100 / 401, 101 / 401))
    assert ends == pytest.approx((100 / 401, 101 / 401, 1))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89.6, "90 s"), (600, "10 min"), (5400, "1 h 30 min"), (7260, "2 h 1 min")]
)
def test_durations_are_for_people(seconds, text):
    assert _duration(seconds) == text
