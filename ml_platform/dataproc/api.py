"""Client of the Yandex Data Proc API: clusters, jobs and their logs, by the official SDK's stubs. No Dagster here.

The SDK's own waiting has no deadline, no cancel and no log reading, and its retries do not know that a create whose
answer was lost may have worked; so calls, retries and waits are ours, and connection and credentials are the SDK's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, model_validator

if TYPE_CHECKING:
    import grpc

log = logging.getLogger(__name__)

OWNER = "ml-platform"

#: A cluster that will be usable by itself.
COMING = {"CREATING", "STARTING"}
USABLE = {"RUNNING"}
#: A cluster that will never be usable again; STOPPED ones still cost their disks.
UNUSABLE = {"ERROR", "STOPPING", "STOPPED"}

#: A job that will change its state by itself.
UNFINISHED_JOB = {"PROVISIONING", "PENDING", "RUNNING", "CANCELLING"}
FINISHED_JOB = {"DONE", "ERROR", "CANCELLED"}

#: Answers after which the same call is made again, and why. Anything else says that a repetition cannot help.
RETRYABLE = {
    "UNAVAILABLE": "the service, or the way to it, is away for a moment",
    "DEADLINE_EXCEEDED": "the answer did not come in time, and may the next time",
    "ABORTED": "two calls met; the API asks to repeat",
    "INTERNAL": "a fault inside the service, which is seen to pass",
    "RESOURCE_EXHAUSTED": "too many calls a second",
}

#: Of a call that creates something, RESOURCE_EXHAUSTED is a quota of the cloud, which waiting does not enlarge.
RETRYABLE_CREATE = RETRYABLE.keys() - {"RESOURCE_EXHAUSTED"}

#: Answers that the same call will get for ever.
FINAL = {"PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_ARGUMENT"}

#: What a user can do about an answer.
ADVICE = {
    "UNAUTHENTICATED": "check YC_SERVICE_ACCOUNT_KEY_FILE or YC_IAM_TOKEN (a token lives for 12 hours at most)",
    "PERMISSION_DENIED": "give the service account the roles in deploy/terraform/README.md, and check YC_FOLDER_ID",
    "RESOURCE_EXHAUSTED": "a quota of the cloud is used up: ask for more, or for a smaller cluster (DATAPROC_*)",
    "UNAVAILABLE": "check YC_API_ENDPOINT, YC_ROOT_CERTIFICATES_FILE and the network",
    "DEADLINE_EXCEEDED": "check YC_API_ENDPOINT and the network",
    "INVALID_ARGUMENT": "the API refuses a setting: see the field that it names, and DATAPROC_* in .env.example",
}

#: So gRPC begins what it says, as UNAVAILABLE, where the SDK has got no token.
NO_TOKEN = "Getting metadata from plugin failed with error: "

CALL_TIMEOUT_S = 30.0
#: How long a call is repeated before its error counts.
RETRY_FOR_S = 180.0
LARGEST_PAUSE_S = 30.0
PAGE_SIZE = 100
LOG_PAGE_BYTES = 1 << 20


class DataprocError(Exception):
    """The API refused, or what it says is not what was asked for. `code` is the gRPC status code, if there is one."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class Clock:
    """Time, as tests may replace it."""

    def time(self) -> float:
        """Unix seconds."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds since some moment, which no correction of the clock disturbs."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


@dataclass(frozen=True)
class Cluster:
    """A cluster as the API describes it. `created_at` is by the API's clock, in Unix seconds."""

    id: str
    name: str
    status: str
    labels: Mapping[str, str]
    created_at: float

    def carries(self, labels: Mapping[str, str]) -> bool:
        """Whether it has these labels. When it expires is not asked: a second create comes later than the first."""
        return all(self.labels.get(name) == value for name, value in labels.items() if name != "expires-at")


@dataclass(frozen=True)
class Job:
    """A job as the API describes it; `yarn_application` is "" until YARN has it."""

    id: str
    name: str
    status: str
    yarn_application: str


@dataclass(frozen=True)
class PysparkJob:
    """What a PySpark job runs. URIs are the cluster's: ``s3a://``."""

    main_python_file_uri: str
    python_file_uris: list[str]
    args: list[str]
    properties: Mapping[str, str] = field(default_factory=dict)


