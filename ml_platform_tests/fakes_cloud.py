"""A clock that skips waits, and the platform on the stand-in for the cloud."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import PrivateAttr

from ml_platform.dataproc.api import DataprocApi
from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.dev.cloud.fake_dataproc import FakeDataproc, JobScript
from ml_platform.lake.partitions import range_tags
from ml_platform.lake.reports import CleanedReport
from ml_platform.lake.resource import LakeResource
from ml_platform.spark.engine import SparkEngine
from ml_platform_tests.fakes import FakeEngine, definitions, local_path, put_raw, raw_spec


class FakeClock:
    """Stands in for the module ``time``: only `sleep` moves it, at once. Safe for several threads.

    It starts at the machine's time, by which tokens and certificates are checked.
    """

    def __init__(self, now: float | None = None) -> None:
        self._now = time.time() if now is None else now
        self._lock = threading.Lock()
        self.slept: list[float] = []

    def time(self) -> float:
        """Seconds since the epoch."""
        with self._lock:
            return self._now

    def monotonic(self) -> float:
        """The same; a clock that stands still cannot go back."""
        return self.time()

    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass, and note how many."""
        if seconds < 0:
            raise ValueError("sleep length must be non-negative")
        with self._lock:
            self._now += seconds
            self.slept.append(seconds)


class ScriptedJobs:
    """Jobs for the stand-in, which take a minute and write what the real ones would.

    `changes` are fields of `JobScript` for the next jobs, in order.
    """

    def __init__(self) -> None:
        self.changes: list[dict[str, Any]] = []
        self.names: list[str] = []

    def __call__(self, request: Any) -> JobScript:
        job = request.pyspark_job
        files = dict(zip(job.args[::2], job.args[1::2], strict=True))
        name = Path(job.main_python_file_uri).stem
        self.names.append(name)

        def work() -> None:
            for code in (job.main_python_file_uri, *job.python_file_uris):
                assert local_path(code).is_file(), code
            report = getattr(FakeEngine(), f"_{name}")(json.loads(local_path(files["--request"]).read_text()))
            local_path(files["--report"]).write_text(json.dumps(report))

        script: dict[str, Any] = {"seconds": 60, "log": f"{name}: this is the driver\n", "effect": work}
        return JobScript(**script | (self.changes.pop(0) if self.changes else {}))


def api_of(cloud: FakeDataproc, clock: Any = time, **settings: Any) -> DataprocApi:
    """A client of a stand-in; it signs in by the service account's key unless `settings` say otherwise."""
    values = {
        "endpoint": cloud.endpoint,
        "root_certificates_file": str(cloud.root_certificates_file),
        "service_account_key_file": str(cloud.service_account_key_file),
    }
    return DataprocApi(**values | settings, clock=clock)


def cluster_fields(cloud: FakeDataproc) -> dict[str, Any]:
    """The fields of ClusterSpec that have no default."""
    return {
        "folder_id": cloud.folder_id,
        "subnet_id": cloud.subnet_id,
        "service_account_id": cloud.service_account_id,
    }


def engine_of(
    cloud: FakeDataproc,
    lake: LakeResource,
    clock: Any = time,
    *,
    cluster: dict[str, Any] | None = None,
    **settings: Any,
) -> DataprocEngine:
    """The cluster engine on a stand-in, in the time of `clock`."""

    class Engine(DataprocEngine):
        # Dagster copies the resource without its private attributes.
        _clock: Any = PrivateAttr(default_factory=lambda: clock)

    values: dict[str, Any] = {
        "deployment": "test",
        "lake_uri": lake.lake_uri,
        "api_endpoint": cloud.endpoint,
        "root_certificates_file": str(cloud.root_certificates_file),
        "service_account_key_file": str(cloud.service_account_key_file),
        "cluster": cluster_fields(cloud) | (cluster or {}),
    }
    return Engine(**values | settings)


