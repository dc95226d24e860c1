"""Client of the Yandex Data Proc API: clusters, jobs and their logs. Independent of Dagster.

Stubs, connections and credentials come from the official SDK. Calls, retries and waits are implemented here, because
the SDK's waits have neither a deadline nor cancellation, and its retries last only seconds and ignore that a create
call whose response was lost may have succeeded.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ml_platform.settings import ClusterSpec, NodeGroup

if TYPE_CHECKING:
    import grpc

log = logging.getLogger(__name__)

OWNER = "ml-platform"

#: States of a cluster on its way to RUNNING.
STARTING_STATES = {"CREATING", "STARTING"}

#: States of unfinished and of finished jobs.
UNFINISHED_JOB = {"PROVISIONING", "PENDING", "RUNNING", "CANCELLING"}
FINISHED_JOB = {"DONE", "ERROR", "CANCELLED"}

#: Status codes after which a call is retried, and why.
RETRYABLE = {
    "UNAVAILABLE": "the service or the network is temporarily down",
    "DEADLINE_EXCEEDED": "the response did not arrive in time, but may on the next attempt",
    "ABORTED": "two calls conflicted; the API asks to retry",
    "INTERNAL": "an internal error of the service, usually transient",
    "RESOURCE_EXHAUSTED": "too many calls per second",
}

#: For create calls, RESOURCE_EXHAUSTED means an exhausted cloud quota, so retrying does not help.
RETRYABLE_CREATE = RETRYABLE.keys() - {"RESOURCE_EXHAUSTED"}

#: Status codes that retrying cannot change.
DEFINITE_FAILURES = {"PERMISSION_DENIED", "UNAUTHENTICATED", "INVALID_ARGUMENT"}

#: Advice to the user by status code.
ADVICE = {
    "UNAUTHENTICATED": "check YC_SERVICE_ACCOUNT_KEY_FILE or YC_IAM_TOKEN (a token expires after at most 12 hours)",
    "PERMISSION_DENIED": "grant the service account the roles in deploy/terraform/README.md, and check YC_FOLDER_ID",
    "RESOURCE_EXHAUSTED": "a cloud quota is exhausted: request an increase or use a smaller cluster (DATAPROC_*)",
    "UNAVAILABLE": "check YC_API_ENDPOINT, YC_ROOT_CERTIFICATES_FILE and the network",
    "DEADLINE_EXCEEDED": "check YC_API_ENDPOINT and the network",
    "INVALID_ARGUMENT": "the API rejects a setting: see the field that it names, and DATAPROC_* in .env.example",
}

#: Prefix of the details of UNAVAILABLE if the SDK could not get a token.
TOKEN_ERROR_PREFIX = "Getting metadata from plugin failed with error: "

CALL_TIMEOUT_S = 30.0
#: How long a failing call is retried before its error is raised.
RETRY_FOR_S = 180.0
MAX_RETRY_PAUSE_S = 30.0
PAGE_SIZE = 100
LOG_PAGE_BYTES = 1 << 20

#: SDK modules that define the services, without the suffixes ``_pb2`` and ``_pb2_grpc``.
_SERVICE_MODULES = {
    "ClusterService": "yandex.cloud.dataproc.v1.cluster_service",
    "JobService": "yandex.cloud.dataproc.v1.job_service",
    "OperationService": "yandex.cloud.operation.operation_service",
}


class DataprocError(Exception):
    """An API call failed, or its response is unusable. `code` is the gRPC status code, if any."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class WaitTimeout(DataprocError):
    """A wait timed out."""


@dataclass(frozen=True)
class Cluster:
    """A cluster as described by the API. `created_at` is in Unix seconds by the API's clock."""

    id: str
    name: str
    status: str
    labels: dict[str, str]
    created_at: float


@dataclass(frozen=True)
class Job:
    """A job as described by the API; `yarn_application` is "" until YARN has accepted it."""

    id: str
    name: str
    status: str
    yarn_application: str


