"""Spark engines: an engine runs a job with a request and returns its report.

`SparkEngine` is the interface; `LocalSparkEngine` drives Spark from this process. Every engine stores the request and
the report of each job under ``_runs/<run id>/`` in the lake.
"""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field, PrivateAttr

from ml_platform.lake.resource import LakeResource
from ml_platform.operations.dead_runs import record_process
from ml_platform.spark import s3a
from ml_platform.spark.code_archive import ARCHIVE_NAME, LIBRARY_JOBS, build_archive, library_archive
from ml_platform.spark.session import default_spark_config
from ml_platform.version import PLATFORM_VERSION


def job_file(run_id: str, job: str, label: str, kind: str) -> str:
    """Name in the lake of a job's file; `kind` is ``request.json``, ``report.json`` or ``driver.log``."""
    return f"_runs/{run_id}/{job}{'-' if label else ''}{label}.{kind}"


@dataclass(frozen=True)
class JobCall:
    """Arguments of one call of `SparkEngine.run_job`; `request` includes the run id."""

    context: dg.AssetExecutionContext
    lake: LakeResource
    job: str
    request: dict[str, Any]
    rows: int
    label: str = ""

    def file(self, kind: str) -> str:
        """Name in the lake of a file of this job; see `job_file`."""
        return job_file(self.context.run.run_id, self.job, self.label, kind)

    def uri(self, kind: str) -> str:
        """URI of that file for Spark."""
        return self.lake.store.spark_uri(self.file(kind))


class SparkEngine(dg.ConfigurableResource, ABC):
    """Interface for running the jobs of ``spark_jobs``."""

    def run_job(
        self,
        context: dg.AssetExecutionContext,
        lake: LakeResource,
        job: str,
        request: dict[str, Any],
        *,
        rows: int,
        label: str = "",
    ) -> dict[str, Any]:
        """Run ``spark_jobs.<job>`` with `request`, the run id and the version of the platform; returns its report.

        `rows` is the approximate number of rows that the job processes, history included; an engine that creates
        clusters sizes them by it. A `label` distinguishes jobs of the same name in one run. Raises what the job raises.
        """
        run_id = context.run.run_id
        # The version goes with the request, because the code archive of a cluster has none.
        request = {"run_id": run_id, "platform_version": PLATFORM_VERSION, **request}
        call = JobCall(context, lake, job, request, rows, label)
        if job in LIBRARY_JOBS:
            call.request["library_uri"] = self._library_uri(call)
        lake.write_json(call.file("request.json"), call.request)
        report = self._execute(call)
        if not isinstance(report, dict) or report.get("run_id") != run_id:
            raise dg.Failure(
                f"the report of {job} in {call.uri('report.json')} is not of this run; the job counts as failed",
                allow_retries=False,
            )
        return report

    def _library_uri(self, call: JobCall) -> str | None:
        """URI or path of the learners' library archive; None if Spark's Python has the library installed."""
        return None

    @abstractmethod
    def _execute(self, call: JobCall) -> dict[str, Any]:
        """Run the job, store its report in the lake and return it."""


#: Sessions to stop at the end of `shared_session`; None outside of it.
_SHARED: ContextVar[set[Any] | None] = ContextVar("shared sessions", default=None)


@contextmanager
def shared_session() -> Generator[None]:
    """Within it, the runs of this process share one embedded Spark session."""
    sessions: set[Any] = set()
    token = _SHARED.set(sessions)
    try:
        yield
    finally:
        _SHARED.reset(token)
        for session in sessions:
            session.stop()


class LocalSparkEngine(SparkEngine):
    """Spark driven from this process, embedded or on the cluster at `master`. All steps share one session."""

    master: str = Field(default="local[*]", description="Spark master: local[*], spark://host:port, yarn, k8s://…")
    driver_memory: str | None = Field(
        default=None, description="Memory of the Spark driver, e.g. 4g; default: a third of the machine's, 1 to 8 GB."
    )
    spark_config: dict[str, str] = Field(
        default_factory=dict, description="Additional Spark properties; they override the platform's."
    )
    with_s3: bool = Field(
        default=False,
        description="Raw files or lake are on S3: add the S3A connector, with boto3's endpoint.",
    )
    _pyspark: Any = PrivateAttr(default=None)
    #: Keeps files that executors fetch from this process until the session ends.
    _code: ExitStack = PrivateAttr(default_factory=ExitStack)
    _library: Path | None = PrivateAttr(default=None)

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Generator[LocalSparkEngine]:
        if context.run and context.instance:
            record_process(context.instance, context.run.run_id)
        try:
            yield self
        finally:
            if self._pyspark is not None:
                shared = _SHARED.get()
                # Executors elsewhere fetch files of the run, which are deleted at its end.
                if shared is not None and self.master.startswith("local"):
                    shared.add(self._pyspark.spark_session)
                else:
                    self._pyspark.spark_session.stop()
                self._pyspark = None
            self._code.close()

    def _execute(self, call: JobCall) -> dict[str, Any]:
        with _forward_log(call.context.log):
            report = importlib.import_module(f"spark_jobs.{call.job}").run(self._session(call.context), call.request)
        call.lake.write_json(call.file("report.json"), report)
        return report

    def _library_uri(self, call: JobCall) -> str | None:
        self._session(call.context)
        return str(self._library) if self._library else None

    def _session(self, context: dg.AssetExecutionContext) -> Any:
        if self._pyspark is None:
            from dagster_pyspark import LazyPySparkResource

            directory = Path(self._code.enter_context(tempfile.TemporaryDirectory()))
            if not self.master.startswith("local"):
                # Before starting Spark, so that a missing library fails early.
                name, content = library_archive()
                self._library = directory / name
                self._library.write_bytes(content)
            context.log.info(f"starting Spark on {self.master}")
            config = default_spark_config(self.master, self.driver_memory)
            if self.with_s3:
                config |= s3a.s3a_properties(s3a.S3Connection.from_boto3())
            config |= self.spark_config
            if self.with_s3:
                config |= s3a.connector_properties(self.spark_config)
            pyspark = LazyPySparkResource(spark_config={"spark.app.name": "ml_platform", **config})
            spark = pyspark.spark_session
            try:
                spark.sparkContext.setLogLevel("ERROR")
                if self.master.startswith("local"):
                    # PySpark's default is the first python3 in PATH.
                    spark.sparkContext.pythonExec = sys.executable
                else:
                    archive = directory / ARCHIVE_NAME
                    archive.write_bytes(build_archive())
                    spark.sparkContext.addPyFile(str(archive))
            except BaseException:
                spark.stop()  # nothing else knows of it yet
                raise
            self._pyspark = pyspark
        return self._pyspark.spark_session


@contextmanager
def _forward_log(log: dg.DagsterLogManager) -> Generator[None]:
    """Forward the jobs' log records to the run's log."""

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.log(record.levelno, record.getMessage(), exc_info=record.exc_info)

    logger, handler = logging.getLogger("spark_jobs"), Forward(logging.INFO)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
