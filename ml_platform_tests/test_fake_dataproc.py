"""The stand-in for the Data Proc API as the SDK sees it: the facts of the protocol that the platform relies on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
import yandexcloud
from google.protobuf.duration_pb2 import Duration
from yandex.cloud import validation_pb2
from yandex.cloud.dataproc.v1 import cluster_pb2, cluster_service_pb2, job_pb2, job_service_pb2, subcluster_pb2
from yandex.cloud.dataproc.v1.cluster_service_pb2_grpc import ClusterServiceStub
from yandex.cloud.dataproc.v1.job_service_pb2_grpc import JobServiceStub
from yandex.cloud.endpoint import api_endpoint_service_pb2
from yandex.cloud.endpoint.api_endpoint_service_pb2_grpc import ApiEndpointServiceStub
from yandex.cloud.iam.v1.iam_token_service_pb2 import CreateIamTokenRequest
from yandex.cloud.iam.v1.iam_token_service_pb2_grpc import IamTokenServiceStub
from yandex.cloud.operation import operation_service_pb2
from yandex.cloud.operation.operation_service_pb2_grpc import OperationServiceStub

from ml_platform.dev.cloud.fake_dataproc import FakeDataproc, JobScript, Quotas, SparkSubmit
from ml_platform.dev.cloud.proto_validation import within
from ml_platform.dev.cloud.s3_server import LocalS3
from ml_platform_tests.fakes_cloud import FakeClock
from ml_platform_tests.world import SHORT_LIVED_JAVA

GB = 1 << 30
CREATE_JOB = job_service_pb2.CreateJobRequest
ROLE = subcluster_pb2.Role
SERVICE = cluster_pb2.HadoopConfig.Service


class Client:
    """Stubs of the SDK, and shorthands for common calls."""

    def __init__(self, cloud: FakeDataproc, clock: FakeClock, **credentials: Any) -> None:
        if not credentials:
            credentials = {"service_account_key": json.loads(cloud.service_account_key_file.read_text())}
        self.cloud, self.clock = cloud, clock
        self.sdk = yandexcloud.SDK(
            endpoint=cloud.endpoint, root_certificates=cloud.root_certificates_file.read_bytes(), **credentials
        )
        self.clusters = self.sdk.client(ClusterServiceStub)
        self.jobs = self.sdk.client(JobServiceStub)
        self.operations = self.sdk.client(OperationServiceStub)

    def get(self, cluster_id: str) -> Any:
        return self.clusters.Get(cluster_service_pb2.GetClusterRequest(cluster_id=cluster_id))

    def state(self, cluster_id: str) -> str:
        return cluster_pb2.Cluster.Status.Name(self.get(cluster_id).status)

    def delete(self, cluster_id: str) -> Any:
        return self.clusters.Delete(cluster_service_pb2.DeleteClusterRequest(cluster_id=cluster_id))

    def listed(self, **fields: Any) -> Any:
        return self.clusters.List(cluster_service_pb2.ListClustersRequest(folder_id=self.cloud.folder_id, **fields))

    def operation(self, operation: Any) -> Any:
        return self.operations.Get(operation_service_pb2.GetOperationRequest(operation_id=operation.id))

    def ready_cluster(self) -> str:
        operation = self.clusters.Create(create_request(self.cloud))
        self.clock.sleep(self.cloud.create_seconds)
        return cluster_id_of(operation)

    def cancel(self, cluster_id: str, job_id: str) -> Any:
        return self.jobs.Cancel(job_service_pb2.CancelJobRequest(cluster_id=cluster_id, job_id=job_id))

    def job(self, cluster_id: str, job_id: str) -> Any:
        return self.jobs.Get(job_service_pb2.GetJobRequest(cluster_id=cluster_id, job_id=job_id))

    def job_state(self, cluster_id: str, job_id: str) -> str:
        return job_pb2.Job.Status.Name(self.job(cluster_id, job_id).status)

    def submit(self, cluster_id: str, **fields: Any) -> str:
        operation = self.jobs.Create(job_request(cluster_id, **fields))
        return job_id_of(operation)

    def log(self, cluster_id: str, job_id: str, **fields: Any) -> Any:
        request = job_service_pb2.ListJobLogRequest(cluster_id=cluster_id, job_id=job_id, **fields)
        return self.jobs.ListLog(request)


def unpack(any_message: Any, message: Any) -> Any:
    assert any_message.Unpack(message)
    return message


def cluster_id_of(operation: Any) -> str:
    return unpack(operation.metadata, cluster_service_pb2.CreateClusterMetadata()).cluster_id


def job_id_of(operation: Any) -> str:
    return unpack(operation.metadata, job_service_pb2.CreateJobMetadata()).job_id


def subcluster(cloud: FakeDataproc, role: Any = ROLE.MASTERNODE, hosts: int = 1, **resources: Any) -> Any:
    values = {"resource_preset_id": "s3-c2-m8", "disk_type_id": "network-ssd", "disk_size": 40 * GB} | resources
    return cluster_service_pb2.CreateSubclusterConfigSpec(
        name=ROLE.Name(role).lower(), role=role, resources=values, subnet_id=cloud.subnet_id, hosts_count=hosts
    )


def create_request(cloud: FakeDataproc, name: str = "cluster-1") -> Any:
    request = cluster_service_pb2.CreateClusterRequest(
        folder_id=cloud.folder_id,
        name=name,
        labels={"owner": "me"},
        zone_id=cloud.zone,
        service_account_id=cloud.service_account_id,
    )
    config = request.config_spec
    config.version_id = "2.0"
    config.hadoop.services.extend([SERVICE.YARN, SERVICE.SPARK, SERVICE.HDFS])
    config.subclusters_spec.extend(
        [subcluster(cloud), subcluster(cloud, ROLE.DATANODE, 3, disk_type_id="network-hdd", disk_size=128 * GB)]
    )
    return request


def job_request(cluster_id: str, **fields: Any) -> Any:
    spec = {"main_python_file_uri": "s3a://bucket/main.py"} | fields
    return CREATE_JOB(cluster_id=cluster_id, name="job-1", pyspark_job=spec)


@contextlib.contextmanager
def refused(code: str, *words: str) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code().name == code, caught.value.details()
    for word in words:
        assert word in caught.value.details()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def cloud(tmp_path: Path, clock: FakeClock) -> Iterator[FakeDataproc]:
    script = JobScript(seconds=10, log="started\n")
    with FakeDataproc(tmp_path, clock=clock, run_job=lambda _: script, create_seconds=60, delete_seconds=30) as cloud:
        yield cloud


@pytest.fixture
def client(cloud: FakeDataproc, clock: FakeClock) -> Client:
    return Client(cloud, clock)


# --- Access


def test_private_files_are_private(cloud: FakeDataproc):
    private = [path for path in cloud.directory.iterdir() if b"PRIVATE KEY" in path.read_bytes()]
    assert {path.name for path in private} == {"server.key", "service_account_key.json"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in private)


def test_only_calls_with_a_valid_token_over_its_own_authority_are_answered(cloud: FakeDataproc, clock: FakeClock):
    with grpc.secure_channel(cloud.endpoint, grpc.ssl_channel_credentials()) as channel, refused("UNAVAILABLE"):
        ApiEndpointServiceStub(channel).List(api_endpoint_service_pb2.ListApiEndpointsRequest(), timeout=5)
    with channel_to(cloud) as channel:
        endpoints = ApiEndpointServiceStub(channel).List(api_endpoint_service_pb2.ListApiEndpointsRequest()).endpoints
        assert {endpoint.address for endpoint in endpoints} == {cloud.endpoint}
        assert {"iam", "dataproc", "operation"} <= {endpoint.id for endpoint in endpoints}
        with refused("UNAUTHENTICATED", "no token"):
            ClusterServiceStub(channel).List(cluster_service_pb2.ListClustersRequest(folder_id=cloud.folder_id))
    with refused("UNAUTHENTICATED", "invalid"):
        Client(cloud, clock, iam_token="t1.no-such-token").listed()
    client = Client(cloud, clock, iam_token=cloud.iam_token())
    client.listed()
    clock.sleep(cloud.token_lifetime_seconds + 1)
    with refused("UNAUTHENTICATED", "expired"):
        client.listed()


JWTS: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "expired": lambda claims, headers: claims.update(iat=time.time() - 7200, exp=time.time() - 3600),
    "issued in the future": lambda claims, headers: claims.update(iat=time.time() + 600, exp=time.time() + 1200),
    "lives longer": lambda claims, headers: claims.update(exp=time.time() + 90_000),
    "udience": lambda claims, headers: claims.update(aud="https://elsewhere.example/"),
    "issuer": lambda claims, headers: claims.update(iss="aje00000000000000000"),
    "key id": lambda claims, headers: headers.update(kid="aje00000000000000000"),
    '"exp"': lambda claims, headers: claims.pop("exp"),
}


def channel_to(cloud: FakeDataproc) -> Any:
    credentials = grpc.ssl_channel_credentials(cloud.root_certificates_file.read_bytes())
    return grpc.secure_channel(cloud.endpoint, credentials)


def exchange(cloud: FakeDataproc, token: str) -> Any:
    with channel_to(cloud) as channel:
        return IamTokenServiceStub(channel).Create(CreateIamTokenRequest(jwt=token))


def signed(cloud: FakeDataproc, spoil: Callable[[dict[str, Any], dict[str, Any]], object]) -> str:
    key = json.loads(cloud.service_account_key_file.read_text())
    now = time.time()
    audience = f"https://iam.{cloud.endpoint}/iam/v1/tokens"
    claims = {"iss": key["service_account_id"], "aud": audience, "iat": now, "exp": now + 3600}
    headers = {"kid": key["id"]}
    spoil(claims, headers)
    return jwt.encode(claims, key["private_key"], algorithm="PS256", headers=headers)


def test_a_wrong_jwt_gets_no_token(cloud: FakeDataproc):
    for word, spoil in JWTS.items():
        with refused("UNAUTHENTICATED", word):
            exchange(cloud, signed(cloud, spoil))
    good = signed(cloud, lambda claims, headers: None)
    assert exchange(cloud, good).iam_token
    head, body, signature = good.split(".")
    other = "A" if signature[100] != "A" else "B"
    with refused("UNAUTHENTICATED", "Signature verification failed"):
        exchange(cloud, f"{head}.{body}.{signature[:100]}{other}{signature[101:]}")


# --- The published constraints

CREATES: dict[str, tuple[Callable[[Any], object], str]] = {
    "folder_id": (lambda r: r.ClearField("folder_id"), "folder_id"),
    "name is required": (lambda r: r.ClearField("name"), "name: Field is required"),
    "name has a pattern": (lambda r: setattr(r, "name", "Upper_Case"), "name: Value must match"),
    "name is too long": (lambda r: setattr(r, "name", "a" * 64), "name: Value must match"),
    "description": (lambda r: setattr(r, "description", "x" * 257), "description: Length must be <=256"),
    "too many labels": (lambda r: r.labels.update({f"a{i}": "" for i in range(65)}), "labels: The number"),
    "label value pattern": (lambda r: r.labels.update(a="UPPER"), "labels[a]: Value must match"),
    "label value length": (lambda r: r.labels.update(a="x" * 64), "labels[a]: Length"),
    "label key pattern": (lambda r: r.labels.update({"1a": ""}), "labels[1a] (key): Value must match"),
    "label key length": (lambda r: r.labels.update({"": ""}), "labels[] (key): Length must be 1-63"),
    "config_spec": (lambda r: r.ClearField("config_spec"), "config_spec: Field is required"),
    "zone_id": (lambda r: r.ClearField("zone_id"), "zone_id: Field is required"),
    "service_account_id": (lambda r: r.ClearField("service_account_id"), "service_account_id: Field is required"),
    "role": (lambda r: r.config_spec.subclusters_spec[0].ClearField("role"), "subclusters_spec[0].role: Field is req"),
    "resources": (lambda r: r.config_spec.subclusters_spec[1].ClearField("resources"), "[1].resources: Field is req"),
    "subnet_id": (lambda r: r.config_spec.subclusters_spec[1].ClearField("subnet_id"), "[1].subnet_id: Field is req"),
    "hosts_count": (lambda r: r.config_spec.subclusters_spec[1].ClearField("hosts_count"), "hosts_count: Value must"),
    "an unknown enum value": (lambda r: r.config_spec.hadoop.services.append(99), "services[3]: 99 is not a value"),
    "measurement_duration": (lambda r: autoscale(r, None), "measurement_duration: Field is required"),
    "measurement is too short": (lambda r: autoscale(r, 59), "measurement_duration: Value must be 1m-10m"),
    "measurement is too long": (lambda r: autoscale(r, 601), "measurement_duration: Value must be 1m-10m"),
    "max_hosts_count": (lambda r: autoscale(r, 60, max_hosts_count=101), "max_hosts_count: Value must be 1-100"),
    "cpu": (lambda r: autoscale(r, 60, cpu_utilization_target=100.5), "cpu_utilization_target: Value must be 0-100"),
    # Not in the protos:
    "zone": (lambda r: setattr(r, "zone_id", "us-east-1a"), "zone"),
    "image": (lambda r: setattr(r.config_spec, "version_id", "3.9"), "version_id"),
    "no master": (lambda r: r.config_spec.subclusters_spec.pop(0), "exactly one master"),
    "two masters": (
        lambda r: r.config_spec.subclusters_spec.append(r.config_spec.subclusters_spec[0]),
        "exactly one master",
    ),
    "two hosts": (lambda r: setattr(r.config_spec.subclusters_spec[0], "hosts_count", 2), "exactly one master"),
    "HDFS": (lambda r: r.config_spec.subclusters_spec.pop(1), "HDFS needs a data subcluster"),
    "YARN": (lambda r: r.config_spec.hadoop.services.remove(SERVICE.YARN), "SPARK needs YARN"),
    "preset": (lambda r: resources(r, resource_preset_id="s3-c3-m7"), "s3-c3-m7"),
    "disk type": (lambda r: resources(r, disk_type_id="ssd"), "disk type 'ssd'"),
    "disk size": (lambda r: resources(r, disk_size=40), "disk size"),
    "disk step": (lambda r: resources(r, disk_type_id="network-ssd-nonreplicated"), "multiple of 93"),
    "hosts": (lambda r: setattr(r.config_spec.subclusters_spec[1], "hosts_count", 33), "at most 32 hosts"),
    "scaled data nodes": (
        lambda r: r.config_spec.subclusters_spec[1].autoscaling_config.CopyFrom(scaling(60, max_hosts_count=5)),
        "only compute subclusters",
    ),
    "below the minimum": (lambda r: autoscale(r, 60, hosts=3, max_hosts_count=2), "max_hosts_count is below"),
}


def scaling(measurement: int | None, **fields: Any) -> Any:
    values = {"max_hosts_count": 2} | fields
    duration = None if measurement is None else Duration(seconds=measurement)
    return subcluster_pb2.AutoscalingConfig(measurement_duration=duration, **values)


def autoscale(request: Any, measurement: int | None, hosts: int = 1, **fields: Any) -> None:
    spec = request.config_spec.subclusters_spec.add()
    spec.CopyFrom(request.config_spec.subclusters_spec[1])
    spec.name, spec.role, spec.hosts_count = "compute", ROLE.COMPUTENODE, hosts
    spec.autoscaling_config.CopyFrom(scaling(measurement, **fields))


def resources(request: Any, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(request.config_spec.subclusters_spec[0].resources, name, value)


def test_wrong_cluster_requests_are_refused(client: Client):
    for case, (spoil, message) in CREATES.items():
        request = create_request(client.cloud)
        spoil(request)
        with pytest.raises(grpc.RpcError) as caught:
            client.clusters.Create(request)
        assert (caught.value.code().name, message in caught.value.details()) == ("INVALID_ARGUMENT", True), case
    assert not client.cloud.clusters
    client.clusters.Create(create_request(client.cloud))


JOBS: dict[str, tuple[dict[str, Any], str]] = {
    "main file": ({"main_python_file_uri": ""}, "pyspark_job.main_python_file_uri: Field is required"),
    "URI length": ({"python_file_uris": ["s" * 2048]}, "python_file_uris[0]: Length must be <2048"),
    "many files": ({"file_uris": ["s"] * 101}, "file_uris: The number of elements must be <=100"),
    "property name": ({"properties": {"spark!": "x"}}, "properties[spark!] (key): Value must match"),
    "property value": ({"properties": {"spark.a": "x" * 10_001}}, "properties[spark.a]: Length must be <=10000"),
    "arguments": ({"args": ["x"] * 2501}, "args: The number of elements must be <=2500"),
}


def test_wrong_job_requests_are_refused(client: Client):
    cluster_id = client.ready_cluster()
    for case, (fields, message) in JOBS.items():
        with pytest.raises(grpc.RpcError) as caught:
            client.submit(cluster_id, **fields)
        assert (caught.value.code().name, message in caught.value.details()) == ("INVALID_ARGUMENT", True), case
    with refused("INVALID_ARGUMENT", "job_spec"):
        client.jobs.Create(CREATE_JOB(cluster_id=cluster_id, name="job-1"))
    with refused("UNIMPLEMENTED"):
        client.jobs.Create(CREATE_JOB(cluster_id=cluster_id, hive_job={}))
    with refused("INVALID_ARGUMENT", "cluster_id: Field is required"):
        client.submit("")
    assert not client.cloud.jobs


def test_every_annotation_of_the_served_requests_is_understood(cloud: FakeDataproc):
    todo, seen, ranges = [method.input_type for method, _ in cloud._methods()], set(), set()
    while todo:
        message = todo.pop()
        if message.full_name in seen:
            continue
        seen.add(message.full_name)
        for item in message.fields:
            options = item.GetOptions().Extensions
            assert not options[validation_pb2.unique], item.full_name
            assert not options[validation_pb2.bytes], item.full_name
            assert not options[validation_pb2.map_key].value, item.full_name
            ranges |= {options[rule] for rule in (validation_pb2.length, validation_pb2.size, validation_pb2.value)}
            ranges.add(options[validation_pb2.map_key].length)
            if item.message_type is not None:
                todo.append(item.message_type)
    assert len(ranges - {""}) > 20
    assert all(within(allowed)(60) is not None for allowed in ranges - {""})
    with pytest.raises(ValueError, match="one to five"):
        within("one to five")


# --- Clusters


def test_a_cluster_lives(client: Client, clock: FakeClock):
    cloud = client.cloud
    request = create_request(cloud)
    started = clock.time()
    operation = client.clusters.Create(request)
    cluster_id = cluster_id_of(operation)
    assert not operation.done
    assert client.state(cluster_id) == "CREATING"
    clock.sleep(59)
    assert client.state(cluster_id) == "CREATING"
    clock.sleep(1)
    operation = client.operation(operation)
    assert operation.done
    assert operation.modified_at.ToSeconds() - operation.created_at.ToSeconds() == 60
    cluster = unpack(operation.response, cluster_pb2.Cluster())
    assert cluster == client.get(cluster_id)
    assert (cluster.name, dict(cluster.labels), cluster.folder_id) == ("cluster-1", {"owner": "me"}, cloud.folder_id)
    assert cluster.config.hadoop == request.config_spec.hadoop
    assert cluster.created_at.ToSeconds() == int(started)
    assert client.state(cluster_id) == "RUNNING"

    operation = client.delete(cluster_id)
    assert unpack(operation.metadata, cluster_service_pb2.DeleteClusterMetadata()).cluster_id == cluster_id
    assert client.state(cluster_id) == "STOPPING"
    with refused("FAILED_PRECONDITION", "is not finished yet"):
        client.delete(cluster_id)
    clock.sleep(30)
    assert client.operation(operation).HasField("response")
    for call in (client.get, client.delete):
        with refused("NOT_FOUND", cluster_id):
            call(cluster_id)
    assert not cloud.clusters


def test_clusters_are_listed_in_pages_even_while_some_go(client: Client):
    ids = [client.cloud.add_cluster(f"cluster-{number:03}") for number in range(250)]
    first = client.listed(page_size=100)
    client.cloud.vanish(ids[3])
    second = client.listed(page_size=100, page_token=first.next_page_token)
    third = client.listed(page_size=100, page_token=second.next_page_token)
    assert [cluster.id for page in (first, second, third) for cluster in page.clusters] == ids
    assert third.next_page_token == ""
    assert len(client.listed().clusters) == 100
    with refused("INVALID_ARGUMENT", "page_token"):
        client.jobs.List(
            job_service_pb2.ListJobsRequest(cluster_id=ids[0], page_token=first.next_page_token),
        )
    (found,) = client.listed(filter='name="cluster-007"').clusters
    assert found.id == ids[7]
    for wrong in ({"filter": "labels.a=b"}, {"page_token": "nonsense"}, {"page_size": 1001}, {"page_size": -1}):
        with refused("INVALID_ARGUMENT"):
            client.listed(**wrong)


def test_conflicts_and_permissions(client: Client):
    cloud = client.cloud
    cluster_id = client.ready_cluster()
    with refused("ALREADY_EXISTS"):
        client.clusters.Create(create_request(cloud))
    for field, code in (("folder_id", "PERMISSION_DENIED"), ("service_account_id", "NOT_FOUND")):
        request = create_request(cloud, "cluster-2")
        setattr(request, field, "other")
        with refused(code, "other"):
            client.clusters.Create(request)
    request = create_request(cloud, "cluster-2")
    request.config_spec.subclusters_spec[1].subnet_id = "other"
    with refused("NOT_FOUND", "Subnet other"):
        client.clusters.Create(request)
    with refused("PERMISSION_DENIED"):
        client.clusters.List(cluster_service_pb2.ListClustersRequest(folder_id="other"))
    protected = cloud.add_cluster("protected", deletion_protection=True)
    with refused("FAILED_PRECONDITION", "deletion_protection"):
        client.delete(protected)
    stopping = cloud.add_cluster("stopping", status=cluster_pb2.Cluster.STOPPING)
    with refused("FAILED_PRECONDITION", "STOPPING"):
        client.delete(stopping)
    assert set(cloud.clusters) == {cluster_id, protected, stopping}


@pytest.mark.parametrize("quotas", [Quotas(hosts=7), Quotas(disk_gb={"network-ssd": 79})])
def test_quotas_count_all_clusters(client: Client, quotas: Quotas, clock: FakeClock):
    client.cloud.quotas = quotas
    cluster_id = client.ready_cluster()
    with refused("RESOURCE_EXHAUSTED", "The limit on maximum", "has exceeded"):
        client.clusters.Create(create_request(client.cloud, "cluster-2"))
    client.delete(cluster_id)
    clock.sleep(30)
    client.clusters.Create(create_request(client.cloud, "cluster-2"))


def test_deleting_while_creating(client: Client, clock: FakeClock):
    operation = client.clusters.Create(create_request(client.cloud))
    cluster_id = cluster_id_of(operation)
    with refused("FAILED_PRECONDITION", f"operation {operation.id}"):
        client.delete(cluster_id)
    client.cloud.delete_while_creating = True
    client.delete(cluster_id)
    assert client.operation(operation).error.code == grpc.StatusCode.CANCELLED.value[0]
    clock.sleep(90)
    assert not client.cloud.clusters


# --- Jobs


def test_a_job_runs(client: Client, clock: FakeClock):
    left: list[str] = []
    scripts = [JobScript(seconds=20, log=[(0, "one\n"), (5, "two\n")], effect=lambda: left.append("report"))]
    client.cloud.run_job, client.cloud.job_start_seconds = lambda request: scripts.pop(), 10
    cluster_id = client.ready_cluster()
    operation = client.jobs.Create(job_request(cluster_id, args=["--request", "s3a://bucket/request.json"]))
    job_id = job_id_of(operation)
    seen = []
    for _ in range(7):
        seen.append(client.job_state(cluster_id, job_id))
        clock.sleep(5)
    assert seen == ["PROVISIONING", "PENDING", "RUNNING", "RUNNING", "RUNNING", "RUNNING", "DONE"]
    assert left == ["report"]
    job = client.job(cluster_id, job_id)
    assert list(job.pyspark_job.args) == ["--request", "s3a://bucket/request.json"]
    assert job.finished_at.ToSeconds() - job.started_at.ToSeconds() == 20
    assert job.application_info.id.startswith("application_")
    assert unpack(client.operation(operation).response, job_pb2.Job()) == job
    assert client.log(cluster_id, job_id).content == "one\ntwo\n"
    listed = client.jobs.List(job_service_pb2.ListJobsRequest(cluster_id=cluster_id, filter='name="job-1"')).jobs
    assert [item.id for item in listed] == [job_id]
    with refused("FAILED_PRECONDITION", "DONE"):
        client.cancel(cluster_id, job_id)


def fails() -> None:
    raise OSError("S3 refused the report")


@pytest.mark.parametrize("script", [JobScript("ERROR", log="boom\n"), JobScript(log="boom\n", effect=fails)])
def test_a_job_fails(client: Client, script: JobScript):
    client.cloud.run_job = lambda request: script
    cluster_id = client.ready_cluster()
    operation = client.jobs.Create(job_request(cluster_id))
    assert client.job_state(cluster_id, job_id_of(operation)) == "ERROR"
    assert client.operation(operation).error.message == "Job failed"
    log = client.log(cluster_id, job_id_of(operation)).content
    assert log.startswith("boom\n")
    assert ("S3 refused the report" in log) == (script.effect is not None)


def test_a_hanging_job_is_cancelled(client: Client, clock: FakeClock):
    client.cloud.run_job, client.cloud.cancel_seconds = lambda request: JobScript(seconds=math.inf), 5
    cluster_id = client.ready_cluster()
    create = client.jobs.Create(job_request(cluster_id))
    job_id = job_id_of(create)
    clock.sleep(3000)
    assert client.job_state(cluster_id, job_id) == "RUNNING"
    cancel = client.cancel(cluster_id, job_id)
    assert client.job_state(cluster_id, job_id) == "CANCELLING"
    clock.sleep(5)
    assert client.job_state(cluster_id, job_id) == "CANCELLED"
    assert client.operation(cancel).HasField("response")
    assert client.operation(create).error.code == grpc.StatusCode.CANCELLED.value[0]


def test_jobs_need_a_running_cluster_with_spark(client: Client):
    creating = cluster_id_of(client.clusters.Create(create_request(client.cloud)))
    with refused("FAILED_PRECONDITION", "CREATING"):
        client.submit(creating)
    plain = client.cloud.add_cluster("plain", config={"hadoop": {"services": [SERVICE.YARN]}})
    with refused("FAILED_PRECONDITION", "SPARK"):
        client.submit(plain)
    with refused("NOT_FOUND"):
        client.submit("c9q00000000000000000")
    with refused("NOT_FOUND"):
        client.job(plain, "c9q00000000000000000")


def test_a_clusters_end_ends_its_jobs(client: Client, clock: FakeClock):
    cluster_id = client.ready_cluster()
    operation = client.jobs.Create(job_request(cluster_id))
    client.delete(cluster_id)
    assert client.job_state(cluster_id, job_id_of(operation)) == "ERROR"
    assert "deleted" in client.operation(operation).error.message
    clock.sleep(30)
    with refused("NOT_FOUND"):
        client.job(cluster_id, job_id_of(operation))
    vanishing = client.ready_cluster()
    operation = client.jobs.Create(job_request(vanishing))
    client.cloud.vanish(vanishing)
    assert client.operation(operation).HasField("error")


@pytest.mark.parametrize("page_size", [1, 7])
def test_a_log_comes_in_pages_of_bytes(client: Client, page_size: int):
    text = "Ошибка: naïve 🙂 plain\n" * 3
    client.cloud.run_job = lambda request: JobScript(log=text)
    cluster_id = client.ready_cluster()
    job_id, content, token = client.submit(cluster_id), "", ""
    while True:
        page = client.log(cluster_id, job_id, page_size=page_size, page_token=token)
        assert len(page.content.encode()) <= max(4, page_size)
        content, token = content + page.content, page.next_page_token
        if not token:
            break
        assert page.content
    assert content == text
    with refused("INVALID_ARGUMENT", "page_token"):
        client.log(cluster_id, job_id, page_token="nonsense")
    with refused("INVALID_ARGUMENT", "page_size"):
        client.log(cluster_id, job_id, page_size=(1 << 20) + 1)


@pytest.mark.parametrize("token_at_end", [False, True])
def test_a_log_grows(client: Client, clock: FakeClock, token_at_end: bool):
    client.cloud.log_token_at_end = token_at_end
    client.cloud.run_job = lambda request: JobScript(seconds=20, log=[(0, "one\n"), (10, "two\n")])
    cluster_id = client.ready_cluster()
    job_id = client.submit(cluster_id)
    page = client.log(cluster_id, job_id)
    assert (page.content, bool(page.next_page_token)) == ("one\n", token_at_end)
    clock.sleep(20)
    page = client.log(cluster_id, job_id, page_token=page.next_page_token)
    assert page.content == ("two\n" if token_at_end else "one\ntwo\n")
    assert page.next_page_token == ""


# --- Faults


def test_calls_fail_as_scripted(client: Client):
    cloud = client.cloud
    cloud.fail("ClusterService.List", "UNAVAILABLE", "try again", times=2)
    for _ in range(2):
        with refused("UNAVAILABLE", "try again"):
            client.listed()
    client.listed()
    cloud.fail("ClusterService.Create", "INTERNAL", after=True)
    with refused("INTERNAL"):
        client.clusters.Create(create_request(cloud))
    (cluster_id,) = cloud.clusters
    cloud.fail("ClusterService.Get", "PERMISSION_DENIED", when=lambda request: request.cluster_id == "x")
    client.get(cluster_id)
    with refused("PERMISSION_DENIED"):
        client.get("x")
    with pytest.raises(ValueError, match=r"ClusterService\.Creat"):
        cloud.fail("ClusterService.Creat", "INTERNAL")


def test_the_journal_has_every_call_and_no_token(client: Client):
    cloud = client.cloud
    cluster_id = client.ready_cluster()
    with refused("NOT_FOUND"):
        client.get("c9q00000000000000000")
    client.submit(cluster_id, args=["visible"])
    assert [(entry["method"], entry["code"]) for entry in cloud.journal[-3:]] == [
        ("ClusterService.Create", "OK"),
        ("ClusterService.Get", "NOT_FOUND"),
        ("JobService.Create", "OK"),
    ]
    (token_call,) = cloud.calls("IamTokenService.Create")
    assert token_call["request"] == {"jwt": "***"}
    assert cloud.calls("JobService.Create")[0]["request"]["pyspark_job"]["args"] == ["visible"]
    assert not [token for token in cloud.issued_tokens() if token in str(cloud.journal)]


def test_many_callers_at_once(client: Client):
    outcomes: list[str] = []

    def create() -> None:
        try:
            client.clusters.Create(create_request(client.cloud))
            outcomes.append("OK")
        except grpc.RpcError as error:
            outcomes.append(error.code().name)

    threads = [threading.Thread(target=create) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["ALREADY_EXISTS"] * 11 + ["OK"]


# --- Jobs that run for real


def processes_under(directory: Path) -> list[int]:
    """Processes whose working directory is inside `directory`."""
    pids = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and Path(os.readlink(entry / "cwd")).is_relative_to(directory):
                pids.append(int(entry.name))
    return pids


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def fake_spark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A spark-submit that is a shell script."""
    home = tmp_path / "spark"
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "spark-submit"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    (home / "bin" / "java").touch()
    monkeypatch.setattr("ml_platform.dev.cloud.spark_submit.spark_home", lambda: str(home))


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str, Path], None]:
    """A store that has every file but those called missing."""

    def fetch(uri: str, target: Path) -> None:
        if "missing" in uri:
            raise FileNotFoundError(f"{uri} does not exist")
        target.write_text(f"# {uri}\n")

    return fetch


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock, files: Any):
    fake_spark(tmp_path, monkeypatch, 'for a in "$@"; do echo "arg=$a"; done; env')
    monkeypatch.setenv("CALLERS_SECRET", "not for the cluster")
    spark = SparkSubmit(
        {"spark.jars.packages": "a:b:1", "spark.x": "cluster", "spark.jars": "/cluster.jar"},
        {"AWS_ACCESS_KEY_ID": "cluster-key", "JAVA_HOME": str(tmp_path / "spark")},
        fetch=files,
    )
    with FakeDataproc(tmp_path / "cloud", clock=clock, run_job=spark) as cloud:
        client = Client(cloud, clock)
        cluster_id = client.ready_cluster()
        job_id = client.submit(
            cluster_id,
            python_file_uris=["s3a://bucket/code.zip"],
            archive_uris=["s3a://bucket/venv.tar.gz#venv"],
            jar_file_uris=["s3a://bucket/more.jar"],
            packages=["c:d:2"],
            properties={"spark.x": "job", "spark.submit.deployMode": "cluster"},
            args=["--report", "a b"],
        )
        wait_for(lambda: client.job_state(cluster_id, job_id) == "DONE")
        log = client.log(cluster_id, job_id).content
    lines = log.splitlines()
    assert lines[lines.index("arg=--report") + 1] == "arg=a b"
    assert "arg=spark.x=job" in lines
    assert "arg=spark.jars.packages=a:b:1,c:d:2" in lines
    assert "AWS_ACCESS_KEY_ID=cluster-key" in lines
    assert any(line.endswith("/code.zip") for line in lines)
    assert any(line.endswith("/venv.tar.gz#venv") for line in lines)
    assert any(line.startswith("arg=spark.jars=/cluster.jar,/") and line.endswith("/more.jar") for line in lines)
    assert "CALLERS_SECRET" not in log
    assert "deployMode" not in log