class InitializationAction(BaseModel):
    """A script that each host of the cluster runs before it is used."""

    uri: str
    args: list[str] = []
    timeout: int = Field(600, ge=1, description="Seconds.")


class ClusterSpec(BaseModel):
    """What the cluster is made of. The defaults are the pipeline's before this one."""

    folder_id: str = Field(description="Folder of the cloud that the cluster is made in.")
    zone: str = Field("ru-central1-a", description="Availability zone.")
    subnet_id: str = Field(description="Subnet of the cluster's hosts; it needs a NAT gateway.")
    security_group_ids: list[str] = Field([], description="Security groups of the hosts.")
    service_account_id: str = Field(description="Service account of the cluster: it reads and writes the buckets.")
    autoscaling_service_account_id: str = Field("", description="Service account that resizes the cluster.")
    ssh_public_key: str = Field("", description="Public key that opens the hosts.")
    bucket: str = Field("", description="Bucket for the logs that the service itself keeps.")
    description: str = Field("Made by ml_platform for one run; deleted at its end.", max_length=256)
    labels: dict[str, str] = Field({}, description="More labels of the cluster; the platform's own win.")

    image_version: str = Field("2.0", description="Version of the image.")
    services: list[str] = Field(["YARN", "SPARK", "HDFS", "MAPREDUCE"], description="Services of the cluster.")
    properties: dict[str, str] = Field({}, description="Properties of the services, e.g. spark:spark.sql.x.")
    initialization_actions: list[InitializationAction] = Field([], description="Scripts that each host runs.")
    oslogin: bool = Field(False, description="Open the hosts by OS Login.")
    ui_proxy: bool = Field(True, description="Show the services' UIs through the cloud's proxy.")
    log_group_id: str = Field("", description="Cloud Logging group of the cluster.")
    host_group_ids: list[str] = Field([], description="Dedicated hosts.")
    public_ip: bool = Field(False, description="Give the master a public address.")
    environment: Literal["", "PRODUCTION", "PRESTABLE"] = Field("", description="Environment of the cluster.")

    master_preset: str = Field("s3-c2-m8", description="Size of the master.")
    master_disk_type: str = Field("network-ssd")
    master_disk_size_gb: int = Field(40, ge=1)
    data_preset: str = Field("s3-c4-m16", description="Size of a data node.")
    data_disk_type: str = Field("network-hdd")
    data_disk_size_gb: int = Field(128, ge=1)
    data_count: int = Field(3, ge=0, le=32, description="Data nodes; 0 for a cluster without HDFS.")
    compute_preset: str = Field("s3-c4-m16", description="Size of a compute node.")
    compute_disk_type: str = Field("network-hdd")
    compute_disk_size_gb: int = Field(128, ge=1)
    compute_count: int = Field(0, ge=0, le=32, description="Compute nodes.")
    compute_max_count: int = Field(0, ge=0, le=100, description="Compute nodes that autoscaling may go up to; 0: none.")
    compute_preemptible: bool = Field(False, description="Cheap nodes that the cloud may take away.")
    compute_measurement_s: int = Field(60, ge=60, le=600, description="Autoscaling: load is averaged over so long.")
    compute_warmup_s: int = Field(60, ge=0, le=600, description="Autoscaling: a new node's load counts after so long.")
    compute_stabilization_s: int = Field(120, ge=60, le=1800, description="Autoscaling: no decision for so long.")
    compute_cpu_target: float = Field(0, ge=0, le=100, description="Autoscaling: aim of CPU load in %; 0: by YARN.")
    compute_decommission_s: int = Field(120, ge=0, le=86400, description="Autoscaling: a node may finish for so long.")

    @model_validator(mode="after")
    def _autoscaling_has_nodes(self) -> ClusterSpec:
        if (self.compute_max_count or self.compute_preemptible) and not self.compute_count:
            raise ValueError("DATAPROC_COMPUTE_MAX_COUNT and DATAPROC_COMPUTE_PREEMPTIBLE need DATAPROC_COMPUTE_COUNT")
        if self.compute_max_count and self.compute_max_count < self.compute_count:
            raise ValueError("DATAPROC_COMPUTE_MAX_COUNT must not be below DATAPROC_COMPUTE_COUNT")
        return self

    def node_groups(self) -> list[tuple[str, str, int, int, str]]:
        """(preset, disk type, disk size in GB, hosts, role) of each group of nodes, as asked for."""
        groups: list[tuple[str, str, int, int, str]] = []
        for role, count in (("master", 1), ("data", self.data_count), ("compute", self.compute_count)):
            if count:
                preset, disk_type, size_gb = (
                    getattr(self, f"{role}_{name}") for name in ("preset", "disk_type", "disk_size_gb")
                )
                groups.append((preset, disk_type, size_gb, count, role))
        return groups


