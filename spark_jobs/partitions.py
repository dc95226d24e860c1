"""Jobs that build one partition after another: a report and a verdict for each, tallies from the tasks."""

from __future__ import annotations

import logging
import time
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Callable, Dict

from spark_jobs import runtime
from spark_jobs.progress import Progress
from spark_jobs.schema import REPORT_NAME, SCHEMA_VERSION

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger("spark_jobs")


#: Builds one item of a request and returns what its report says beyond the fields that all reports have.
Build = Callable[[Dict[str, Any], Progress], Dict[str, Any]]


def run_partitions(
    spark: SparkSession, request: dict[str, Any], build: Build, *, what: str, size: Callable[[dict[str, Any]], int]
) -> dict[str, Any]:
    """Build each of the ``partitions`` of `request`, whose failures do not affect each other.

    In the log, `what` names the work, and `size(item)` says how much it is, for the time left.

    Returns ``run_id``, ``spark_version``, ``seconds`` and ``partitions``: key → ``status`` ``succeeded`` with the
    ``report`` that was also written to the item's ``output_uri``, or ``failed`` with an ``error``.
    """
    started = time.monotonic()
    runtime.configure(spark)
    items = request["partitions"]
    # At least 1 each: empty files are some work, too.
    bounds = [0, *accumulate(size(item) + 1 for item in items)]
    verdicts: dict[str, dict[str, Any]] = {}
    with Progress(spark, what) as progress:
        for number, item in enumerate(items, start=1):
            name, item_started = f"{number}/{len(items)}: {item['partition']}", time.monotonic()
            progress.enter(name, bounds[number - 1] / bounds[-1], bounds[number] / bounds[-1])
            try:
                report = _build_partition(spark, item, request["run_id"], build, progress)
            except Exception as error:
                log.exception("%s %s failed", what, name)
                verdicts[item["partition"]] = {"status": "failed", "error": runtime.describe(error)}
            else:
                log.info("%s %s done in %.1f s", what, name, time.monotonic() - item_started)
                verdicts[item["partition"]] = {"status": "succeeded", "report": report}
    return {"run_id": request["run_id"], "partitions": verdicts, **_provenance(spark, started)}


def _build_partition(
    spark: SparkSession, item: dict[str, Any], run_id: str, build: Build, progress: Progress
) -> dict[str, Any]:
    """Build one partition and return its report, which marks it as complete: deleted first, written last."""
    started = time.monotonic()
    files, report_uri = runtime.Files(spark), f"{item['output_uri']}/{REPORT_NAME}"
    files.delete(report_uri)
    report = {
        "schema_version": SCHEMA_VERSION,
        "partition": item["partition"],
        "run_id": run_id,
        **build(item, progress),
        **_provenance(spark, started),
    }
    files.write_json(report_uri, report)
    return report


def _provenance(spark: SparkSession, started: float) -> dict[str, Any]:
    return {"spark_version": spark.version, "seconds": round(time.monotonic() - started, 3)}


def list_accumulator(spark: SparkSession) -> Any:
    """An accumulator of lists: its `value` holds everything that the tasks of a finished action have added.

    Spark counts the additions of a retried task once, provided that the task computes the action's result; those of
    tasks before a shuffle may arrive twice. PySpark keeps the value as long as the driver lives: clear a large one.
    """
    return spark.sparkContext.accumulator([], _ListParam())  # type: ignore[arg-type]


class _ListParam:
    """How Spark adds up lists."""

    def zero(self, value: list[Any]) -> list[Any]:
        return []

    def addInPlace(self, value: list[Any], added: list[Any]) -> list[Any]:
        value.extend(added)
        return value


def tallies_of(accumulator: Any, tasks: int) -> list[dict[str, Any]]:
    """The values of `accumulator`, one per task. Raises RuntimeError if Spark ran other than `tasks` tasks."""
    tallies: list[dict[str, Any]] = accumulator.value
    if len(tallies) != tasks:
        raise RuntimeError(f"{len(tallies)} of {tasks} tasks reported what they wrote")
    return tallies
