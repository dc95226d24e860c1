"""How far a long job is, said in its log: what it is doing, tasks, rows per second, time left."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger("spark_jobs")

#: Seconds between two lines. A reader of the log sees one every 30 s even where the log is fetched every 12 s.
INTERVAL_S = 15.0

#: No time left is told before this share of the work is done: it would mean nothing.
LEAST_SHARE = 0.05

#: What is larger on average is a block of rows (see blocks.py), and their number is not known here.
LARGEST_ROW_BYTES = 4096


class Progress:
    """Context manager that logs a line every INTERVAL_S while it is open.

    The work is told by `enter`: its name, and which share of the whole it takes. Within that share, the tasks of the
    Spark jobs that run count.
    """

    def __init__(self, spark: SparkSession, what: str) -> None:
        self._context: Any = spark.sparkContext
        self._what = what
        self._doing = ""
        self._begin, self._end = 0.0, 0.0
        self._tallies: Any = None
        self._started = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._report, name="progress", daemon=True)

    def enter(self, doing: str, begin: float, end: float) -> None:
        """From here on the job is `doing` something that takes it from the share `begin` to `end`, of 0 to 1."""
        self._doing, self._begin, self._end = doing, begin, end

    def follow(self, tallies: Any) -> None:
        """From here on tasks that write tell their ``rows`` in this accumulator (see runtime.gathering)."""
        self._tallies = tallies

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _report(self) -> None:
        while not self._over.wait(INTERVAL_S):
            try:
                log.info("%s", self.line())
            except Exception as error:
                # The work matters, not its description: Spark may be stopping.
                log.debug("no progress to tell: %s", error)

    def line(self) -> str:
        """How far the job is, now."""
        tasks_done, tasks = self._tasks()
        rows_per_second = self._rows_per_second()
        share = self._begin + (self._end - self._begin) * (tasks_done / tasks if tasks else 0)
        elapsed = time.monotonic() - self._started
        parts = [f"{self._what} {self._doing}".strip()]
        if tasks:
            parts.append(f"{tasks_done} of {tasks} tasks")
        if rows_per_second:
            parts.append(f"{rows_per_second:,.0f} rows/s")
        parts.append(f"{_duration(elapsed)} so far")
        if LEAST_SHARE <= share < 1:
            parts.append(f"about {_duration(elapsed * (1 - share) / share)} left")
        return ", ".join(parts)

    def _tasks(self) -> tuple[int, int]:
        """Tasks that are done, and all, of the Spark jobs that run."""
        tracker = self._context.statusTracker()
        jobs = [tracker.getJobInfo(job) for job in tracker.getActiveJobsIds()]
        stages = [tracker.getStageInfo(stage) for job in jobs if job is not None for stage in job.stageIds]
        known = [stage for stage in stages if stage is not None]
        return sum(stage.numCompletedTasks for stage in known), sum(stage.numTasks for stage in known)

    def _rows_per_second(self) -> float:
        """Rows of the running stages per second since they started: those that they read, or, where they read blocks of
        rows, those that their finished tasks told. 0 while there are none, and between blocks and blocks.
        """
        # Not in PySpark's own status tracker, and the REST API needs the web UI.
        store = self._context._jsc.sc().statusStore()
        stages = store.activeStages()
        speed = 0.0
        for index in range(stages.size()):
            stage = stages.apply(index)
            if stage.submissionTime().isDefined():
                seconds = time.time() - stage.submissionTime().get().getTime() / 1000
                records = stage.inputRecords()
                if stage.shuffleReadBytes() < LARGEST_ROW_BYTES * stage.shuffleReadRecords():
                    records += stage.shuffleReadRecords()
                elif not records and self._tallies is not None:
                    records = sum(tally["rows"] for tally in list(self._tallies.value))
                speed += records / max(seconds, 1)
        return speed


def _duration(seconds: float) -> str:
    """`seconds` for people: 40 s, 12 min, 3 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