def test_a_job_whose_files_are_missing_says_so(tmp_path: Path, clock: FakeClock, files: Any):
    with FakeDataproc(tmp_path, clock=clock, run_job=SparkSubmit(fetch=files)) as cloud:
        client = Client(cloud, clock)
        cluster_id = client.ready_cluster()
        job_id = client.submit(cluster_id, main_python_file_uri="s3a://bucket/missing.py")
        wait_for(lambda: client.job_state(cluster_id, job_id) == "ERROR")
        assert "s3a://bucket/missing.py does not exist" in client.log(cluster_id, job_id).content


def test_files_come_from_s3_with_the_clusters_credentials(tmp_path: Path, s3: LocalS3, monkeypatch: pytest.MonkeyPatch):
    s3.client().create_bucket(Bucket="code-of-a-job")
    s3.client().put_object(Bucket="code-of-a-job", Key="a b/ma?in#1.py", Body=b"print(1)")
    for name in s3.environment():
        monkeypatch.delenv(name, raising=False)
    SparkSubmit(environment=s3.environment()).fetch_file("s3a://code-of-a-job/a b/ma?in#1.py", tmp_path / "main.py")
    assert (tmp_path / "main.py").read_text() == "print(1)"


def test_credentials_are_neither_properties_nor_shown():
    for name in ("spark.hadoop.fs.s3a.secret.key", "spark.hadoop.fs.s3a.access.key"):
        with pytest.raises(ValueError, match="environment"):
            SparkSubmit({name: "x"})
    assert "hidden" not in repr(SparkSubmit(environment={"AWS_SECRET_ACCESS_KEY": "hidden"}))


