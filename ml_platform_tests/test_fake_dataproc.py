"""The stand-in for the Data Proc API as the SDK sees it: the facts of the protocol that the platform relies on.

What the platform makes of its answers, errors and pages is in test_dataproc_api.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import yandexcloud
from google.protobuf import message_factory
from google.protobuf.duration_pb2 import Duration
from yandex.cloud import validation_pb2
from yandex.cloud.dataproc.v1 import cluster_pb2, cluster_service_pb2, job_pb2, job_service_pb2
from yandex.cloud.dataproc.v1.cluster_service_pb2_grpc import ClusterServiceStub
from yandex.cloud.dataproc.v1.job_service_pb2_grpc import JobServiceStub
from yandex.cloud.dataproc.v1.subcluster_pb2 import Role
from yandex.cloud.endpoint.api_endpoint_service_pb2 import ListApiEndpointsRequest
from yandex.cloud.endpoint.api_endpoint_service_pb2_grpc import ApiEndpointServiceStub
from yandex.cloud.operation import operation_service_pb2
from yandex.cloud.operation.operation_service_pb2_grpc import OperationServiceStub

from ml_platform.dev.cloud.fake_dataproc import FakeDataproc, JobScript, SparkSubmit
from ml_platform.dev.cloud.proto_validation import within
from ml_platform.dev.cloud.s3_server import LocalS3
from ml_platform_tests.fakes_cloud import FakeClock

GB = 1 << 30
SERVICE = cluster_pb2.HadoopConfig.Service
SERVICES: dict[str, tuple[Any, Any]] = {
    "ClusterService": (cluster_service_pb2, ClusterServiceStub),
    "JobService": (job_service_pb2, JobServiceStub),
    "OperationService": (operation_service_pb2, OperationServiceStub),
}


class Client:
    """The SDK's client of a stand-in."""

    def __init__(self, cloud: FakeDataproc, **credentials: Any) -> None:
        key = {"service_account_key": json.loads(cloud.service_account_key_file.read_text())}
        certificates = cloud.root_certificates_file.read_bytes()
        self.cloud = cloud
        self.sdk = yandexcloud.SDK(endpoint=cloud.endpoint, root_certificates=certificates, **credentials or key)

    def call(self, method: str, request: Any = None, **fields: Any) -> Any:
        """Call ``ClusterService.Get`` or the like, with a request or with its fields."""
        service, _, name = method.partition(".")
        protos, stub = SERVICES[service]
        request_type = protos.DESCRIPTOR.services_by_name[service].methods_by_name[name].input_type
        request = request or message_factory.GetMessageClass(request_type)(**fields)
        return getattr(self.sdk.client(stub), name)(request)

    def create(self, name: str = "cluster-1") -> tuple[Any, str]:
        operation = self.call("ClusterService.Create", create_request(self.cloud, name))
        metadata = cluster_service_pb2.CreateClusterMetadata()
        assert operation.metadata.Unpack(metadata)
        return operation, metadata.cluster_id

    def state(self, cluster_id: str) -> str:
        return cluster_pb2.Cluster.Status.Name(self.call("ClusterService.Get", cluster_id=cluster_id).status)

    def operation(self, operation: Any) -> Any:
        return self.call("OperationService.Get", operation_id=operation.id)

    def submit(self, cluster_id: str, **spec: Any) -> tuple[Any, dict[str, str]]:
        spec = {"main_python_file_uri": "s3a://bucket/main.py"} | spec
        operation = self.call("JobService.Create", cluster_id=cluster_id, name="job-1", pyspark_job=spec)
        metadata = job_service_pb2.CreateJobMetadata()
        assert operation.metadata.Unpack(metadata)
        return operation, {"cluster_id": cluster_id, "job_id": metadata.job_id}

    def job_state(self, job: dict[str, str]) -> str:
        return job_pb2.Job.Status.Name(self.call("JobService.Get", **job).status)

    def log(self, job: dict[str, str]) -> str:
        return self.call("JobService.ListLog", **job).content