def slug(text: str, length: int) -> str:
    """`text` as a label or a name may hold it: lower-case letters, digits and ``-``, at most `length` characters.

    What had to be changed gets a hash of the original, so that different texts stay different.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if plain == text and len(plain) <= length:
        return plain
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain[: length - 9].strip('-')}-{digest}".lstrip("-")


def cluster_name(deployment: str, run_id: str, attempt: int) -> str:
    """Name of a run's cluster: the same for the same run and attempt, so that a second create finds the first."""
    return f"mlp-{slug(deployment, 20)}-{slug(run_id, 32)[:32].strip('-')}-{attempt}"


def job_name(job: str, label: str, attempt: int) -> str:
    """Name of a job within its run's cluster."""
    return f"{slug(job.replace('_', '-'), 20)}-{slug(label, 30)}-{attempt}".replace("--", "-")


class DataprocApi:
    """Calls of the API that are repeated where that helps, under deadlines, with errors that say what to do.

    Args:
        endpoint: host:port of another installation of the API.
        root_certificates_file: PEM file of the authorities that the API's certificate comes from.
        service_account_key_file: authorized key; without it and without a token, the VM's metadata service is asked.
        iam_token: a token, used as it is.
        retry_for_s: how long a call is repeated before its error counts.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        root_certificates_file: str | Path | None = None,
        service_account_key_file: str | Path | None = None,
        iam_token: str | None = None,
        clock: Clock | None = None,
        retry_for_s: float = RETRY_FOR_S,
    ) -> None:
        self.retry_for_s = retry_for_s
        self._endpoint = endpoint
        self._root_certificates_file = root_certificates_file
        self._key_file = service_account_key_file
        self._iam_token = iam_token
        self.clock = clock or Clock()
        self._sdk: Any = None
        self._has_worked = False

    # clusters

    def create_cluster(self, spec: ClusterSpec, name: str, labels: Mapping[str, str]) -> tuple[str, str]:
        """Ask for a cluster; returns its id and the id of the operation, before there is a cluster to use.

        A cluster of this name that has the same `labels` (expires-at aside) is taken over: an earlier call made it,
        whose answer was lost; then the id of the operation is "".

        Raises:
            DataprocError: the API refuses, or the name is taken by somebody else's cluster. Without a code, a cluster
                may be there all the same.
        """
        from yandex.cloud.dataproc.v1 import cluster_service_pb2 as messages
        from yandex.cloud.dataproc.v1.cluster_service_pb2_grpc import ClusterServiceStub

        request = create_request(spec, name, labels)
        calls = 0

        def create() -> Any:
            nonlocal calls
            calls += 1
            return self._call_once(ClusterServiceStub, "Create", request, f"create cluster {name}")

        try:
            try:
                operation = self._repeat(create, RETRYABLE_CREATE)
            except DataprocError as error:
                if error.code != "ALREADY_EXISTS":
                    raise
                return self._own_cluster(spec.folder_id, name, labels), ""
        except DataprocError as error:
            if calls > 1:
                # What the first call may have made is still there, whatever the last one says.
                raise DataprocError(str(error)) from None
            raise
        metadata = messages.CreateClusterMetadata()
        if not operation.metadata.Unpack(metadata) or not metadata.cluster_id:
            raise DataprocError(f"create cluster {name}: the API's answer names no cluster")
        return metadata.cluster_id, operation.id

    def _own_cluster(self, folder_id: str, name: str, labels: Mapping[str, str]) -> str:
        for cluster in self.list_clusters(folder_id, name=name):
            if cluster.name != name or not cluster.carries(labels):
                continue
            if cluster.status in COMING | USABLE:
                return cluster.id
            # No refusal, hence no code: the caller's cluster is there, and has to be deleted.
            raise DataprocError(f"cluster {name} ({cluster.id}) of an earlier call is {cluster.status}")
        raise DataprocError(
            f"the name {name} is taken by a cluster that this run did not make; the platform leaves it alone",
            "ALREADY_EXISTS",
        )

    def get_cluster(self, cluster_id: str) -> Cluster | None:
        """The cluster, or None if there is none (any more). Raises DataprocError for a state that nobody knows."""
        from yandex.cloud.dataproc.v1.cluster_service_pb2 import GetClusterRequest
        from yandex.cloud.dataproc.v1.cluster_service_pb2_grpc import ClusterServiceStub

        try:
            found = self._call(ClusterServiceStub, "Get", GetClusterRequest(cluster_id=cluster_id), what="get cluster")
        except DataprocError as error:
            if error.code == "NOT_FOUND":
                return None
            raise
        return _cluster(found)

    def list_clusters(self, folder_id: str, *, name: str | None = None) -> Iterator[Cluster]:
        """The folder's clusters, everybody's, in whatever state. The API filters by name only."""
        from yandex.cloud.dataproc.v1.cluster_service_pb2 import ListClustersRequest
        from yandex.cloud.dataproc.v1.cluster_service_pb2_grpc import ClusterServiceStub

        request = ListClustersRequest(folder_id=folder_id, page_size=PAGE_SIZE)
        if name is not None:
            request.filter = f'name="{name}"'
        for page in self._pages(ClusterServiceStub, request, "list clusters"):
            yield from (_cluster(found, known_state=False) for found in page.clusters)

    def wait_until_usable(
        self, cluster_id: str, operation_id: str, *, timeout_s: float, poll_s: float, say: Callable[[str], None]
    ) -> None:
        """Wait until the cluster runs. The state of the cluster decides: a finished operation does not say that.

        Raises:
            DataprocError: the cluster cannot be used, or cannot in time. It is still there and has to be deleted.
        """
        failed: str | None = None

        def look() -> bool | None:
            nonlocal failed
            # The operation may say why before the cluster does.
            failed = failed or self._operation_error(operation_id)
            cluster = self.get_cluster(cluster_id)
            say(f"cluster {cluster_id}: {cluster.status if cluster else 'gone'}")
            if cluster is None or cluster.status in UNUSABLE or failed:
                reason = failed or "the API does not say why"
                state = cluster.status if cluster else "gone"
                raise DataprocError(f"cluster {cluster_id} could not be created: {reason} (its state: {state})")
            return True if cluster.status in USABLE else None

        self.wait(look, timeout_s=timeout_s, poll_s=poll_s, what=f"cluster {cluster_id} to be created")

    def _operation_error(self, operation_id: str) -> str | None:
        """Error of an operation that has ended in one; None where it cannot be read: the cluster's state decides."""
        from yandex.cloud.operation.operation_service_pb2 import GetOperationRequest
        from yandex.cloud.operation.operation_service_pb2_grpc import OperationServiceStub

        if not operation_id:
            return None
        try:
            operation = self._call(
                OperationServiceStub, "Get", GetOperationRequest(operation_id=operation_id), what="get operation"
            )
        except DataprocError as error:
            log.warning("%s; going by the cluster's state alone", error)
            return None
        return operation.error.message or None if operation.done and operation.HasField("error") else None

    def request_deletion(self, cluster_id: str) -> bool:
        """Ask for the cluster's deletion. Fine if it is gone or on its way; returns whether it was there to delete."""
        from yandex.cloud.dataproc.v1.cluster_service_pb2 import DeleteClusterRequest
        from yandex.cloud.dataproc.v1.cluster_service_pb2_grpc import ClusterServiceStub

        request = DeleteClusterRequest(cluster_id=cluster_id)
        try:
            self._call(ClusterServiceStub, "Delete", request, what=f"delete cluster {cluster_id}")
        except DataprocError as error:
            if error.code == "NOT_FOUND":
                return False
            if error.code == "FAILED_PRECONDITION":
                cluster = self.get_cluster(cluster_id)
                if cluster is None or cluster.status == "STOPPING":
                    return cluster is not None
            raise
        return True

    def delete_cluster(self, cluster_id: str, *, timeout_s: float, poll_s: float, say: Callable[[str], None]) -> None:
        """Delete the cluster and wait until it is gone; asks again while the API refuses.

        Raises:
            DataprocError: it is still there after `timeout_s`, or may not be deleted at all.
        """
        refusal = ""

        def ask() -> None:
            nonlocal refusal
            try:
                self.request_deletion(cluster_id)
            except DataprocError as error:
                if error.code in FINAL:
                    raise
                refusal = f": {error}"
                say(f"{error}; asking again")

        def look() -> bool | None:
            nonlocal refusal
            try:
                cluster = self.get_cluster(cluster_id)
            except DataprocError as error:
                if error.code in FINAL:
                    raise
                refusal = f": {error}"
                say(str(error))
                return None
            if cluster is None:
                return True
            say(f"cluster {cluster_id}: {cluster.status}")
            if cluster.status != "STOPPING":
                ask()
            return None

        ask()
        try:
            self.wait(look, timeout_s=timeout_s, poll_s=poll_s, what=f"cluster {cluster_id} to be deleted")
        except WaitTimeout as error:
            raise DataprocError(f"{error}{refusal}") from None

    # jobs

    def submit_job(self, cluster_id: str, name: str, job: PysparkJob) -> str:
        """Start a PySpark job, or find the one of this name that an earlier call has started; returns its id."""
        from google.protobuf.json_format import ParseDict
        from yandex.cloud.dataproc.v1.job_service_pb2 import CreateJobMetadata, CreateJobRequest
        from yandex.cloud.dataproc.v1.job_service_pb2_grpc import JobServiceStub

        request = ParseDict(
            {
                "cluster_id": cluster_id,
                "name": name,
                "pyspark_job": {
                    "main_python_file_uri": job.main_python_file_uri,
                    "python_file_uris": job.python_file_uris,
                    "args": job.args,
                    "properties": dict(job.properties),
                },
            },
            CreateJobRequest(),
        )

        def find() -> str | None:
            return next((found.id for found in self.list_jobs(cluster_id, name=name) if found.name == name), None)

        def create() -> str:
            operation = self._call(JobServiceStub, "Create", request, codes=set(), what=f"submit job {name}")
            metadata = CreateJobMetadata()
            if not operation.metadata.Unpack(metadata) or not metadata.job_id:
                raise DataprocError(f"submit job {name}: the API's answer names no job")
            return metadata.job_id

        # A job has no unique name, and one whose answer was lost may run: look before each try.
        return self._repeat(lambda: find() or create(), RETRYABLE_CREATE)

    def get_job(self, cluster_id: str, job_id: str) -> Job:
        """The job. Raises DataprocError: there is none, or it is in a state that nobody knows."""
        from yandex.cloud.dataproc.v1.job_service_pb2 import GetJobRequest
        from yandex.cloud.dataproc.v1.job_service_pb2_grpc import JobServiceStub

        return _job(
            self._call(JobServiceStub, "Get", GetJobRequest(cluster_id=cluster_id, job_id=job_id), what="get job")
        )

    def list_jobs(self, cluster_id: str, *, name: str | None = None) -> Iterator[Job]:
        """The cluster's jobs."""
        from yandex.cloud.dataproc.v1.job_service_pb2 import ListJobsRequest
        from yandex.cloud.dataproc.v1.job_service_pb2_grpc import JobServiceStub

        request = ListJobsRequest(cluster_id=cluster_id, page_size=PAGE_SIZE)
        if name is not None:
            request.filter = f'name="{name}"'
        for page in self._pages(JobServiceStub, request, "list jobs"):
            yield from map(_job, page.jobs)

    def cancel_job(self, cluster_id: str, job_id: str) -> None:
        """Ask a job to end. Fine if it, or its cluster, has ended already."""
        from yandex.cloud.dataproc.v1.job_service_pb2 import CancelJobRequest
        from yandex.cloud.dataproc.v1.job_service_pb2_grpc import JobServiceStub

        request = CancelJobRequest(cluster_id=cluster_id, job_id=job_id)
        try:
            self._call(JobServiceStub, "Cancel", request, what=f"cancel job {job_id}")
        except DataprocError as error:
            if error.code not in ("NOT_FOUND", "FAILED_PRECONDITION"):
                raise

    def driver_log(self, cluster_id: str, job_id: str) -> DriverLog:
        """The job's driver log, to be read as it grows."""
        return DriverLog(self, cluster_id, job_id)

    def read_log_page(self, cluster_id: str, job_id: str, page_token: str) -> tuple[str, str]:
        """Content of a page of a job's driver log, and the token of the next page, "" if there is none yet."""
        from yandex.cloud.dataproc.v1.job_service_pb2 import ListJobLogRequest
        from yandex.cloud.dataproc.v1.job_service_pb2_grpc import JobServiceStub

        request = ListJobLogRequest(
            cluster_id=cluster_id, job_id=job_id, page_size=LOG_PAGE_BYTES, page_token=page_token
        )
        # Best effort, and asked again at the next poll anyway.
        page = self._call(JobServiceStub, "ListLog", request, codes=set(), what=f"log of job {job_id}")
        return page.content, page.next_page_token

    # waiting and calling

    def wait(self, look: Callable[[], Any], *, timeout_s: float, poll_s: float, what: str) -> Any:
        """Call `look` until it gives something; pauses grow from a fifth of `poll_s` to `poll_s`, give or take 20 %.

        Raises WaitTimeout after `timeout_s`.
        """
        started = self.clock.monotonic()
        pause = poll_s / 5
        while True:
            found = look()
            if found is not None:
                return found
            left = started + timeout_s - self.clock.monotonic()
            if left <= 0:
                raise WaitTimeout(f"waited {timeout_s:.0f} s in vain for {what}")
            self.clock.sleep(min(left, pause * random.uniform(0.8, 1.2)))  # noqa: S311 - jitter
            pause = min(poll_s, pause * 1.5)

    def _repeat(self, call: Callable[[], Any], codes: Any) -> Any:
        """The call's result; made again after one of `codes`, for `retry_for_s`, with growing, jittered pauses."""
        started, pause = self.clock.monotonic(), 1.0
        while True:
            try:
                return call()
            except DataprocError as error:
                if error.code not in codes or self.clock.monotonic() - started + pause > self.retry_for_s:
                    raise
                log.warning("%s; trying again in %.0f s", error, pause)
            self.clock.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause = min(LARGEST_PAUSE_S, pause * 2)

    def _call(self, stub: Any, method: str, request: Any, *, what: str, codes: Any = None) -> Any:
        def call() -> Any:
            return _uninterrupted(lambda: self._call_once(stub, method, request, what))

        return self._repeat(call, RETRYABLE if codes is None else codes)

    def _call_once(self, stub: Any, method: str, request: Any, what: str) -> Any:
        import grpc

        for attempt in (1, 2):
            try:
                client = self._connect().client(stub)
                answer = getattr(client, method)(request, timeout=CALL_TIMEOUT_S)
                self._has_worked = True
                return answer
            except grpc.RpcError as error:
                code, details = self._reason(error)
                renewable = self._has_worked and (self._key_file or not self._iam_token)
                if code == "UNAUTHENTICATED" and attempt == 1 and renewable:
                    # The SDK keeps a token for some seconds, in which it may end: get another one.
                    self._sdk = None
                    _sdk.cache_clear()
                    continue
                raise DataprocError(_explain(what, code, details), code) from None
            except (KeyError, RuntimeError, ValueError) as error:
                # So the SDK says that the key is unusable, or that the endpoint has no such service.
                raise DataprocError(f"{what}: {error} ({ADVICE['UNAUTHENTICATED']}, and YC_API_ENDPOINT)") from None
        raise AssertionError("unreachable")

    def _reason(self, error: grpc.RpcError) -> tuple[str, str]:
        """Status code and details of an error; of the attempt to sign in, if it is that which failed."""
        code, details = error.code().name, error.details() or ""
        if not details.startswith(NO_TOKEN):
            return code, details
        details = details.removeprefix(NO_TOKEN)
        if refusal := re.search(r'StatusCode\.(\w+)\s+details = "(.*?)"\s', details, re.DOTALL):
            return refusal[1], refusal[2]
        # A metadata service that has answered before will again; one that has not is not there, and a key stays bad.
        is_away = self._has_worked and not self._key_file
        return "UNAVAILABLE" if is_away else "UNAUTHENTICATED", f"cannot sign in: {details}"

    def _connect(self) -> Any:
        if self._sdk is None:
            certificates = self._root_certificates_file
            self._sdk = _sdk(
                self._endpoint or None,
                _read(certificates, "YC_ROOT_CERTIFICATES_FILE") if certificates else None,
                json.dumps(_authorized_key(self._key_file)) if self._key_file else None,
                None if self._key_file else self._iam_token or None,
            )
        return self._sdk

    def _pages(self, stub: Any, request: Any, what: str) -> Iterator[Any]:
        seen = set()
        while True:
            page = self._call(stub, "List", request, what=what)
            yield page
            request.page_token = page.next_page_token
            if not request.page_token:
                return
            if request.page_token in seen:
                raise DataprocError(f"{what}: the API's pages go in a circle")
            seen.add(request.page_token)