POLITE = "trap 'echo bye; exit 1' TERM; "
STUBBORN = "trap '' TERM; "


@pytest.mark.parametrize(
    ("end", "body"),
    [
        ("cancel", POLITE + "echo up; sleep 300 & sleep 300 & wait"),
        ("cancel", STUBBORN + "echo up; sleep 300 & sleep 300; wait"),
        ("delete", STUBBORN + "echo up; sleep 300 & sleep 300; wait"),
        ("its own", "echo up; sleep 300 & sleep 300 & sleep 1"),
    ],
)
def test_no_process_outlives_its_job(
    end: str, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock, files: Any
):
    polite = body.startswith(POLITE)
    monkeypatch.setattr("ml_platform.dev.cloud.spark_submit.GRACE_SECONDS", 30 if polite else 0.3)
    fake_spark(tmp_path, monkeypatch, body)
    directory = tmp_path / "cloud"
    spark = SparkSubmit(environment={"JAVA_HOME": str(tmp_path / "spark")}, fetch=files)
    with FakeDataproc(directory, clock=clock, run_job=spark) as cloud:
        client = Client(cloud, clock)
        cluster_id = client.ready_cluster()
        job_id = client.submit(cluster_id)
        wait_for(lambda: client.log(cluster_id, job_id).content == "up\n" and len(processes_under(directory)) >= 3)
        assert client.job_state(cluster_id, job_id) == "RUNNING"
        if end == "cancel":
            client.cancel(cluster_id, job_id)
            wait_for(lambda: client.job_state(cluster_id, job_id) == "CANCELLED", 10)
            assert ("bye" in client.log(cluster_id, job_id).content) == polite
        elif end == "delete":
            client.delete(cluster_id)
            assert client.job_state(cluster_id, job_id) == "ERROR"
        elif end == "its own":
            wait_for(lambda: client.job_state(cluster_id, job_id) == "DONE", 10)
            assert not processes_under(directory)
    wait_for(lambda: not processes_under(directory), 5)