def create_request(cloud: FakeDataproc, name: str = "cluster-1") -> Any:
    def subcluster(role: Any, hosts: int, **resources: Any) -> dict[str, Any]:
        values = {"resource_preset_id": "s3-c2-m8", **resources}
        name = Role.Name(role).lower()
        return {"name": name, "role": role, "resources": values, "subnet_id": cloud.subnet_id, "hosts_count": hosts}

    return cluster_service_pb2.CreateClusterRequest(
        folder_id=cloud.folder_id,
        name=name,
        labels={"owner": "me"},
        zone_id=cloud.zone,
        service_account_id=cloud.service_account_id,
        config_spec={
            "version_id": "2.0",
            "hadoop": {"services": [SERVICE.YARN, SERVICE.SPARK, SERVICE.HDFS]},
            "subclusters_spec": [
                subcluster(Role.MASTERNODE, 1, disk_type_id="network-ssd", disk_size=40 * GB),
                subcluster(Role.DATANODE, 3, disk_type_id="network-hdd", disk_size=128 * GB),
            ],
        },
    )


@contextlib.contextmanager
def refused(code: str, words: str = "", case: str = "") -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert (caught.value.code().name, words in caught.value.details()) == (code, True), (case, caught.value.details())


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def cloud(tmp_path: Path, clock: FakeClock) -> Iterator[FakeDataproc]:
    script = JobScript(seconds=10, log="started\n")
    with FakeDataproc(tmp_path, clock=clock, run_job=lambda _: script, create_seconds=60, delete_seconds=30) as cloud:
        yield cloud


@pytest.fixture
def client(cloud: FakeDataproc) -> Client:
    return Client(cloud)


# --- Access


def test_private_files_are_private(cloud: FakeDataproc):
    private = [path for path in cloud.directory.iterdir() if b"PRIVATE KEY" in path.read_bytes()]
    assert {path.name for path in private} == {"server.key", "service_account_key.json"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in private)


# --- Constraints on requests


def add_compute(request: Any, measurement: int = 60, hosts: int = 1, **scaling: Any) -> None:
    spec = request.config_spec.subclusters_spec.add()
    spec.CopyFrom(request.config_spec.subclusters_spec[1])
    spec.name, spec.role, spec.hosts_count = "compute", Role.COMPUTENODE, hosts
    spec.autoscaling_config.measurement_duration.CopyFrom(Duration(seconds=measurement))
    spec.autoscaling_config.max_hosts_count = scaling.get("max_hosts_count", 2)


def resources(request: Any, field: str, value: Any) -> None:
    setattr(request.config_spec.subclusters_spec[0].resources, field, value)