def small_job(lake: LakeResource, engine: SparkEngine, *assets: str) -> dg.JobDefinition:
    """A job of some of the platform's assets, without checks, which take time and never use the engine."""
    everything = definitions(lake, engine)
    wanted = dg.AssetSelection.assets(*assets)
    keys = {"raw_transactions", *assets}
    return dg.Definitions(
        assets=[asset for asset in everything.assets or () if asset.key.to_user_string() in keys],  # type: ignore[union-attr]
        jobs=[dg.define_asset_job("process_new_files", wanted, executor_def=dg.in_process_executor)],
        resources=everything.resources,
    ).resolve_job_def("process_new_files")


class Result:
    """A run as Dagster's storage has it."""

    def __init__(self, instance: dg.DagsterInstance, run_id: str) -> None:
        self._instance, self.run_id = instance, run_id
        run = instance.get_run_by_id(run_id)
        assert run is not None
        self.run = run
        self.success = run.status == dg.DagsterRunStatus.SUCCESS

    @property
    def log(self) -> list[str]:
        """The run's log, events included."""
        return [entry.user_message for entry in self._instance.all_logs(self.run_id)]

    @property
    def errors(self) -> str:
        """The errors of the run's events, without their stacks."""
        found = []
        for entry in self._instance.all_logs(self.run_id):
            event = entry.dagster_event
            data: Any = event.event_specific_data if event else None
            error = getattr(data, "error", None)
            while error is not None:
                found.append(error.message)
                error = error.cause
        return "\n".join(found)

    @property
    def everything(self) -> str:
        """Everything that Dagster stores of the run, as text: events with their metadata, log, tags."""
        return f"{self.run}{self.run.tags}" + "".join(map(str, self._instance.all_logs(self.run_id)))


class Platform:
    """The platform with the cluster engine on a stand-in for the cloud with scripted jobs.

    It has raw files ``a`` to ``c`` and their partitions.
    """

    def __init__(
        self,
        cloud: FakeDataproc,
        lake: LakeResource,
        instance: dg.DagsterInstance,
        clock: FakeClock,
        jobs: ScriptedJobs,
    ) -> None:
        self.cloud, self.lake, self.instance, self.clock, self.jobs = cloud, lake, instance, clock, jobs
        self.keys = ("a", "b", "c")
        for number, key in enumerate(self.keys):
            put_raw(lake, key, raw_spec(number))
        instance.add_dynamic_partitions("raw_files", self.keys)

    def engine(self, **settings: Any) -> DataprocEngine:
        """The engine, in the platform's time; it polls seldom, because each poll takes real time."""
        return engine_of(self.cloud, self.lake, self.clock, **{"poll_s": 30, **settings})

    def run(
        self,
        *assets: str,
        keys: tuple[str, str] = ("a", "a"),
        run_id: str | None = None,
        engine: DataprocEngine | None = None,
        lake: LakeResource | None = None,
        **settings: Any,
    ) -> Result:
        """Run assets (default: the first) over a range of partitions; `settings` are the engine's."""
        names = assets or ("cleaned_transactions",)
        job = small_job(lake or self.lake, engine or self.engine(**settings), *names)
        result = job.execute_in_process(
            instance=self.instance, tags=range_tags(*keys), raise_on_error=False, run_id=run_id
        )
        return Result(self.instance, result.run_id)

    @property
    def cleaned(self) -> list[str]:
        """The cleaned partitions of the lake."""
        return sorted(self.lake.reports(CleanedReport))

    def accepted(self, method: str) -> list[dict[str, Any]]:
        """Requests of a method that the API accepted."""
        return [call["request"] for call in self.cloud.calls(method) if call["code"] == "OK"]

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.clock.sleep(seconds)


@contextmanager
def platform_on(
    directory: Path, lake: LakeResource, instance: dg.DagsterInstance, clock: FakeClock, **settings: Any
) -> Iterator[Platform]:
    """A platform on a new stand-in with `settings`, which are those of `FakeDataproc`."""
    jobs = ScriptedJobs()
    times = {"create_seconds": 60, "delete_seconds": 20, "job_start_seconds": 10, "cancel_seconds": 5}
    with FakeDataproc(directory, clock=clock, **{"run_job": jobs, **times, **settings}) as cloud:
        yield Platform(cloud, lake, instance, clock, jobs)
