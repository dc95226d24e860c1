"""The log lines of a long job."""

import logging
import re
import threading
import time

import numpy as np
import pytest

from spark_jobs import partitions, progress
from spark_jobs.io import blocks
from spark_jobs.progress import Progress, _duration

pytestmark = pytest.mark.spark


@pytest.fixture
def logged(monkeypatch, caplog):
    """The lines so far; one a tenth of a second."""
    monkeypatch.setattr(progress, "INTERVAL_S", 0.1)
    caplog.set_level(logging.INFO, logger="spark_jobs")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.images
def test_a_running_job_logs_its_share_rows_and_time_left(spark, logged, tmp_path):
    path = str(tmp_path / "rows")
    spark.range(160_000).write.parquet(path)
    rows = spark.read.parquet(path).repartition(8)
    wait = "reflect('java.lang.Thread', 'sleep', 1L)"
    with Progress(spark, "cleaning") as job:
        job.enter("2/4: 2019-10-21", 0.25, 0.5)
        rows.selectExpr(f"IF(id % 80 = 0, {wait}, NULL) AS waited").write.format("noop").mode("overwrite").save()
        rows.selectExpr("sum(id)").collect()
    lines = [line for line in logged() if re.match(r"cleaning 2/4: 2019-10-21, \d+%, ", line)]
    shares = [int(re.search(r"(\d+)%", line)[1]) for line in lines]
    assert shares == sorted(shares)
    assert 25 < max(shares, default=0) <= 50, logged()
    assert all(re.search(r"\d+ s so far, about \d+ (s|min) left$", line) for line in lines)
    assert any(re.search(r"[\d,]+ rows/s", line) for line in lines)


@pytest.mark.images
def test_stages_that_read_blocks_count_the_rows_of_tallies(spark, logged):
    block = "array_join(transform(sequence(1, 1000), n -> sha2(string(n * (id + 7)), 256)), '')"
    moved = spark.range(4).selectExpr("CAST(id AS INT) AS partition_key", f"CAST({block} AS BINARY) AS block")
    tallies = partitions.list_accumulator(spark)

    def written(packed):
        time.sleep(0.3)
        tallies.add([{"rows": 1000 * len(packed)}])
        yield {"blocks": np.array([len(packed)])}

    with Progress(spark, "cleaning") as job:
        job.follow(tallies)
        blocks.map_blocks(moved.repartition(8, "partition_key"), written, "blocks bigint").collect()
    speeds = [float(found[1].replace(",", "")) for line in logged() if (found := re.search(r"([\d,]+) rows/s", line))]
    # Four blocks are at most four a second; a thousand rows of the first exceed that for four minutes.
    assert max(speeds, default=0) > 4, logged()


def test_nothing_is_logged_after_the_end(spark, logged):
    with Progress(spark, "cleaning"):
        deadline = time.monotonic() + 60
        while not logged():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    count = len(logged())
    time.sleep(0.3)
    assert len(logged()) == count
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_the_time_left_is_not_estimated_at_the_very_beginning(spark):
    job = Progress(spark, "cleaning")
    job.enter("1/40: a", 0.0, 0.025)
    assert "left" not in job.line()
    job.enter("21/40: b", 0.5, 0.525)
    assert "left" in job.line()


def test_the_work_goes_on_if_a_progress_line_fails(spark, logged, monkeypatch):
    monkeypatch.setattr(Progress, "line", lambda self: 1 / 0)
    with Progress(spark, "cleaning"):
        time.sleep(0.25)
    assert logged() == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89.6, "90 s"), (600, "10 min"), (5400, "1 h 30 min"), (7260, "2 h 1 min")]
)
def test_durations_are_readable(seconds, text):
    assert _duration(seconds) == text