#: What the thread for calls of the API serves, once there is one.
_calls: list[SimpleQueue[Any]] = []


def _uninterrupted(call: Callable[[], Any]) -> Any:
    """The result of `call`, or what it raises; made in a thread where no signal cuts short what gRPC does.

    Handlers of signals run in the main thread, wherever it is. In gRPC's callback for credentials, what they raise
    corrupts the heap: the process dies, and its cluster stays. Here the main thread only waits, for a queue that may be
    left at any instant (a ``Future`` may not: its lock could stay locked). There is one thread for all clients of a
    process, so a call that nobody waits for any more ends before the next begins: a cluster that was being created is
    there when it is looked for by its name.
    """
    if not _calls:
        calls: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=_serve, args=(calls,), name="dataproc-calls", daemon=True).start()
        _calls.append(calls)
    answer: SimpleQueue[Any] = SimpleQueue()
    _calls[0].put((call, answer))
    value, error = answer.get()
    if error is None:
        return value
    try:
        raise error
    finally:
        # The error's traceback has this frame: they would keep each other alive.
        del error


def _serve(calls: SimpleQueue[Any]) -> None:
    while True:
        call, answer = calls.get()
        try:
            answer.put((call(), None))
        except BaseException as error:
            answer.put((None, error))
        # Until the next call, nothing is kept alive here.
        del call, answer