#: A wrong request by the part of the message that refuses it.
CLUSTERS: dict[str, Callable[[Any], object]] = {
    # By the annotations of the protos, one for each kind:
    "name: Field is required": lambda r: r.ClearField("name"),
    "name: Value must match": lambda r: setattr(r, "name", "Upper_Case"),
    "description: Length must be <=256": lambda r: setattr(r, "description", "x" * 257),
    "labels: The number": lambda r: r.labels.update({f"a{i}": "" for i in range(65)}),
    "labels[a]: Value must match": lambda r: r.labels.update(a="UPPER"),
    "labels[1a] (key): Value must match": lambda r: r.labels.update({"1a": ""}),
    "config_spec: Field is required": lambda r: r.ClearField("config_spec"),
    "spec[0].role: Field is required": lambda r: r.config_spec.subclusters_spec[0].ClearField("role"),
    "hosts_count: Value must": lambda r: r.config_spec.subclusters_spec[1].ClearField("hosts_count"),
    "services[3]: 99 is not a value": lambda r: r.config_spec.hadoop.services.append(99),
    "Value must be 1m-10m, is 59": lambda r: add_compute(r, 59),
    "Value must be 1m-10m, is 601": lambda r: add_compute(r, 601),
    "max_hosts_count: Value must be 1-100": lambda r: add_compute(r, max_hosts_count=101),
    # By the rules of the service:
    "zone 'us-east-1a'": lambda r: setattr(r, "zone_id", "us-east-1a"),
    "image version '3.9'": lambda r: setattr(r.config_spec, "version_id", "3.9"),
    "exactly one master subcluster": lambda r: r.config_spec.subclusters_spec.pop(0),
    "of exactly one host": lambda r: setattr(r.config_spec.subclusters_spec[0], "hosts_count", 2),
    "HDFS needs a data subcluster": lambda r: r.config_spec.subclusters_spec.pop(1),
    "SPARK needs YARN": lambda r: r.config_spec.hadoop.services.remove(SERVICE.YARN),
    "names of subclusters must be unique": lambda r: (add_compute(r), add_compute(r)),
    "'s3-c3-m7' is not available": lambda r: resources(r, "resource_preset_id", "s3-c3-m7"),
    "disk type 'ssd'": lambda r: resources(r, "disk_type_id", "ssd"),
    "disk size must be": lambda r: resources(r, "disk_size", 40),
    "multiple of 93": lambda r: resources(r, "disk_type_id", "network-ssd-nonreplicated"),
    "at most 32 hosts": lambda r: setattr(r.config_spec.subclusters_spec[1], "hosts_count", 33),
    "max_hosts_count is below": lambda r: add_compute(r, hosts=3),
}
JOBS: dict[str, dict[str, Any]] = {
    "pyspark_job.main_python_file_uri: Field is required": {"main_python_file_uri": ""},
    "python_file_uris[0]: Length must be <2048": {"python_file_uris": ["s" * 2048]},
    "properties[spark!] (key): Value must match": {"properties": {"spark!": "x"}},
    "properties[spark.a]: Length must be <=10000": {"properties": {"spark.a": "x" * 10_001}},
    "args: The number of elements must be <=2500": {"args": ["x"] * 2501},
}


def test_wrong_requests_are_refused(client: Client, clock: FakeClock):
    for words, spoil in CLUSTERS.items():
        request = create_request(client.cloud)
        spoil(request)
        with refused("INVALID_ARGUMENT", words, case=words):
            client.call("ClusterService.Create", request)
    assert not client.cloud.clusters
    _, cluster_id = client.create()
    clock.sleep(60)
    for words, spec in JOBS.items():
        with refused("INVALID_ARGUMENT", words, case=words):
            client.submit(cluster_id, **spec)
    with refused("INVALID_ARGUMENT", "job_spec"):
        client.call("JobService.Create", cluster_id=cluster_id, name="job-1")
    assert not client.cloud.jobs


def test_every_annotation_of_the_served_requests_is_understood(cloud: FakeDataproc):
    todo, seen, ranges = [method.input_type for method, _ in cloud._methods()], set(), set()
    while todo:
        message = todo.pop()
        if message.full_name in seen:
            continue
        seen.add(message.full_name)
        for item in message.fields:
            rules = item.GetOptions().Extensions
            unknown = (rules[validation_pb2.unique], rules[validation_pb2.bytes], rules[validation_pb2.map_key].value)
            assert not any(unknown), item.full_name
            ranges |= {rules[rule] for rule in (validation_pb2.length, validation_pb2.size, validation_pb2.value)}
            ranges.add(rules[validation_pb2.map_key].length)
            if item.message_type is not None:
                todo.append(item.message_type)
    for allowed in ranges - {""}:
        within(allowed)
    assert len(ranges) > 20
    with pytest.raises(ValueError, match="one to five"):
        within("one to five")


# --- Clusters


