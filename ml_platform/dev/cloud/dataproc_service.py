"""State of the stand-in for Data Proc: clusters, jobs and operations, and how long they take.

Handlers take the request messages of the API and return its responses, or raise `ApiError`. State is a function of the
clock and is updated with each call.
"""
# ruff: noqa: TID253 - only the stand-in imports this, and it needs gRPC anyway

from __future__ import annotations

import codecs
import heapq
import itertools
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status
from yandex.cloud.dataproc.v1 import cluster_pb2, cluster_service_pb2, common_pb2, job_pb2, job_service_pb2
from yandex.cloud.operation import operation_pb2

from ml_platform.dev.cloud.cluster_rules import ApiError, Quotas, check_cluster, check_quotas, invalid
from ml_platform.dev.cloud.credentials import random_id
from ml_platform.dev.cloud.spark_submit import SparkJob, SparkSubmit

ClusterState, JobState = cluster_pb2.Cluster.Status, job_pb2.Job.Status
#: Final states of a job.
FINISHED = frozenset({JobState.DONE, JobState.ERROR, JobState.CANCELLED})
DEFAULT_PAGE = 100
DEFAULT_LOG_PAGE = 1 << 20
NAME_FILTER = re.compile(r'\s*name\s*=\s*(?:"([a-z][-a-z0-9]{1,61}[a-z0-9])"|([a-z][-a-z0-9]{1,61}[a-z0-9]))\s*')


class Clock(Protocol):
    """Seconds since the epoch."""

    def time(self) -> float: ...


@dataclass
class Outcome:
    """Result of a cluster's creation or deletion, after the call was accepted."""

    #: Duration; None for the default.
    seconds: float | None = None
    #: gRPC status with which the operation fails, such as INTERNAL; the cluster's state is then ERROR.
    error: str | None = None
    message: str = ""
    #: Seconds after the operation's success until the cluster turns ERROR, or vanishes.
    error_after: float | None = None
    vanish_after: float | None = None


@dataclass
class JobScript:
    """A simulated job: its events and their times."""

    #: Final state, DONE or ERROR.
    status: str = "DONE"
    #: From RUNNING to the end; ``math.inf`` for a job that hangs.
    seconds: float = 0.0
    #: The driver's output: at the start, or as pairs of seconds after the start and text.
    log: str | Sequence[tuple[float, str]] = ""
    #: Called at the job's end to write its results. If it raises, the job ends in ERROR, with the error in its log.
    effect: Callable[[], None] | None = None


@dataclass
class ClusterRecord:
    """A cluster and its operations."""

    proto: Any
    number: int
    subclusters: list[Any] = field(default_factory=list)
    operations: list[Any] = field(default_factory=list)

    @property
    def state(self) -> str:
        """Name of the cluster's status, such as RUNNING."""
        return ClusterState.Name(self.proto.status)


@dataclass
class JobRecord:
    """A job, its operations and its process or script."""

    proto: Any
    number: int
    operations: list[Any] = field(default_factory=list)
    script: JobScript | None = None
    process: SparkJob | None = None
    started: float | None = None
    extra_log: str = ""

    @property
    def state(self) -> str:
        """Name of the job's status, such as RUNNING."""
        return JobState.Name(self.proto.status)

    @property
    def finished(self) -> bool:
        return self.proto.status in FINISHED

    def log(self, now: float) -> bytes:
        """The driver's output so far."""
        if self.process is not None:
            return self.process.log_file.read_bytes()
        if self.script is None or self.started is None:
            return self.extra_log.encode()
        lines = [(0.0, self.script.log)] if isinstance(self.script.log, str) else self.script.log
        return ("".join(text for at, text in lines if self.started + at <= now) + self.extra_log).encode()


