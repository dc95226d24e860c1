"""A stand-in for the cloud on one machine, for trials and tests: the Data Proc API and an S3 server."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_platform.dev.cloud.fake_dataproc import FakeDataproc
    from ml_platform.dev.cloud.s3_server import LocalS3

RAW_BUCKET = "raw"
LAKE_BUCKET = "lake"


class DevCloud:
    """An S3 server with buckets for raw files and the lake, and a Data Proc API that runs jobs on this machine.

    A context manager. `directory` holds keys, objects and logs. `settings` are those of `FakeDataproc`.

    Attributes:
        s3: the S3 server. mock_reason: why it is only a mock, or "" for a real one.
        dataproc: the API.
    """

    s3: LocalS3
    dataproc: FakeDataproc

    def __init__(self, directory: Path, job_environment: Mapping[str, str] | None = None, **settings: Any) -> None:
        self.directory = directory.absolute()
        self.mock_reason = ""
        self._job_environment = dict(job_environment or {})
        self._settings = settings
        self._stack = ExitStack()

    def __enter__(self) -> DevCloud:
        from ml_platform.dev.cloud.fake_dataproc import FakeDataproc, SparkSubmit
        from ml_platform.dev.cloud.s3_server import start_s3_server
        from ml_platform.spark.s3a import S3Connection, connector_properties, s3a_properties

        with ExitStack() as stack:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            server, self.mock_reason = start_s3_server(self.directory / "s3", buckets=(RAW_BUCKET, LAKE_BUCKET))
            self.s3 = stack.enter_context(server)
            cluster = SparkSubmit(
                spark_properties=s3a_properties(S3Connection(self.s3.endpoint_url, self.s3.region))
                | connector_properties(),
                environment=self.s3.environment() | self._job_environment,
            )
            settings = {"run_job": cluster, "bucket": LAKE_BUCKET, **self._settings}
            self.dataproc = stack.enter_context(FakeDataproc(self.directory / "dataproc", **settings))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(error_type, error, traceback)

    def environment(self) -> dict[str, str]:
        """The variables that point the platform to this cloud."""
        return {
            "ML_PLATFORM_DEPLOYMENT": "yandex",
            "ML_PLATFORM_RAW_URI": f"s3://{RAW_BUCKET}",
            "ML_PLATFORM_LAKE_URI": f"s3://{LAKE_BUCKET}/lake",
            **self.s3.environment(),
            **self.dataproc.environment(),
            "DATAPROC_POLL_S": "2",
        }

    def write_environment(self) -> Path:
        """Write the variables to a shell file that only its owner can read; return its path."""
        from ml_platform.dev.cloud.credentials import write_private

        path = self.directory / "environment"
        # Separates runs and models of this cloud from others.
        home = self.directory / "dagster_home"
        home.mkdir(exist_ok=True)
        instance = Path(__file__).parents[3] / "dagster.yaml"
        if instance.exists():  # in a clone
            shutil.copy(instance, home)
        storage = {
            "DAGSTER_HOME": str(home),
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.directory}/mlflow.db",
        }
        lines = [f"{name}={shlex.quote(value)}\n" for name, value in {**self.environment(), **storage}.items()]
        write_private(path, "".join(lines).encode())
        return path
