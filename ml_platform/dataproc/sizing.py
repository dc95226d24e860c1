"""How many nodes a run's cluster gets: from the rows to work through and what a row was measured to cost."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from spark_jobs.train_model import DEFAULTS

MAX_TRAIN_ROWS: int = DEFAULTS["max_train_rows"]

#: Bytes of a raw row: 112 GiB hold 1.88 billion.
BYTES_PER_ROW = 64

#: Core-seconds for a million input rows of each job, history included (see docs/scaling.md). Of training it is what
#: reads, scores and judges; the model's own fit is one task.
CORE_SECONDS_PER_MILLION_ROWS = {"clean_transactions": 2.1, "build_features": 5.7, "train_model": 17.0}

#: Seconds of that fit for a million of the rows that it is given, of which there are at most `max_train_rows`.
FIT_S_PER_MILLION_ROWS = 23.0

#: MB of a Python process beside Java's heap, and for a million rows that a fit holds: 2.95 GB were seen for 5 million
#: rows of 27 inputs (logistic regression; XGBoost 1.78). And the heap that Java needs, which passes the rows on.
WORKERS_MB = 600
FIT_MB_PER_MILLION_ROWS = 600
TRAINING_HEAP = "2g"

#: Seconds of a job that no node shortens: starting Spark, planning, writing the reports.
FIXED_S = 30.0

#: Rows that features are built from for each new row: its file's own, and those of the two files before.
ROWS_WITH_HISTORY = 3


@dataclass(frozen=True)
class Sizing:
    """The chosen number of nodes and why. `seconds` is what the work is expected to take on them."""

    nodes: int
    seconds: float
    reason: str


def expected_seconds(job: str, rows: int, cores: int) -> float:
    """What a job is expected to take with `cores` at work on `rows` input rows."""
    seconds = FIXED_S + CORE_SECONDS_PER_MILLION_ROWS.get(job, 0) * rows / 1e6 / max(cores, 1)
    if job == "train_model":
        seconds += FIT_S_PER_MILLION_ROWS * min(rows, MAX_TRAIN_ROWS) / 1e6
    return seconds


def memory_properties(job: str, max_train_rows: int = MAX_TRAIN_ROWS) -> dict[str, str]:
    """Spark properties for the memory that a job needs beyond the cluster's defaults.

    One fit at a time holds as many as `max_train_rows` rows, in the Python process of some executor; those of the
    search are small. With the defaults an executor takes 5.6 GB: two of them fit a host of the default preset (16 GB,
    of which YARN gives out 12.8).
    """
    if job != "train_model":
        return {}
    overhead = WORKERS_MB + math.ceil(FIT_MB_PER_MILLION_ROWS * max_train_rows / 1e6)
    return {"spark.executor.memory": TRAINING_HEAP, "spark.executor.memoryOverhead": f"{overhead}m"}


def choose_nodes(job: str, rows: int, *, cores: int, least: int, most: int, target_s: float) -> Sizing:
    """Nodes for a run whose first job is `job` with `rows` input rows.

    `cores` is how many a node has. Of `least` to `most` nodes it is the fewest with which the work on the data is
    expected to take `target_s`: a cluster of twice the nodes works half the time for the same money, but starting it
    is paid for by each. Training is not reckoned with: it works on a window, not on what is new.
    """
    work = CORE_SECONDS_PER_MILLION_ROWS.get(job, 0) * rows / 1e6
    if job == "clean_transactions":
        work += CORE_SECONDS_PER_MILLION_ROWS["build_features"] * rows * ROWS_WITH_HISTORY / 1e6
    wanted = math.ceil(work / (cores * target_s))
    nodes = min(max(wanted, least), most)
    seconds = FIXED_S + work / (cores * nodes)
    reason = (
        f"{nodes} nodes of {cores} cores (of {least} to {most}): {rows:,} rows are {work:,.0f} core-seconds of work, "
        f"expected to take {seconds:,.0f} s; {target_s:,.0f} s are aimed at"
    )
    return Sizing(nodes, seconds, reason)


def cores_of(preset: str) -> int | None:
    """Cores of a host of a preset such as ``s3-c4-m16``; None if its name does not tell."""
    found = re.search(r"-c([1-9][0-9]*)-", preset)
    return int(found[1]) if found else None
