"""Driver of the jobs that build one partition after another: reports, results and task tallies."""

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


class Refused(Exception):
    """An input that cannot be processed, however often it is tried: the message says why, in words for people."""


#: Builds one item of a request and returns the fields of its report beyond those of all reports.
Build = Callable[[Dict[str, Any], Progress], Dict[str, Any]]


def run_partitions(
    spark: SparkSession, request: dict[str, Any], build: Build, *, what: str, size: Callable[[dict[str, Any]], int]
) -> dict[str, Any]:
    """Build each of the ``partitions`` of `request`; the failure of one does not affect the others.

    `what` names the work in the log, and `size(item)` is its amount, from which the time left is estimated.

    Returns ``run_id``, ``spark_version``, ``seconds`` and ``partitions``: key → ``status`` ``succeeded`` with the
    ``report`` that was also written to the item's ``output_uri``, or ``failed`` or ``refused`` (see Refused) with an
    ``error``.
    """
    started = time.monotonic()
    runtime.configure(spark)
    items = request["partitions"]
    # At least 1 each, because empty files take time, too.
    bounds = [0, *accumulate(size(item) + 1 for item in items)]
    results: dict[str, dict[str, Any]] = {}
    with Progress(spark, what) as progress:
        for number, item in enumerate(items, start=1):
            name, item_started = f"{number}/{len(items)}: {item['partition']}", time.monotonic()
            progress.enter(name, bounds[number - 1] / bounds[-1], bounds[number] / bounds[-1])
            try:
                report = _build_partition(spark, item, request, build, progress)
            except Refused as error:
                log.error("%s %s refused: %s", what, name, error)
                results[item["partition"]] = {"status": "refused", "error": str(error)}
            except Exception as error:
                log.exception("%s %s failed", what, name)
                results[item["partition"]] = {"status": "failed", "error": runtime.describe(error)}
            else:
                log.info("%s %s done in %.1f s", what, name, time.monotonic() - item_started)
                results[item["partition"]] = {"status": "succeeded", "report": report}
    return {"run_id": request["run_id"], "partitions": results, **_provenance(spark, started)}


def _build_partition(
    spark: SparkSession, item: dict[str, Any], request: dict[str, Any], build: Build, progress: Progress
) -> dict[str, Any]:
    """Build one partition and return its report, which marks it as complete: it is deleted first and written last."""
    started = time.monotonic()
    files, report_uri = runtime.Files(spark), f"{item['output_uri']}/{REPORT_NAME}"
    files.delete(report_uri)
    report = {
        "schema_version": SCHEMA_VERSION,
        "partition": item["partition"],
        "run_id": request["run_id"],
        "platform_version": request.get("platform_version"),
        **build(item, progress),
        **_provenance(spark, started),
    }
    files.write_json(report_uri, report)
    return report


def _provenance(spark: SparkSession, started: float) -> dict[str, Any]:
    return {"spark_version": spark.version, "seconds": round(time.monotonic() - started, 3)}


def list_accumulator(spark: SparkSession) -> Any:
    """Accumulator of lists: its `value` holds everything added by the tasks of a finished action.

    Spark counts the additions of a retried task once if the task computes the action's result; those of tasks before a
    shuffle may be counted twice. PySpark keeps the value as long as the driver lives: clear large ones.
    """
    return spark.sparkContext.accumulator([], _ListParam())  # type: ignore[arg-type]


class _ListParam:
    """AccumulatorParam that concatenates lists."""

    def zero(self, value: list[Any]) -> list[Any]:
        return []

    def addInPlace(self, value: list[Any], added: list[Any]) -> list[Any]:
        value.extend(added)
        return value


def tallies_of(accumulator: Any, tasks: int) -> list[dict[str, Any]]:
    """Values of `accumulator`, one per task. Raises RuntimeError unless there are exactly `tasks` of them."""
    tallies: list[dict[str, Any]] = accumulator.value
    if len(tallies) != tasks:
        raise RuntimeError(f"{len(tallies)} of {tasks} tasks reported what they wrote")
    return tallies