class DataprocService:
    """Clusters, jobs and operations of one folder.

    `directory` is for the files of jobs. `run_job` runs PySpark jobs: a `SparkSubmit`, or a function from a
    ``CreateJobRequest`` to a `JobScript`. All times are in seconds of `clock` plus `skew_seconds`, because
    the service's clock may differ from its caller's.

    With `log_token_at_end`, ``ListLog`` returns a page token at the end of the log of a running job (an empty page
    follows). With `delete_while_creating`, a cluster can be deleted while it is being created; otherwise the operations
    conflict.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        folder_id: str = "b1gfake0000000000000",
        subnet_id: str = "e9bfake0000000000000",
        zone: str = "ru-central1-a",
        clock: Clock = time,
        skew_seconds: float = 0.0,
        run_job: SparkSubmit | Callable[[Any], JobScript] | None = None,
        create_seconds: float = 2.0,
        delete_seconds: float = 1.0,
        job_start_seconds: float = 0.0,
        cancel_seconds: float = 0.0,
        quotas: Quotas | None = None,
        log_token_at_end: bool = False,
        delete_while_creating: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.folder_id, self.subnet_id, self.zone = folder_id, subnet_id, zone
        self.service_account_id = random_id("aje")
        self.skew_seconds = skew_seconds
        self.run_job = run_job if run_job is not None else SparkSubmit()
        self.create_seconds, self.delete_seconds = create_seconds, delete_seconds
        self.job_start_seconds, self.cancel_seconds = job_start_seconds, cancel_seconds
        self.quotas = quotas or Quotas()
        self.log_token_at_end, self.delete_while_creating = log_token_at_end, delete_while_creating
        self._clock = clock
        self._lock = threading.RLock()
        self._clusters: dict[str, ClusterRecord] = {}
        self._jobs: dict[str, JobRecord] = {}
        self._operations: dict[str, Any] = {}
        self._creations: deque[Outcome] = deque()
        self._deletions: deque[Outcome] = deque()
        self._schedule: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count(1)
        #: Time of the scheduled event being processed, which is before that of the call.
        self._event_time: float | None = None

    def now(self) -> float:
        """Time of the service, in seconds since the epoch."""
        return self._clock.time() + self.skew_seconds

    def kill_jobs(self) -> None:
        """Kill the processes of all jobs."""
        with self._lock:
            for job in self._jobs.values():
                if job.process is not None:
                    job.process.kill()

    # --- State and faults, for tests

    @property
    def clusters(self) -> dict[str, ClusterRecord]:
        """Existing clusters by id."""
        with self._lock:
            self._advance()
            return dict(self._clusters)

    @property
    def jobs(self) -> dict[str, JobRecord]:
        """All jobs ever submitted, by id."""
        with self._lock:
            self._advance()
            return dict(self._jobs)

    def add_cluster(self, name: str, labels: Mapping[str, str] | None = None, **fields: Any) -> str:
        """Add a running cluster without an API call; return its id.

        `fields` are further fields of the ``Cluster`` message, such as ``status``.
        """
        with self._lock:
            values = {"folder_id": self.folder_id, "status": ClusterState.RUNNING, "health": common_pb2.ALIVE}
            proto = cluster_pb2.Cluster(
                id=random_id("c9q"), name=name, labels=labels, created_at=self._timestamp(), **{**values, **fields}
            )
            if not proto.HasField("config"):
                services = cluster_pb2.HadoopConfig.Service
                proto.config.version_id = "2.0"
                proto.config.hadoop.services.extend([services.YARN, services.SPARK])
            self._clusters[proto.id] = ClusterRecord(proto, next(self._numbers))
            return proto.id

    def vanish(self, cluster_id: str) -> None:
        """Remove a cluster without an operation."""
        with self._lock:
            self._remove(cluster_id)

    def script_create(self, outcome: Outcome) -> None:
        """Set the outcome of the next cluster creation, after the call is accepted."""
        with self._lock:
            self._creations.append(outcome)

    def script_delete(self, outcome: Outcome, times: int = 1) -> None:
        """Set the outcome of the next cluster deletions, after the call is accepted."""
        with self._lock:
            self._deletions.extend([outcome] * times)

    # --- Time

    def _advance(self) -> None:
        """Process the events that are due."""
        now = self.now()
        while self._schedule and self._schedule[0][0] <= now:
            self._event_time, _, event = heapq.heappop(self._schedule)
            try:
                event()
            finally:
                self._event_time = None
        for job in self._jobs.values():
            self._follow_process(job)

    def _current_time(self) -> float:
        return self.now() if self._event_time is None else self._event_time

    def _schedule_in(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._schedule, (self._current_time() + seconds, next(self._numbers), event))

    def _timestamp(self) -> Any:
        seconds = self._current_time()
        return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e6) * 1000)

    # --- Operations

    def _new_operation(self, description: str, metadata: Any, owner: ClusterRecord | JobRecord) -> Any:
        stamp = self._timestamp()
        operation = operation_pb2.Operation(
            id=random_id("c9q"),
            description=description,
            created_at=stamp,
            modified_at=stamp,
            created_by=self.service_account_id,
        )
        operation.metadata.Pack(metadata)
        self._operations[operation.id] = operation
        owner.operations.append(operation)
        return operation

    def _end_operation(self, operation: Any, response: Any = None, error: tuple[str, str] | None = None) -> None:
        if operation.done:
            return
        operation.done = True
        operation.modified_at.CopyFrom(self._timestamp())
        if error is not None:
            operation.error.CopyFrom(Status(code=grpc.StatusCode[error[0]].value[0], message=error[1]))
        else:
            operation.response.Pack(response)

    def _get_operation(self, request: Any) -> Any:
        if request.operation_id not in self._operations:
            raise ApiError("NOT_FOUND", f"Operation {request.operation_id} not found")
        return self._operations[request.operation_id]

    # --- Clusters

    def _cluster(self, cluster_id: str) -> ClusterRecord:
        if cluster_id not in self._clusters:
            raise ApiError("NOT_FOUND", f"Cluster {cluster_id} not found")
        return self._clusters[cluster_id]

    def _check_folder(self, folder_id: str) -> None:
        if folder_id != self.folder_id:
            raise ApiError("PERMISSION_DENIED", f"Permission denied to folder {folder_id}")

    def _list_clusters(self, request: Any) -> Any:
        self._check_folder(request.folder_id)
        clusters = [
            (cluster.number, cluster.proto)
            for cluster in self._clusters.values()
            if cluster.proto.folder_id == request.folder_id and _matches_filter(request.filter, cluster.proto.name)
        ]
        page, token = _page_of("clusters", clusters, request)
        return cluster_service_pb2.ListClustersResponse(clusters=page, next_page_token=token)

    def _create_cluster(self, request: Any) -> Any:
        self._check_folder(request.folder_id)
        if any(cluster.proto.name == request.name for cluster in self._clusters.values()):
            raise ApiError("ALREADY_EXISTS", f"Cluster {request.name!r} already exists")
        check_cluster(request)
        specs = request.config_spec.subclusters_spec
        for spec in specs:
            if spec.subnet_id != self.subnet_id:
                raise ApiError("NOT_FOUND", f"Subnet {spec.subnet_id} not found")
        for account in filter(None, (request.service_account_id, request.autoscaling_service_account_id)):
            if account != self.service_account_id:
                raise ApiError("NOT_FOUND", f"Service account {account} not found")
        used = [spec for cluster in self._clusters.values() for spec in cluster.subclusters]
        check_quotas(self.quotas, used, specs)

        outcome = self._creations.popleft() if self._creations else Outcome()
        shared = set(cluster_pb2.Cluster.DESCRIPTOR.fields_by_name) & set(request.DESCRIPTOR.fields_by_name)
        proto = cluster_pb2.Cluster(
            id=random_id("c9q"),
            created_at=self._timestamp(),
            status=ClusterState.CREATING,
            **{name: getattr(request, name) for name in shared},
        )
        proto.config.version_id = request.config_spec.version_id or "2.0"
        proto.config.hadoop.CopyFrom(request.config_spec.hadoop)
        proto.environment = proto.environment or cluster_pb2.Cluster.PRODUCTION
        cluster = ClusterRecord(proto, next(self._numbers), list(specs))
        self._clusters[proto.id] = cluster
        metadata = cluster_service_pb2.CreateClusterMetadata(cluster_id=proto.id)
        operation = self._new_operation("Create Data Proc cluster", metadata, cluster)
        self._schedule_in(
            self.create_seconds if outcome.seconds is None else outcome.seconds,
            lambda: self._end_create(cluster, operation, outcome),
        )
        return operation

    def _end_create(self, cluster: ClusterRecord, operation: Any, outcome: Outcome) -> None:
        if operation.done:
            return
        if outcome.error is not None:
            self._break(cluster)
            self._end_operation(operation, error=(outcome.error, outcome.message or "Cluster could not be created"))
            return
        self._set_state(cluster, ClusterState.RUNNING, common_pb2.ALIVE)
        self._end_operation(operation, cluster.proto)
        if outcome.error_after is not None:
            self._schedule_in(outcome.error_after, lambda: self._break(cluster))
        if outcome.vanish_after is not None:
            self._schedule_in(outcome.vanish_after, lambda: self._remove(cluster.proto.id))

    def _set_state(self, cluster: ClusterRecord, status: Any, health: Any) -> None:
        cluster.proto.status, cluster.proto.health = status, health

    def _break(self, cluster: ClusterRecord) -> None:
        self._set_state(cluster, ClusterState.ERROR, common_pb2.DEAD)
        self._end_jobs(cluster.proto.id, "the cluster failed")

    def _remove(self, cluster_id: str) -> None:
        self._end_jobs(cluster_id, "the cluster is gone")
        cluster = self._clusters.pop(cluster_id, None)
        for operation in cluster.operations if cluster is not None else ():
            self._end_operation(operation, error=("INTERNAL", f"Cluster {cluster_id} is gone"))

    def _delete_cluster(self, request: Any) -> Any:
        cluster = self._cluster(request.cluster_id)
        if cluster.proto.deletion_protection:
            raise ApiError(
                "FAILED_PRECONDITION", "The operation was rejected because cluster has 'deletion_protection' = ON"
            )
        if cluster.proto.status == ClusterState.STOPPING and not cluster.operations:
            raise ApiError("FAILED_PRECONDITION", f"Cluster {cluster.proto.id} is {cluster.state}")
        # Only one operation at a time may change a cluster.
        for running in (operation for operation in cluster.operations if not operation.done):
            if not (self.delete_while_creating and cluster.proto.status == ClusterState.CREATING):
                raise ApiError("FAILED_PRECONDITION", f"operation {running.id} on this cluster is not finished yet")
            self._end_operation(running, error=("CANCELLED", "The cluster is being deleted"))
        outcome = self._deletions.popleft() if self._deletions else Outcome()
        self._set_state(cluster, ClusterState.STOPPING, common_pb2.HEALTH_UNKNOWN)
        self._end_jobs(cluster.proto.id, "the cluster is being deleted")
        metadata = cluster_service_pb2.DeleteClusterMetadata(cluster_id=cluster.proto.id)
        operation = self._new_operation("Delete Data Proc cluster", metadata, cluster)

        def end() -> None:
            if outcome.error is not None:
                self._break(cluster)
                self._end_operation(operation, error=(outcome.error, outcome.message or "Cluster could not be deleted"))
                return
            self._end_operation(operation, Empty())
            self._remove(cluster.proto.id)

        self._schedule_in(self.delete_seconds if outcome.seconds is None else outcome.seconds, end)
        return operation

    # --- Jobs

    def _job(self, request: Any) -> JobRecord:
        self._cluster(request.cluster_id)
        job = self._jobs.get(request.job_id)
        if job is None or job.proto.cluster_id != request.cluster_id:
            raise ApiError("NOT_FOUND", f"Job {request.job_id} not found")
        return job

    def _list_jobs(self, request: Any) -> Any:
        self._cluster(request.cluster_id)
        jobs = [
            (job.number, job.proto)
            for job in self._jobs.values()
            if job.proto.cluster_id == request.cluster_id and _matches_filter(request.filter, job.proto.name)
        ]
        page, token = _page_of("jobs", jobs, request)
        return job_service_pb2.ListJobsResponse(jobs=page, next_page_token=token)

    def _create_job(self, request: Any) -> Any:
        cluster = self._cluster(request.cluster_id)
        kind = request.WhichOneof("job_spec")
        if kind is None:
            raise invalid("Request validation error: job_spec: exactly one kind of job must be set")
        if kind != "pyspark_job":
            raise ApiError("UNIMPLEMENTED", "This stand-in for Data Proc only runs PySpark jobs")
        if cluster.proto.status != ClusterState.RUNNING:
            raise ApiError(
                "FAILED_PRECONDITION", f"Cluster {cluster.proto.id} is {cluster.state}; jobs run on a RUNNING cluster"
            )
        if cluster_pb2.HadoopConfig.SPARK not in cluster.proto.config.hadoop.services:
            raise ApiError("FAILED_PRECONDITION", "The cluster has no service SPARK")
        proto = job_pb2.Job(
            id=random_id("c9q"),
            cluster_id=request.cluster_id,
            created_at=self._timestamp(),
            name=request.name,
            created_by=self.service_account_id,
            status=JobState.PROVISIONING,
            pyspark_job=request.pyspark_job,
        )
        job = JobRecord(proto, next(self._numbers))
        if isinstance(self.run_job, SparkSubmit):
            job.process = self.run_job.start(proto.pyspark_job, self.directory / "jobs" / proto.id)
        else:
            job.script = self.run_job(request)
            self._schedule_in(self.job_start_seconds / 2, lambda: self._move_job(job, JobState.PENDING))
            self._schedule_in(self.job_start_seconds, lambda: self._start_script(job))
        self._jobs[proto.id] = job
        metadata = job_service_pb2.CreateJobMetadata(cluster_id=request.cluster_id, job_id=proto.id)
        return self._new_operation("Create Data Proc job", metadata, job)

    def _move_job(self, job: JobRecord, status: Any) -> None:
        if not job.finished and job.proto.status != JobState.CANCELLING:
            job.proto.status = status

    def _run(self, job: JobRecord) -> None:
        self._move_job(job, JobState.RUNNING)
        job.proto.started_at.CopyFrom(self._timestamp())
        job.proto.application_info.id = f"application_{job.proto.created_at.ToMilliseconds()}_{job.number:04d}"

    def _start_script(self, job: JobRecord) -> None:
        assert job.script is not None
        if job.finished or job.proto.status == JobState.CANCELLING:
            return
        job.started = self._event_time
        self._run(job)
        self._schedule_in(job.script.seconds, lambda: self._end_script(job))

    def _end_script(self, job: JobRecord) -> None:
        assert job.script is not None
        if job.finished or job.proto.status == JobState.CANCELLING:
            return
        status = JobState.Value(job.script.status)
        if job.script.effect is not None:
            try:
                job.script.effect()
            except Exception as error:
                job.extra_log += f"{type(error).__name__}: {error}\n"
                status = JobState.ERROR
        self._end_job(job, status)

    def _follow_process(self, job: JobRecord) -> None:
        if job.process is None or job.finished:
            return
        if job.process.started and not job.proto.HasField("started_at"):
            self._run(job)
        if job.process.exit_code is not None:
            if job.proto.status == JobState.CANCELLING:
                self._end_job(job, JobState.CANCELLED)
            else:
                self._end_job(job, JobState.DONE if job.process.exit_code == 0 else JobState.ERROR)

    def _end_job(self, job: JobRecord, status: Any, reason: str = "") -> None:
        if job.finished:
            return
        job.proto.status = status
        job.proto.finished_at.CopyFrom(self._timestamp())
        error = None
        if status == JobState.CANCELLED:
            error = "CANCELLED", "Job was cancelled"
        elif status == JobState.ERROR:
            error = "INTERNAL", f"Job failed{': ' if reason else ''}{reason}"
        create, *cancels = job.operations
        self._end_operation(create, job.proto, error)
        for operation in cancels:
            self._end_operation(operation, job.proto)

    def _end_jobs(self, cluster_id: str, reason: str) -> None:
        for job in self._jobs.values():
            if job.proto.cluster_id == cluster_id and not job.finished:
                if job.process is not None:
                    job.process.kill()
                self._end_job(job, JobState.ERROR, reason)

    def _cancel_job(self, job: JobRecord) -> Any:
        if job.finished:
            raise ApiError("FAILED_PRECONDITION", f"Job {job.proto.id} is {job.state} and cannot be cancelled")
        if job.proto.status != JobState.CANCELLING:
            job.proto.status = JobState.CANCELLING
            if job.process is not None:
                job.process.terminate()
            else:
                self._schedule_in(self.cancel_seconds, lambda: self._end_job(job, JobState.CANCELLED))
        metadata = job_service_pb2.CreateJobMetadata(cluster_id=job.proto.cluster_id, job_id=job.proto.id)
        return self._new_operation("Cancel Data Proc job", metadata, job)

    def _list_log(self, request: Any) -> Any:
        job = self._job(request)
        log, key = job.log(self.now()), f"log {job.proto.id}"
        # A character has up to four bytes.
        size = max(4, request.page_size or DEFAULT_LOG_PAGE)
        if request.page_size < 0:
            raise invalid("page_size: must not be negative")
        start = _read_token(key, request.page_token) if request.page_token else 0
        chunk = log[start : start + size]
        at_end = start + size >= len(log)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # An incomplete character at the end is left for the next page.
        content = decoder.decode(chunk, final=at_end and job.finished)
        stop = start + len(chunk) - len(decoder.getstate()[0])
        more = not at_end or (self.log_token_at_end and not job.finished)
        token = f"{key}:{stop}" if more else ""
        return job_service_pb2.ListJobLogResponse(content=content, next_page_token=token)


def _matches_filter(expression: str, name: str) -> bool:
    if not expression:
        return True
    match = NAME_FILTER.fullmatch(expression)
    if match is None:
        raise invalid(f'filter: must be name="value"; is {expression}')
    return name == (match[1] or match[2])


def _read_token(key: str, token: str) -> int:
    owner, _, position = token.rpartition(":")
    if owner != key or not position.isdecimal():
        raise invalid("page_token: does not belong to this list")
    return int(position)


def _page_of(key: str, items: list[tuple[int, Any]], request: Any) -> tuple[list[Any], str]:
    """(a page of numbered items, token of the next page); a token is the last number of its page."""
    if request.page_size < 0:
        raise invalid("page_size: must not be negative")
    last = _read_token(key, request.page_token) if request.page_token else -1
    rest = sorted((item for item in items if item[0] > last), key=lambda item: item[0])
    page = rest[: request.page_size or DEFAULT_PAGE]
    return [item for _, item in page], f"{key}:{page[-1][0]}" if len(rest) > len(page) else ""
