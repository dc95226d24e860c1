"""Sizes a run's cluster: from the number of rows and the measured cost of a row."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from spark_jobs.train_model import DEFAULTS

MAX_TRAIN_ROWS: int = DEFAULTS["max_train_rows"]

#: Bytes of a raw row: 112 GiB hold 1.88 billion.
BYTES_PER_ROW = 64

#: Core-seconds per million input rows of each job, history included (see docs/scaling.md). For training: reading,
#: scoring and evaluating; the fit of a model is one task.
CORE_SECONDS_PER_MILLION_ROWS = {"clean_transactions": 2.1, "build_features": 5.7, "train_model": 17.0}

#: Seconds of that fit per million of its rows, which are at most `max_train_rows`.
FIT_S_PER_MILLION_ROWS = 23.0

#: MB of a Python process outside Java's heap, and MB per million rows that a fit holds: 2.95 GB were measured for 5
#: million rows of 27 inputs (logistic regression; XGBoost 1.78). Then the heap of Java, which only passes the rows on.
WORKERS_MB = 600
FIT_MB_PER_MILLION_ROWS = 600
TRAINING_HEAP = "2g"

#: Seconds of a job that more nodes do not shorten: starting Spark, planning, writing the reports.
FIXED_S = 30.0

#: Rows that features are built from for each new row: its file's own, and those of the two files before.
ROWS_WITH_HISTORY = 3


@dataclass(frozen=True)
class Sizing:
    """The chosen number of nodes, the seconds that the work is expected to take on them, and the reason."""

    nodes: int
    seconds: float
    reason: str


def expected_seconds(job: str, rows: int, cores: int) -> float:
    """Expected seconds of a job with `cores` cores on `rows` input rows."""
    seconds = FIXED_S + CORE_SECONDS_PER_MILLION_ROWS.get(job, 0) * rows / 1e6 / max(cores, 1)
    if job == "train_model":
        seconds += FIT_S_PER_MILLION_ROWS * min(rows, MAX_TRAIN_ROWS) / 1e6
    return seconds


def memory_properties(job: str, max_train_rows: int = MAX_TRAIN_ROWS) -> dict[str, str]:
    """Spark properties for the memory that a job needs beyond the cluster's defaults.

    One fit at a time holds up to `max_train_rows` rows in the Python process of an executor; the fits of the search are
    small. With the defaults an executor takes 5.6 GB: two of them fit on a host of the default preset (16 GB, of which
    YARN gives out 12.8).
    """
    if job != "train_model":
        return {}
    overhead = WORKERS_MB + math.ceil(FIT_MB_PER_MILLION_ROWS * max_train_rows / 1e6)
    return {"spark.executor.memory": TRAINING_HEAP, "spark.executor.memoryOverhead": f"{overhead}m"}


def choose_nodes(job: str, rows: int, *, cores: int, least: int, most: int, target_s: float) -> Sizing:
    """Nodes for a run whose first job is `job` with `rows` input rows.

    `cores` is the number of cores of a node. The result is the fewest of `least` to `most` nodes with which the work on
    the data is expected to take `target_s`: twice the nodes work half the time for the same money, but each node also
    costs its start. Training does not count: it works on a window, not on the new rows.
    """
    work = CORE_SECONDS_PER_MILLION_ROWS.get(job, 0) * rows / 1e6
    if job == "clean_transactions":
        work += CORE_SECONDS_PER_MILLION_ROWS["build_features"] * rows * ROWS_WITH_HISTORY / 1e6
    nodes = min(max(math.ceil(work / (cores * target_s)), least), most)
    seconds = FIXED_S + work / (cores * nodes)
    reason = (
        f"{nodes} nodes of {cores} cores (of {least} to {most}): {rows:,} rows are {work:,.0f} core-seconds of work, "
        f"expected to take {seconds:,.0f} s; the target is {target_s:,.0f} s"
    )
    return Sizing(nodes, seconds, reason)


def cores_of(preset: str) -> int | None:
    """Cores of a host of a preset such as ``s3-c4-m16``; None if the name does not say."""
    match = re.search(r"-c([1-9][0-9]*)-", preset)
    return int(match[1]) if match else None