class WaitTimeout(DataprocError):
    """What was waited for did not come in time."""


class DriverLog:
    """A job's driver log, read from where the last reading ended.

    The last page grows, so it is read again until there is a next one.
    """

    def __init__(self, api: DataprocApi, cluster_id: str, job_id: str) -> None:
        self._api, self._cluster_id, self._job_id = api, cluster_id, job_id
        self._token = ""
        self._read = 0
        self._seen = {""}
        # What a reading that failed at a later page has got.
        self._new: list[str] = []

    def read(self) -> str:
        """What came since the last call. Raises DataprocError if a page cannot be read; the next call tries again."""
        while True:
            content, following = self._api.read_log_page(self._cluster_id, self._job_id, self._token)
            self._new.append(content[self._read :])
            self._read = max(self._read, len(content))
            if not following or following in self._seen:
                text, self._new = "".join(self._new), []
                return text
            self._seen.add(following)
            self._token, self._read = following, 0


def create_request(spec: ClusterSpec, name: str, labels: Mapping[str, str]) -> Any:
    """The API's CreateClusterRequest. Raises DataprocError for a service that the API does not have."""
    from google.protobuf.json_format import ParseDict, ParseError
    from yandex.cloud.dataproc.v1.cluster_service_pb2 import CreateClusterRequest

    def subcluster(role: str, count: int) -> dict[str, Any]:
        return {
            "name": {"master": "master", "data": "data", "compute": "compute"}[role],
            "role": {"master": "MASTERNODE", "data": "DATANODE", "compute": "COMPUTENODE"}[role],
            "resources": {
                "resource_preset_id": getattr(spec, f"{role}_preset"),
                "disk_type_id": getattr(spec, f"{role}_disk_type"),
                "disk_size": getattr(spec, f"{role}_disk_size_gb") << 30,
            },
            "subnet_id": spec.subnet_id,
            "hosts_count": count,
            "assign_public_ip": spec.public_ip and role == "master",
        }

    subclusters = [subcluster(role, count) for _, _, _, count, role in spec.node_groups()]
    if spec.compute_count and (spec.compute_max_count or spec.compute_preemptible):
        subclusters[-1]["autoscaling_config"] = {
            "max_hosts_count": max(spec.compute_count, spec.compute_max_count),
            "preemptible": spec.compute_preemptible,
            "measurement_duration": f"{spec.compute_measurement_s}s",
            "warmup_duration": f"{spec.compute_warmup_s}s",
            "stabilization_duration": f"{spec.compute_stabilization_s}s",
            "cpu_utilization_target": spec.compute_cpu_target,
            "decommission_timeout": spec.compute_decommission_s,
        }
    request = {
        "folder_id": spec.folder_id,
        "name": name,
        "description": spec.description,
        "labels": {**spec.labels, **labels},
        "config_spec": {
            "version_id": spec.image_version,
            "hadoop": {
                "services": spec.services,
                "properties": spec.properties,
                "ssh_public_keys": [spec.ssh_public_key] if spec.ssh_public_key else [],
                "initialization_actions": [action.model_dump() for action in spec.initialization_actions],
                "oslogin_enabled": spec.oslogin,
            },
            "subclusters_spec": subclusters,
        },
        "zone_id": spec.zone,
        "service_account_id": spec.service_account_id,
        "autoscaling_service_account_id": spec.autoscaling_service_account_id,
        "bucket": spec.bucket,
        "ui_proxy": spec.ui_proxy,
        "log_group_id": spec.log_group_id,
        "host_group_ids": spec.host_group_ids,
        "security_group_ids": spec.security_group_ids,
        "environment": spec.environment or "ENVIRONMENT_UNSPECIFIED",
    }
    try:
        return ParseDict(request, CreateClusterRequest())
    except ParseError as error:
        raise DataprocError(f"the settings of the cluster do not fit the API: {error}", "INVALID_ARGUMENT") from None