def test_no_process_outlives_a_killed_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_spark(tmp_path, monkeypatch, "sleep 300 & sleep 300; wait")
    program = (
        "import sys, time; from pathlib import Path; from ml_platform.dev.cloud import spark_submit\n"
        "from yandex.cloud.dataproc.v1.job_pb2 import PysparkJob\n"
        "home, directory = sys.argv[1:]\n"
        "spark_submit.spark_home = lambda: home\n"
        "spark = spark_submit.SparkSubmit(environment={'JAVA_HOME': home}, fetch=lambda uri, path: path.touch())\n"
        "spark.start(PysparkJob(main_python_file_uri='s3a://b/main.py'), Path(directory))\n"
        "time.sleep(300)\n"
    )
    directory = tmp_path / "job"
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "spark"), str(directory)]) as stand_in:
        wait_for(lambda: len(processes_under(directory)) == 3)
        stand_in.kill()
    wait_for(lambda: not processes_under(directory), 5)


@pytest.mark.spark
def test_a_real_pyspark_job(tmp_path: Path):
    main = tmp_path / "main.py"
    main.write_text(
        "import sys\n"
        "from pyspark.sql import SparkSession\n"
        "from helper import double\n"
        "spark = SparkSession.builder.getOrCreate()\n"
        "total = spark.sparkContext.parallelize(range(5), 2).map(double).sum()\n"
        "print(f'total {total} of {sys.argv[1:]}')\n"
        "sys.exit(0 if sys.argv[1] == 'good' else 3)\n"
    )
    (tmp_path / "helper.py").write_text("def double(x):\n    return 2 * x\n")
    environment = {"JAVA_HOME": os.environ.get("JAVA_HOME", ""), **SHORT_LIVED_JAVA}
    spark = SparkSubmit({"spark.log.level": "WARN"}, environment)
    clock: Any = time
    with FakeDataproc(tmp_path / "cloud", run_job=spark, create_seconds=0) as cloud:
        client = Client(cloud, clock)
        cluster_id = cluster_id_of(client.clusters.Create(create_request(cloud)))
        uris = {"main_python_file_uri": f"file://{main}", "python_file_uris": [f"file://{tmp_path}/helper.py"]}
        jobs = {word: client.submit(cluster_id, args=[word], **uris) for word in ("good", "bad")}
        for word, state in (("good", "DONE"), ("bad", "ERROR")):
            wait_for(lambda: client.job(cluster_id, jobs[word]).HasField("finished_at"), 120)  # noqa: B023
            assert client.job_state(cluster_id, jobs[word]) == state, client.log(cluster_id, jobs[word]).content
            assert f"total 20 of ['{word}']" in client.log(cluster_id, jobs[word]).content
    assert not processes_under(tmp_path)


# --- The command


@pytest.mark.e2e
def test_dev_cloud_runs_until_it_is_interrupted(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "ml_platform.cli.main",
        "dev-cloud",
        "--directory",
        "cloud",
        "--create-seconds",
        "0",
    ]
    environment = tmp_path / "cloud" / "environment"
    show = ". ./cloud/environment; for n in YC_API_ENDPOINT YC_ROOT_CERTIFICATES_FILE; do eval echo \\$$n; done"
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            wait_for(environment.exists, 120)
            assert stat.S_IMODE(environment.stat().st_mode) == 0o600
            shown = subprocess.run(["sh", "-c", show], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
            endpoint, certificates = shown.split()
            credentials = grpc.ssl_channel_credentials(Path(certificates).read_bytes())
            with grpc.secure_channel(endpoint, credentials) as channel:
                ApiEndpointServiceStub(channel).List(api_endpoint_service_pb2.ListApiEndpointsRequest(), timeout=30)
        finally:
            process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=30)[0]
    assert "set -a; ." in printed
    assert not processes_under(tmp_path)
