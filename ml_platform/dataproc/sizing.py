"""Cluster sizing from the number of rows and the measured cost per row."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from spark_jobs.train_model import DEFAULTS

MAX_TRAIN_ROWS: int = DEFAULTS["max_train_rows"]

#: Core-seconds per million input rows of each job, history included (see docs/scaling.md). For training, this covers
#: reading, scoring and evaluating; fitting a model is a single task.
CORE_SECONDS_PER_MILLION_ROWS = {
    "clean_transactions": 2.1,
    "build_features": 5.7,
    "score_transactions": 6.7,
    "train_model": 17.0,
}

#: Seconds of that fit per million rows; it gets at most `max_train_rows`.
FIT_S_PER_MILLION_ROWS = 23.0

#: Python memory outside the Java heap: a base in MB, and MB per million rows of a fit. Measured for 5 million rows of
#: 27 inputs: 2.95 GB (logistic regression), 1.78 GB (XGBoost). The Java heap is small: Java only passes the rows on.
WORKERS_MB = 600
FIT_MB_PER_MILLION_ROWS = 600
#: Two tasks of an executor that score; a grade of a week of 11 million rows takes the memory of both.
SCORING_MB = 2400
#: Heap of executors whose rows pass through Java to Python in large pieces.
SMALL_HEAP = "2g"

#: Fixed seconds per job regardless of the number of nodes: starting Spark, planning, writing the reports.
FIXED_S = 30.0

#: Rows read per new row to build features: those of its file and of the two files before it.
ROWS_WITH_HISTORY = 3


@dataclass(frozen=True)
class Sizing:
    """Chosen number of nodes and the reason."""

    nodes: int
    reason: str


def expected_seconds(job: str, rows: int, cores: int) -> float:
    """Expected seconds of a job with `cores` cores on `rows` input rows."""
    seconds = FIXED_S + CORE_SECONDS_PER_MILLION_ROWS.get(job, 0) * rows / 1e6 / max(cores, 1)
    if job == "train_model":
        seconds += FIT_S_PER_MILLION_ROWS * min(rows, MAX_TRAIN_ROWS) / 1e6
    return seconds


def memory_properties(job: str, max_train_rows: int = MAX_TRAIN_ROWS) -> dict[str, str]:
    """Spark memory properties for a job that needs more than the cluster's defaults.

    One fit at a time holds up to `max_train_rows` rows in an executor's Python process; the fits of the search are
    small. Scoring holds whole Parquet files of features. With the default settings an executor takes 5.6 GB, so two fit
    on a host of the default preset (16 GB, of which YARN allocates 12.8).
    """
    if job == "train_model":
        overhead = WORKERS_MB + math.ceil(FIT_MB_PER_MILLION_ROWS * max_train_rows / 1e6)
    elif job == "score_transactions":
        overhead = WORKERS_MB + SCORING_MB
    else:
        return {}
    return {"spark.executor.memory": SMALL_HEAP, "spark.executor.memoryOverhead": f"{overhead}m"}


def choose_nodes(job: str, rows: int, *, cores: int, least: int, most: int, target_s: float) -> Sizing:
    """Choose the number of nodes for a run whose first job is `job` with `rows` input rows.

    `cores` is the number of cores per node. The result is the smallest number from `least` to `most` with which the
    data work is expected to take `target_s`: twice the nodes take half the time for the same price, but each node also
    has a start-up cost. Training is not counted, because it works on a fixed window, not on the new rows.
    """
    work = CORE_SECONDS_PER_MILLION_ROWS.get(job, 0) * rows / 1e6
    if job == "clean_transactions":
        work += CORE_SECONDS_PER_MILLION_ROWS["build_features"] * rows * ROWS_WITH_HISTORY / 1e6
        work += CORE_SECONDS_PER_MILLION_ROWS["score_transactions"] * rows / 1e6
    nodes = min(max(math.ceil(work / (cores * target_s)), least), most)
    seconds = FIXED_S + work / (cores * nodes)
    reason = (
        f"{nodes} nodes of {cores} cores (of {least} to {most}): {rows:,} rows are {work:,.0f} core-seconds of work, "
        f"expected to take {seconds:,.0f} s; the target is {target_s:,.0f} s"
    )
    return Sizing(nodes, reason)


def cores_of(preset: str) -> int | None:
    """Number of cores in a preset such as ``s3-c4-m16``; None if the name does not contain it."""
    match = re.search(r"-c([1-9][0-9]*)-", preset)
    return int(match[1]) if match else None
