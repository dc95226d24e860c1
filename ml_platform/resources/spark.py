"""Where Spark jobs run. An engine takes a job's request and gives back its report.

`SparkEngine` is the contract; `LocalSparkEngine` drives Spark from this process. Both leave the request and the
report of every job under ``_runs/<run id>/`` in the lake.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import dagster as dg
from pydantic import Field, PrivateAttr

from ml_platform.resources.lake import LakeResource
from ml_platform.run_processes import note_process

MEGABYTE = 1 << 20


def job_file(run_id: str, job: str, label: str, kind: str) -> str:
    """Name in the lake of a job's request or report."""
    return f"_runs/{run_id}/{job}{'-' if label else ''}{label}.{kind}.json"


class SparkEngine(dg.ConfigurableResource, ABC):
    """Runs a job of ``spark_jobs``."""

    def run_job(
        self,
        context: dg.AssetExecutionContext,
        lake: LakeResource,
        job: str,
        request: dict[str, Any],
        *,
        label: str = "",
    ) -> dict[str, Any]:
        """Run ``spark_jobs.<job>`` with `request`, to which the run id is added, and return its report.

        A `label` tells several jobs of the same name in one run apart. Raises what the job raises.
        """
        request = {"run_id": context.run.run_id, **request}
        lake.write_json(job_file(context.run.run_id, job, label, "request"), request)
        report = self._execute(context, job, request)
        lake.write_json(job_file(context.run.run_id, job, label, "report"), report)
        return report

    @abstractmethod
    def _execute(self, context: dg.AssetExecutionContext, job: str, request: dict[str, Any]) -> dict[str, Any]: ...


class LocalSparkEngine(SparkEngine):
    """Spark driven from this process: embedded, or any cluster that `master` names. One session for all steps."""

    master: str = Field(default="local[*]", description="Spark master: local[*], spark://host:port, yarn, k8s://…")
    driver_memory: str | None = Field(
        default=None, description="Memory of Spark's driver, e.g. 4g; default: a third of the machine's, 1 to 8 GB."
    )
    spark_config: dict[str, str] = Field(
        default_factory=dict, description="More Spark properties; they win over the platform's own."
    )
    _pyspark: Any = PrivateAttr(default=None)

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Generator[LocalSparkEngine]:
        if context.run and context.instance:
            note_process(context.instance, context.run.run_id)
        try:
            yield self
        finally:
            if self._pyspark is not None:
                self._pyspark.spark_session.stop()
                self._pyspark = None

    def _execute(self, context: dg.AssetExecutionContext, job: str, request: dict[str, Any]) -> dict[str, Any]:
        with _forward_log(context.log):
            return importlib.import_module(f"spark_jobs.{job}").run(self._session(context), request)

    def _session(self, context: dg.AssetExecutionContext) -> Any:
        if self._pyspark is None:
            from dagster_pyspark import LazyPySparkResource

            context.log.info(f"starting Spark on {self.master}")
            config = default_spark_config(self.master, self.driver_memory) | self.spark_config
            pyspark = LazyPySparkResource(spark_config={"spark.app.name": "ml_platform", **config})
            pyspark.spark_session.sparkContext.setLogLevel("ERROR")
            if self.master.startswith("local"):
                # PySpark's default is whichever python3 comes first in PATH.
                pyspark.spark_session.sparkContext.pythonExec = sys.executable
            self._pyspark = pyspark
        return self._pyspark.spark_session


def default_spark_config(master: str, driver_memory: str | None = None) -> dict[str, str]:
    """Properties of a session that this process drives."""
    config = {
        "spark.master": master,
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        # Nothing here is served to others; without this Spark wants a host name that resolves.
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
    }
    if not master.startswith("local"):
        config = {"spark.master": master, "spark.ui.showConsoleProgress": "false"}
    return config | {"spark.driver.memory": driver_memory or f"{default_driver_memory_mb()}m"}


def default_driver_memory_mb() -> int:
    """Memory for an embedded Spark: a third of the machine's, from 1 to 8 GB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MEGABYTE
    return min(8192, max(1024, total // 3))


@contextmanager
def _forward_log(log: dg.DagsterLogManager) -> Generator[None]:
    """Show what the jobs log in the run's own log."""

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.log(record.levelno, record.getMessage())

    logger, handler = logging.getLogger("spark_jobs"), Forward()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