def test_a_cluster_is_created_runs_a_job_and_is_deleted(client: Client, clock: FakeClock):
    operation, cluster_id = client.create()
    clock.sleep(59)
    assert (client.operation(operation).done, client.state(cluster_id)) == (False, "CREATING")
    with refused("FAILED_PRECONDITION", f"operation {operation.id}"):
        client.call("ClusterService.Delete", cluster_id=cluster_id)
    with refused("FAILED_PRECONDITION", "CREATING"):
        client.submit(cluster_id)
    with refused("ALREADY_EXISTS"):
        client.create()
    clock.sleep(1)
    cluster = cluster_pb2.Cluster()
    assert client.operation(operation).response.Unpack(cluster)
    assert cluster == client.call("ClusterService.Get", cluster_id=cluster_id)
    assert (cluster.name, dict(cluster.labels)) == ("cluster-1", {"owner": "me"})
    assert client.state(cluster_id) == "RUNNING"

    job_operation, job = client.submit(cluster_id)
    deletion = client.call("ClusterService.Delete", cluster_id=cluster_id)
    assert (client.state(cluster_id), client.job_state(job)) == ("STOPPING", "ERROR")
    assert "deleted" in client.operation(job_operation).error.message
    clock.sleep(30)
    assert client.operation(deletion).HasField("response")
    for method in ("ClusterService.Get", "ClusterService.Delete", "JobService.List"):
        with refused("NOT_FOUND", cluster_id):
            client.call(method, cluster_id=cluster_id)


# --- Jobs


def test_a_job_passes_through_its_states(client: Client, clock: FakeClock):
    results: list[str] = []
    script = JobScript(seconds=20, effect=lambda: results.append("report"))
    client.cloud.run_job, client.cloud.job_start_seconds = lambda request: script, 10
    cluster_id = client.cloud.add_cluster("cluster-1")
    operation, job = client.submit(cluster_id, args=["--request", "s3a://bucket/request.json"])
    states = []
    for _ in range(7):
        states.append(client.job_state(job))
        clock.sleep(5)
    assert states == ["PROVISIONING", "PENDING", "RUNNING", "RUNNING", "RUNNING", "RUNNING", "DONE"]
    assert results == ["report"]
    done = client.call("JobService.Get", **job)
    assert list(done.pyspark_job.args) == ["--request", "s3a://bucket/request.json"]
    assert done.finished_at.ToSeconds() - done.started_at.ToSeconds() == 20
    assert client.operation(operation).HasField("response")
    with refused("FAILED_PRECONDITION", "DONE"):
        client.call("JobService.Cancel", **job)


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


def shell_spark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, **environment: str) -> SparkSubmit:
    """Jobs by a spark-submit that is the shell script `body`; files exist unless "missing" is in their name."""

    def fetch(uri: str, target: Path) -> None:
        if "missing" in uri:
            raise FileNotFoundError(f"{uri} does not exist")
        target.write_text(f"# {uri}\n")

    home = tmp_path / "spark"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "java").touch()
    (home / "bin" / "spark-submit").write_text(f"#!/bin/sh\n{body}\n")
    (home / "bin" / "spark-submit").chmod(0o755)
    monkeypatch.setattr("ml_platform.dev.cloud.spark_submit.spark_home", lambda: str(home))
    properties = {"spark.jars.packages": "a:b:1", "spark.x": "cluster", "spark.jars": "/cluster.jar"}
    return SparkSubmit(properties, {"JAVA_HOME": str(home), **environment}, fetch=fetch)