def _status(found: Any) -> str:
    names = type(found).Status
    return names.Name(found.status) if found.status in names.values() else str(found.status)


def _cluster(found: Any, *, known_state: bool = True) -> Cluster:
    status = _status(found)
    if known_state and status not in COMING | USABLE | UNUSABLE:
        raise DataprocError(f"cluster {found.id} is in a state that this version does not know: {status}")
    return Cluster(found.id, found.name, status, dict(found.labels), found.created_at.seconds)


def _job(found: Any) -> Job:
    status = _status(found)
    if status not in UNFINISHED_JOB | FINISHED_JOB:
        raise DataprocError(f"job {found.id} is in a state that this version does not know: {status}")
    return Job(found.id, found.name, status, found.application_info.id)


def _explain(what: str, code: str, details: str) -> str:
    details = " ".join(details.split())[:500]
    advice = f" ({ADVICE[code]})" if code in ADVICE else ""
    return f"{what}: {code}: {details}{advice}"


@lru_cache(maxsize=4)
def _sdk(endpoint: str | None, root_certificates: bytes | None, key: str | None, iam_token: str | None) -> Any:
    """The SDK with these options. One for all clients of a process: an SDK never closes its connections."""
    import yandexcloud

    class Deadlines(yandexcloud.RetryPolicy):
        """The SDK's way to gRPC's service configuration, for the calls that it makes by itself and without a limit."""

        def to_json(self) -> str:
            return json.dumps({"methodConfig": [{"name": [{}], "timeout": f"{CALL_TIMEOUT_S}s"}]})

    options = {
        "endpoint": endpoint,
        "root_certificates": root_certificates,
        "service_account_key": json.loads(key) if key else None,
        "iam_token": iam_token,
    }
    given = {name: value for name, value in options.items() if value is not None}
    return yandexcloud.SDK(user_agent=OWNER, retry_policy=Deadlines(), **given)


def _read(path: str | Path, variable: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataprocError(f"{variable}: cannot read {path}: {error.strerror}") from None


def _authorized_key(path: str | Path) -> dict[str, str]:
    variable = "YC_SERVICE_ACCOUNT_KEY_FILE"
    try:
        key = json.loads(_read(path, variable))
    except ValueError:
        key = None
    wanted = ("id", "service_account_id", "private_key")
    if not isinstance(key, dict) or not all(isinstance(key.get(name), str) for name in wanted):
        raise DataprocError(
            f"{variable}: {path} is no authorized key: it takes the JSON that `yc iam key create` writes, "
            f"with {', '.join(wanted)}"
        )
    return key
