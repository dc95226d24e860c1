"""A real Spark cluster on this machine: a master and workers of one core each from the installed PySpark."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from ml_platform.dev.cloud.processes import TetheredProcess, free_port

START_TIMEOUT_S = 90


class StandaloneCluster:
    """A context manager. `environment` is what the executors have besides PATH, HOME and JAVA_HOME."""

    def __init__(
        self, directory: Path, environment: Mapping[str, str], *, workers: int = 2, memory_mb: int = 1024
    ) -> None:
        self.directory = directory
        self._workers = workers
        self._memory_mb = memory_mb
        self._environment = environment
        self._stack = ExitStack()
        self.master = ""

    def __enter__(self) -> StandaloneCluster:
        self.directory.mkdir(exist_ok=True)
        with self._stack:
            port = free_port()
            self.master = f"spark://127.0.0.1:{port}"
            master = self._start("master", "master.Master", "--port", str(port))
            self._wait(master, "I have been elected leader")
            workers = [
                self._start(
                    *(f"worker-{number}", "worker.Worker", "--cores", "1", "--port", "0"),
                    *("--memory", f"{self._memory_mb}m"),
                    *("--work-dir", str(self.directory / f"worker-{number}"), self.master),
                )
                for number in range(self._workers)
            ]
            for worker in workers:
                self._wait(worker, "Successfully registered with master")
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self, name: str, spark_class: str, *arguments: str) -> TetheredProcess:
        from pyspark.find_spark_home import _find_spark_home

        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "JAVA_HOME") if name in os.environ}
        process = TetheredProcess(
            [
                *("/bin/sh", "-c", 'cd "$0" && exec "$@"', self.directory),
                *(f"{_find_spark_home()}/bin/spark-class", f"org.apache.spark.deploy.{spark_class}"),
                *("--host", "127.0.0.1", "--webui-port", "0", *arguments),
            ],
            log=self.directory / f"{name}.log",
            env=inherited | {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable} | {**self._environment},
        )
        self._stack.callback(process.kill)
        return process

    @staticmethod
    def _wait(process: TetheredProcess, line: str) -> None:
        process.wait_until(
            lambda: line in process.log.read_text(errors="replace"), what=process.log.stem, timeout_s=START_TIMEOUT_S
        )