def slug(text: str, length: int) -> str:
    """Convert `text` to a valid label or name: lower-case letters, digits and ``-``, at most `length` characters.

    A hash of the original is appended if the text had to change, so that different texts stay different.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if plain == text and len(plain) <= length:
        return plain
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain[: length - 9].strip('-')}-{digest}".lstrip("-")


def cluster_name(deployment: str, run_id: str, attempt: int) -> str:
    """Name of a run's cluster; deterministic per run and attempt, so that a repeated create finds the first."""
    return f"mlp-{slug(deployment, 20)}-{slug(run_id, 32)[:32].strip('-')}-{attempt}"


def job_name(job: str, label: str, attempt: int) -> str:
    """Name of a job within its run's cluster."""
    return f"{slug(job.replace('_', '-'), 20)}-{slug(label, 30)}-{attempt}".replace("--", "-")


@dataclass
class DataprocApi:
    """API client with retries, deadlines and errors that say what to do.

    Args:
        endpoint: host:port of another installation of the API.
        root_certificates_file: PEM file of the CAs that signed the API's certificate.
        service_account_key_file: authorized key; without it and without a token, the VM's metadata service is used.
        iam_token: a token, used as it is.
        clock: the module ``time``, or an object with its functions time, monotonic and sleep.
        retry_for_s: how long a failing call is retried before its error is raised.
    """

    endpoint: str | None = None
    root_certificates_file: str | None = None
    service_account_key_file: str | None = None
    iam_token: str | None = field(default=None, repr=False)
    clock: Any = time
    retry_for_s: float = RETRY_FOR_S
    _sdk: Any = field(default=None, init=False, repr=False)
    _has_succeeded: bool = field(default=False, init=False, repr=False)

    # clusters

    def create_cluster(self, spec: ClusterSpec, name: str, labels: Mapping[str, str]) -> tuple[str, str]:
        """Request a cluster; returns its id and the operation's id without waiting for the cluster.

        An existing cluster with this name and `labels` is adopted: it comes from an earlier call whose response was
        lost. The operation id is "" then.

        Raises:
            DataprocError: the call failed, or a foreign cluster has the name. Even then an earlier attempt may have
                created a cluster; check with `find_cluster`.
        """
        request = create_request(spec, name, labels)
        try:
            operation = self._call("ClusterService.Create", f"create cluster {name}", request, codes=RETRYABLE_CREATE)
        except DataprocError as error:
            if error.code != "ALREADY_EXISTS":
                raise
            cluster = self.find_cluster(spec.folder_id, name, labels)
            if cluster is None:
                raise DataprocError(
                    f"the name {name} is taken by a cluster that this run did not make; the platform leaves it alone",
                    error.code,
                ) from None
            return cluster.id, ""
        return _created_id("ClusterService", operation, "CreateClusterMetadata", "cluster_id"), operation.id

    def find_cluster(self, folder_id: str, name: str, labels: Mapping[str, str]) -> Cluster | None:
        """Cluster with this name and these labels, or None. Names are unique within a folder.

        The label expires-at is ignored, because it differs between attempts to create the same cluster.
        """
        wanted = {label: value for label, value in labels.items() if label != "expires-at"}
        for cluster in self.list_clusters(folder_id, name=name):
            if cluster.name == name and wanted.items() <= cluster.labels.items():
                return cluster
        return None

    def get_cluster(self, cluster_id: str) -> Cluster | None:
        """Cluster by id; None if it does not exist (any more)."""
        try:
            return _cluster(self._call("ClusterService.Get", "get cluster", {"cluster_id": cluster_id}))
        except DataprocError as error:
            if error.code == "NOT_FOUND":
                return None
            raise

    def list_clusters(self, folder_id: str, *, name: str | None = None) -> Iterator[Cluster]:
        """All clusters in the folder, including foreign ones. The API can filter by name only."""
        for page in self._pages("ClusterService.List", "list clusters", {"folder_id": folder_id}, name):
            yield from map(_cluster, page.clusters)

    def wait_until_running(
        self, cluster_id: str, operation_id: str, *, timeout_s: float, poll_s: float, say: Callable[[str], None]
    ) -> None:
        """Wait until the cluster is RUNNING; a finished operation alone does not imply that.

        Raises:
            DataprocError: the cluster failed or did not start in time. It still exists and must be deleted.
        """
        reason: str | None = None

        def poll() -> bool | None:
            nonlocal reason
            # The operation may report the error before the cluster's state changes.
            reason = reason or self._operation_error(operation_id)
            cluster = self.get_cluster(cluster_id)
            state = cluster.status if cluster else "gone"
            say(f"cluster {cluster_id}: {state}")
            if reason or state not in {*STARTING_STATES, "RUNNING"}:
                reason = reason or "the API does not say why"
                raise DataprocError(f"cluster {cluster_id} could not be created: {reason} (its state: {state})")
            return True if state == "RUNNING" else None

        self.wait(poll, timeout_s=timeout_s, poll_s=poll_s, what=f"cluster {cluster_id} to be created")

    def _operation_error(self, operation_id: str) -> str | None:
        """Error of a failed operation; None if it has not failed or cannot be read."""
        if not operation_id:
            return None
        try:
            operation = self._call("OperationService.Get", "get operation", {"operation_id": operation_id})
        except DataprocError as error:
            log.warning("%s; relying on the cluster's state", error)
            return None
        return operation.error.message or None

    def request_deletion(self, cluster_id: str) -> None:
        """Request the deletion of the cluster; no error if it is gone or already being deleted."""
        try:
            self._call("ClusterService.Delete", f"delete cluster {cluster_id}", {"cluster_id": cluster_id})
        except DataprocError as error:
            if error.code == "NOT_FOUND":
                return
            if error.code == "FAILED_PRECONDITION":
                cluster = self.get_cluster(cluster_id)
                if cluster is None or cluster.status == "STOPPING":
                    return
            raise

    def delete_cluster(self, cluster_id: str, *, timeout_s: float, poll_s: float, say: Callable[[str], None]) -> None:
        """Delete the cluster and wait until it is gone, repeating the request after an error.

        Raises:
            DataprocError: it still exists after `timeout_s`, or the error is permanent.
        """
        state, last_error = "", ""

        def poll() -> bool | None:
            nonlocal state, last_error
            try:
                if state != "STOPPING":
                    self.request_deletion(cluster_id)
                cluster = self.get_cluster(cluster_id)
            except DataprocError as error:
                if error.code in DEFINITE_FAILURES:
                    raise
                last_error = f": {error}"
                say(f"{error}; trying again")
                return None
            if cluster is None:
                return True
            state = cluster.status
            say(f"cluster {cluster_id}: {state}")
            return None

        try:
            self.wait(poll, timeout_s=timeout_s, poll_s=poll_s, what=f"cluster {cluster_id} to be deleted")
        except WaitTimeout as error:
            raise DataprocError(f"{error}{last_error}") from None

    # jobs

    def submit_job(self, cluster_id: str, name: str, pyspark_job: Mapping[str, Any]) -> str:
        """Start a PySpark job, or find the one with this name from an earlier call; returns its id.

        `pyspark_job` has the fields of the API's PysparkJob, with ``s3a://`` URIs.
        """
        request = {"cluster_id": cluster_id, "name": name, "pyspark_job": pyspark_job}

        def find() -> str | None:
            return next((job.id for job in self.list_jobs(cluster_id, name=name) if job.name == name), None)

        def create() -> str:
            operation = self._call("JobService.Create", f"submit job {name}", request, codes=())
            return _created_id("JobService", operation, "CreateJobMetadata", "job_id")

        # Job names are not unique, and a job may run although its response was lost: look for it before each attempt.
        return self._retry(lambda: find() or create(), RETRYABLE_CREATE)

    def get_job(self, cluster_id: str, job_id: str) -> Job:
        """Job by id. Raises DataprocError if it does not exist or is in an unknown state."""
        return _job(self._call("JobService.Get", "get job", {"cluster_id": cluster_id, "job_id": job_id}))

    def list_jobs(self, cluster_id: str, *, name: str | None = None) -> Iterator[Job]:
        """Jobs of the cluster."""
        for page in self._pages("JobService.List", "list jobs", {"cluster_id": cluster_id}, name):
            yield from map(_job, page.jobs)

    def cancel_job(self, cluster_id: str, job_id: str) -> None:
        """Request the cancellation of a job; no error if the job has finished or its cluster is gone."""
        try:
            self._call("JobService.Cancel", f"cancel job {job_id}", {"cluster_id": cluster_id, "job_id": job_id})
        except DataprocError as error:
            if error.code not in ("NOT_FOUND", "FAILED_PRECONDITION"):
                raise

    def follow_log(self, cluster_id: str, job_id: str) -> Iterator[str]:
        """Driver log of the job as an endless iterator: each item is the text added since the previous one.

        An item is "" if nothing was added. If a page cannot be read, the next item has the rest.
        """
        token, consumed, text = "", 0, ""
        while True:
            request = {"cluster_id": cluster_id, "job_id": job_id, "page_size": LOG_PAGE_BYTES, "page_token": token}
            next_token = ""
            try:
                page = self._call("JobService.ListLog", f"log of job {job_id}", request, codes=())
            except DataprocError as error:
                log.debug("%s", error)
            else:
                text += page.content[consumed:]
                # The last page grows, so it is read again until it has a successor.
                consumed = max(consumed, len(page.content))
                next_token = page.next_page_token
            if next_token in ("", token):
                yield text
                text = ""
            else:
                token, consumed = next_token, 0

    # waiting and calling

    def wait(self, poll: Callable[[], Any], *, timeout_s: float, poll_s: float, what: str) -> Any:
        """Call `poll` until it returns a result other than None; pauses grow from `poll_s` / 5 to `poll_s` (±20%).

        Raises WaitTimeout after `timeout_s`.
        """
        started = self.clock.monotonic()
        pause = poll_s / 5
        while True:
            result = poll()
            if result is not None:
                return result
            remaining = started + timeout_s - self.clock.monotonic()
            if remaining <= 0:
                raise WaitTimeout(f"timed out after {timeout_s:.0f} s waiting for {what}")
            self.clock.sleep(min(remaining, pause * random.uniform(0.8, 1.2)))  # noqa: S311 - jitter
            pause = min(poll_s, pause * 1.5)

    def _retry(self, call: Callable[[], Any], codes: Collection[str]) -> Any:
        """Result of `call`, retried after one of `codes` for up to `retry_for_s`, with growing, jittered pauses."""
        started, pause = self.clock.monotonic(), 1.0
        while True:
            try:
                return call()
            except DataprocError as error:
                if error.code not in codes or self.clock.monotonic() - started + pause > self.retry_for_s:
                    raise
                log.warning("%s; trying again in %.0f s", error, pause)
            self.clock.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            pause = min(MAX_RETRY_PAUSE_S, pause * 2)

    def _call(self, method: str, what: str, fields: Mapping[str, Any], codes: Collection[str] = RETRYABLE) -> Any:
        """Response of a method such as ``ClusterService.Get``; `what` describes the call in errors."""
        return self._retry(lambda: _run_in_call_thread(lambda: self._call_once(method, what, fields)), codes)

    def _call_once(self, method: str, what: str, fields: Mapping[str, Any], *, renew: bool = True) -> Any:
        import grpc

        stub, request = _stub_and_request(method, fields)
        try:
            response = getattr(self._connect().client(stub), method.split(".")[1])(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            code, details = self._status_of(error)
            is_renewable = self._has_succeeded and (self.service_account_key_file or not self.iam_token)
            if code == "UNAUTHENTICATED" and renew and is_renewable:
                # The SDK caches a token for some seconds and may use it after it has expired: get a new one.
                self._sdk = None
                _sdk.cache_clear()
                return self._call_once(method, what, fields, renew=False)
            details = " ".join(details.split())[:500]
            advice = f" ({ADVICE[code]})" if code in ADVICE else ""
            raise DataprocError(f"{what}: {code}: {details}{advice}", code) from None
        except (KeyError, RuntimeError, ValueError) as error:
            # The SDK raises these for an unusable key, or for an endpoint without this service.
            raise DataprocError(
                f"{what}: cannot connect: {error} ({ADVICE['UNAUTHENTICATED']}, and YC_API_ENDPOINT)"
            ) from None
        self._has_succeeded = True
        return response

    def _status_of(self, error: grpc.RpcError) -> tuple[str, str]:
        """Status code and details of an error; if signing in failed, those of that call."""
        code, details = error.code().name, error.details() or ""
        if not details.startswith(TOKEN_ERROR_PREFIX):
            return code, details
        details = details.removeprefix(TOKEN_ERROR_PREFIX)
        if match := re.search(r'StatusCode\.(\w+)\s+details = "(.*?)"\s', details, re.DOTALL):
            return match[1], match[2]
        # A metadata service that has responded before is only temporarily down; otherwise this machine has none. A bad
        # key is permanent.
        is_temporary = self._has_succeeded and not self.service_account_key_file
        return "UNAVAILABLE" if is_temporary else "UNAUTHENTICATED", f"cannot sign in: {details}"

    def _connect(self) -> Any:
        if self._sdk is None:
            certificates = _read(self.root_certificates_file, "YC_ROOT_CERTIFICATES_FILE")
            key = _read(self.service_account_key_file, "YC_SERVICE_ACCOUNT_KEY_FILE")
            self._sdk = _sdk(self.endpoint, certificates, key, self.iam_token if key is None else None)
        return self._sdk

    def _pages(self, method: str, what: str, fields: dict[str, Any], name: str | None) -> Iterator[Any]:
        request = {**fields, "page_size": PAGE_SIZE, "filter": f'name="{name}"' if name else "", "page_token": ""}
        while True:
            page = self._call(method, what, request)
            yield page
            if page.next_page_token == request["page_token"] != "":
                raise DataprocError(f"{what}: the API returned a page that is its own next page")
            if not page.next_page_token:
                return
            request["page_token"] = page.next_page_token


@lru_cache(maxsize=1)
def _call_queue() -> SimpleQueue[Any]:
    """Queue of the thread that makes all calls of this process; the first use starts the thread."""
    calls: SimpleQueue[Any] = SimpleQueue()

    def serve() -> None:
        while True:
            call, result = calls.get()
            try:
                result.put((call(), None))
            except BaseException as error:
                result.put((None, error))
            # Do not keep references until the next call.
            del call, result

    threading.Thread(target=serve, name="dataproc-calls", daemon=True).start()
    return calls


def _run_in_call_thread(call: Callable[[], Any]) -> Any:
    """Run `call` in a thread where signal handlers cannot interrupt gRPC; returns its result or raises its error.

    Signal handlers run in the main thread at any point. An exception raised by one within gRPC's credentials callback
    corrupts the heap: the process dies, and its cluster stays. So the main thread only waits on a queue, which is safe
    to interrupt at any time (a ``Future`` is not: its lock could stay locked). All clients of a process share one
    thread, so an abandoned call finishes before the next one starts: a cluster whose creation was interrupted is
    already visible when it is looked up by name.
    """
    result: SimpleQueue[Any] = SimpleQueue()
    _call_queue().put((call, result))
    value, error = result.get()
    if error is None:
        return value
    try:
        raise error
    finally:
        # The error's traceback references this frame: break the reference cycle.
        del error


def create_request(spec: ClusterSpec, name: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """Fields of the API's CreateClusterRequest."""

    def subcluster(group: NodeGroup) -> dict[str, Any]:
        return {
            "name": group.role,
            "role": f"{group.role.upper()}NODE",
            "resources": {
                "resource_preset_id": group.preset,
                "disk_type_id": group.disk_type,
                "disk_size": group.disk_size_gb << 30,
            },
            "subnet_id": spec.subnet_id,
            "hosts_count": group.hosts,
            "assign_public_ip": spec.public_ip and group.role == "master",
        }

    subclusters = list(map(subcluster, spec.node_groups()))
    if spec.compute_max_count or spec.compute_preemptible:
        subclusters[-1]["autoscaling_config"] = {
            "max_hosts_count": max(spec.compute_count, spec.compute_max_count),
            "preemptible": spec.compute_preemptible,
            "measurement_duration": f"{spec.compute_measurement_s}s",
            "warmup_duration": f"{spec.compute_warmup_s}s",
            "stabilization_duration": f"{spec.compute_stabilization_s}s",
            "cpu_utilization_target": spec.compute_cpu_target,
            "decommission_timeout": spec.compute_decommission_s,
        }
    return {
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


def _stub_and_request(method: str, fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """SDK stub of a method such as ``ClusterService.Get``, and its request with `fields`.

    Raises DataprocError for a value that the API does not define, such as an unknown cluster service.
    """
    from google.protobuf.json_format import ParseDict, ParseError

    service, rpc = method.split(".")
    messages = importlib.import_module(f"{_SERVICE_MODULES[service]}_pb2")
    stubs = importlib.import_module(f"{_SERVICE_MODULES[service]}_pb2_grpc")
    request = messages.DESCRIPTOR.services_by_name[service].methods_by_name[rpc].input_type.name
    try:
        return getattr(stubs, f"{service}Stub"), ParseDict(fields, getattr(messages, request)())
    except ParseError as error:
        raise DataprocError(f"the cluster settings do not match the API: {error}", "INVALID_ARGUMENT") from None


def _created_id(service: str, operation: Any, metadata_type: str, id_field: str) -> str:
    """Id of the object that an operation creates, from its metadata."""
    metadata = getattr(importlib.import_module(f"{_SERVICE_MODULES[service]}_pb2"), metadata_type)()
    operation.metadata.Unpack(metadata)
    created: str = getattr(metadata, id_field)
    if not created:
        raise DataprocError(f"the API's answer to {service}.Create has no {id_field}")
    return created


def _status(message: Any) -> str:
    names = type(message).Status
    return names.Name(message.status) if message.status in names.values() else str(message.status)


def _cluster(message: Any) -> Cluster:
    return Cluster(message.id, message.name, _status(message), dict(message.labels), message.created_at.seconds)


def _job(message: Any) -> Job:
    status = _status(message)
    if status not in UNFINISHED_JOB | FINISHED_JOB:
        raise DataprocError(f"job {message.id} is in an unknown state: {status}")
    return Job(message.id, message.name, status, message.application_info.id)


@lru_cache(maxsize=4)
def _sdk(endpoint: str | None, root_certificates: bytes | None, key: bytes | None, iam_token: str | None) -> Any:
    """SDK with these options, shared by all clients of a process: an SDK never closes its connections."""
    import yandexcloud

    class Deadlines(yandexcloud.RetryPolicy):
        """Sets a timeout, by gRPC service configuration, for the calls that the SDK makes itself."""

        def to_json(self) -> str:
            return json.dumps({"methodConfig": [{"name": [{}], "timeout": f"{CALL_TIMEOUT_S}s"}]})

    return yandexcloud.SDK(
        user_agent=OWNER,
        retry_policy=Deadlines(),
        endpoint=endpoint,
        root_certificates=root_certificates,
        service_account_key=None if key is None else json.loads(key) or {},
        iam_token=iam_token,
    )


def _read(path: str | None, variable: str) -> bytes | None:
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise DataprocError(f"{variable}: cannot read {path}: {error.strerror}") from None
