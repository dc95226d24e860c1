"""Progress of a long job in its log: current step, share of the work, rows per second, time left."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger("spark_jobs")

#: Seconds between log lines: readers see one at least every 30 s, even if the log is fetched every 12 s.
INTERVAL_S = 15.0

#: Seconds between records at DEBUG, from which a program draws a progress bar.
SAMPLE_INTERVAL_S = 1.0

#: Each Spark job of a step takes this part of what is left of the step: how many will follow is not known.
SHARE_OF_SPARK_JOB = 0.85

#: Minimum share of finished work for a meaningful estimate of the time left.
MIN_SHARE = 0.05

#: Larger shuffle records are blocks (see blocks.py) with an unknown number of rows.
MAX_SHUFFLED_ROW_BYTES = 4096


class Progress:
    """Context manager that logs a line of progress every INTERVAL_S.

    `enter` names the current step and its share of the job; within a step, progress is that of the Spark tasks. The
    share never decreases. A log record of it has the attribute ``share``, from 0 to 1.
    """

    def __init__(self, spark: SparkSession, what: str) -> None:
        self._context: Any = spark.sparkContext
        self._what = what
        self._step = ""
        self._begin, self._end, self._share = 0.0, 0.0, 0.0
        self._earlier_jobs = self._spark_jobs()
        self._tallies: Any = None
        self._started = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._report, name="progress", daemon=True)

    def enter(self, step: str, begin: float, end: float) -> None:
        """Start a `step` that takes the job from the share `begin` to the share `end`, both from 0 to 1."""
        self._step, self._begin, self._end = step, begin, end
        self._earlier_jobs = self._spark_jobs()

    def follow(self, tallies: Any) -> None:
        """Count the ``rows`` of the tallies in this accumulator (see partitions.list_accumulator)."""
        self._tallies = tallies

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _report(self) -> None:
        next_line = time.monotonic() + INTERVAL_S
        while not self._stopped.wait(min(SAMPLE_INTERVAL_S, INTERVAL_S)):
            level = logging.INFO if time.monotonic() >= next_line else logging.DEBUG
            if not log.isEnabledFor(level):
                continue
            if level == logging.INFO:
                next_line += INTERVAL_S
            try:
                log.log(level, "%s", self.line(), extra={"share": self._share})
            except Exception as error:
                # Spark may be stopping. A failed log line must not fail the work.
                log.debug("cannot determine progress: %s", error)

    def line(self) -> str:
        """The current progress, as a log line."""
        rows_per_second = self._rows_per_second()
        self._share = max(self._share, self._begin + (self._end - self._begin) * self._share_of_step())
        elapsed = time.monotonic() - self._started
        parts = [f"{self._what} {self._step}".strip(), f"{self._share:.0%}"]
        if rows_per_second:
            parts.append(f"{rows_per_second:,.0f} rows/s")
        parts.append(f"{_duration(elapsed)} so far")
        if MIN_SHARE <= self._share < 1:
            parts.append(f"about {_duration(elapsed * (1 - self._share) / self._share)} left")
        return ", ".join(parts)

    def _share_of_step(self) -> float:
        """Finished part of the current step, from its Spark jobs and the tasks of the running one."""
        started = self._spark_jobs() - self._earlier_jobs
        if not started:
            return 0.0
        done, tasks = self._tasks()
        of_last: float = SHARE_OF_SPARK_JOB * (done / tasks if tasks else 1.0)
        return 1.0 - (1.0 - SHARE_OF_SPARK_JOB) ** (started - 1) * (1.0 - of_last)

    def _spark_jobs(self) -> int:
        """Number of Spark jobs that were started in this session."""
        # PySpark's status tracker lists running jobs only.
        return int(self._context._jsc.sc().dagScheduler().numTotalJobs())

    def _tasks(self) -> tuple[int, int]:
        """(finished tasks, all tasks) of the running Spark jobs."""
        tracker = self._context.statusTracker()
        jobs = [tracker.getJobInfo(job) for job in tracker.getActiveJobsIds()]
        stages = [tracker.getStageInfo(stage) for job in jobs if job is not None for stage in job.stageIds]
        stages = [stage for stage in stages if stage is not None]
        return sum(stage.numCompletedTasks for stage in stages), sum(stage.numTasks for stage in stages)

    def _rows_per_second(self) -> float:
        """Rows per second of the running stages: rows read or, if a stage reads blocks, rows written by finished tasks.

        0 if no stage is running, and for stages that both read and write blocks.
        """
        # PySpark's status tracker lacks these figures, and the REST API needs the web UI.
        store = self._context._jsc.sc().statusStore()
        stages = store.activeStages()
        speed = 0.0
        for index in range(stages.size()):
            stage = stages.apply(index)
            if stage.submissionTime().isDefined():
                seconds = time.time() - stage.submissionTime().get().getTime() / 1000
                records = stage.inputRecords()
                if stage.shuffleReadBytes() < MAX_SHUFFLED_ROW_BYTES * stage.shuffleReadRecords():
                    records += stage.shuffleReadRecords()
                elif not records and self._tallies is not None:
                    records = sum(tally["rows"] for tally in list(self._tallies.value))
                speed += records / max(seconds, 1)
        return speed


def _duration(seconds: float) -> str:
    """Human-readable duration: 40 s, 12 min, 3 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