def test_spark_submit_gets_what_the_job_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock):
    monkeypatch.setenv("CALLERS_SECRET", "not for the cluster")
    body = 'for a in "$@"; do echo "arg=$a"; done; env'
    spark = shell_spark(tmp_path, monkeypatch, body, AWS_ACCESS_KEY_ID="cluster-key")
    with FakeDataproc(tmp_path / "cloud", clock=clock, run_job=spark) as cloud:
        client, cluster_id = Client(cloud), cloud.add_cluster("cluster-1")
        _, job = client.submit(
            cluster_id,
            python_file_uris=["s3a://bucket/code.zip"],
            properties={"spark.x": "job", "spark.submit.deployMode": "cluster"},
            args=["--report", "a b"],
        )
        _, lost = client.submit(cluster_id, main_python_file_uri="s3a://bucket/missing.py")
        wait_for(lambda: client.job_state(job) == "DONE")
        wait_for(lambda: client.job_state(lost) == "ERROR")
        log = client.log(job)
        assert "s3a://bucket/missing.py does not exist" in client.log(lost)
    lines = log.splitlines()
    assert lines[lines.index("arg=--report") + 1] == "arg=a b"
    assert {"arg=spark.x=job", "arg=spark.jars.packages=a:b:1", "AWS_ACCESS_KEY_ID=cluster-key"} <= set(lines)
    assert any(line.endswith("/code.zip") for line in lines)
    assert "arg=spark.jars=/cluster.jar" in lines
    assert "CALLERS_SECRET" not in log
    assert "deployMode" not in log


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


@pytest.mark.parametrize(
    ("end", "body"),
    [
        ("polite", "trap 'echo bye; exit 1' TERM; echo up; sleep 300 & sleep 300 & wait"),
        ("stubborn", "trap '' TERM; echo up; sleep 300 & sleep 300; wait"),
        ("delete", "trap '' TERM; echo up; sleep 300 & sleep 300; wait"),
        ("DONE", "echo up; sleep 300 & sleep 300 & until [ -e $GO ]; do sleep 0.1; done"),
        ("ERROR", "echo up; sleep 300 & sleep 300 & until [ -e $GO ]; do sleep 0.1; done; exit 3"),
    ],
)
def test_no_process_outlives_its_job(
    end: str, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: FakeClock
):
    monkeypatch.setattr("ml_platform.dev.cloud.spark_submit.GRACE_SECONDS", 30 if end == "polite" else 0.3)
    directory, go = tmp_path / "cloud", tmp_path / "go"
    spark = shell_spark(tmp_path, monkeypatch, body, GO=str(go))
    with FakeDataproc(directory, clock=clock, run_job=spark) as cloud:
        client, cluster_id = Client(cloud), cloud.add_cluster("cluster-1")
        _, job = client.submit(cluster_id)
        wait_for(lambda: client.log(job) == "up\n" and len(processes_under(directory)) >= 3)
        assert client.job_state(job) == "RUNNING"
        if end == "delete":
            client.call("ClusterService.Delete", cluster_id=cluster_id)
            assert client.job_state(job) == "ERROR"
        elif end in ("DONE", "ERROR"):
            go.touch()
            wait_for(lambda: client.job_state(job) == end)
        else:
            client.call("JobService.Cancel", **job)
            wait_for(lambda: client.job_state(job) == "CANCELLED")
            assert ("bye" in client.log(job)) == (end == "polite")
        wait_for(lambda: not processes_under(directory))


@pytest.mark.e2e
def test_dev_cloud_runs_until_it_is_interrupted(tmp_path: Path):
    command = [sys.executable, "-m", "ml_platform.cli.main", "dev-cloud", "--directory", "a cloud"]
    environment = tmp_path / "a cloud" / "environment"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: environment.exists() and environment.read_text() != "", 120)
            assert stat.S_IMODE(environment.stat().st_mode) == 0o600
            values = dict(word.split("=", 1) for word in shlex.split(environment.read_text()))
            credentials = grpc.ssl_channel_credentials(Path(values["YC_ROOT_CERTIFICATES_FILE"]).read_bytes())
            with grpc.secure_channel(values["YC_API_ENDPOINT"], credentials) as channel:
                ApiEndpointServiceStub(channel).List(ListApiEndpointsRequest(), timeout=30)
        finally:
            # Python loses a signal that arrives within a callback; a user would press the keys again.
            for _ in range(6):
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    printed = process.communicate(timeout=10)[0]
                    break
            else:
                process.kill()
    assert f"set -a; . '{environment}'; set +a" in printed
    wait_for(lambda: not processes_under(tmp_path))
