"""The client of the Data Proc API: names, requests, retries, waits, credentials, logs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st
from yandex.cloud.dataproc.v1 import cluster_pb2, job_pb2, job_service_pb2

from ml_platform.dataproc import api as dataproc_api
from ml_platform.dataproc.api import (
    COMING,
    FINISHED_JOB,
    RETRY_FOR_S,
    UNFINISHED_JOB,
    UNUSABLE,
    USABLE,
    ClusterSpec,
    DataprocApi,
    DataprocError,
    PysparkJob,
    WaitTimeout,
    cluster_name,
    create_request,
    job_name,
    slug,
)
from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.dev.cloud.fake_dataproc import FakeDataproc, JobScript, Outcome
from ml_platform.dev.cloud.proto_validation import violations
from ml_platform_tests.fakes_cloud import FakeClock, api_of, cluster_fields

JOB = PysparkJob("s3a://bucket/main.py", ["s3a://bucket/code.zip"], ["--request", "s3a://bucket/request.json"])
LABELS = {"owner": "ml-platform", "deployment": "test", "dagster-run-id": "some-run", "expires-at": "1"}

spec = ClusterSpec(folder_id="folder", subnet_id="subnet", service_account_id="account")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def script() -> dict[str, Any]:
    """What the next jobs do."""
    return {"seconds": 60.0}


@pytest.fixture
def cloud(tmp_path: Path, clock: FakeClock, script: dict[str, Any]) -> Iterator[FakeDataproc]:
    run_job = lambda request: JobScript(**script)  # noqa: E731
    with FakeDataproc(tmp_path, clock=clock, run_job=run_job, create_seconds=60, delete_seconds=20) as cloud:
        yield cloud


@pytest.fixture
def api(cloud: FakeDataproc, clock: FakeClock) -> DataprocApi:
    return api_of(cloud, clock)


def spec_for(cloud: FakeDataproc, **fields: Any) -> ClusterSpec:
    return ClusterSpec(**cluster_fields(cloud) | fields)


def codes(cloud: FakeDataproc, method: str) -> list[str]:
    return [call["code"] for call in cloud.calls(method)]


def ignore(text: str) -> None:
    pass


# --- Signals

#: Calls of the API that are interrupted at any instant, a thousand times.
INTERRUPTED = """
import random, signal, sys
from ml_platform.dataproc.api import DataprocApi

class Told(BaseException):
    pass

def handler(number, frame):
    raise Told

api = DataprocApi(endpoint=sys.argv[1], root_certificates_file=sys.argv[2], service_account_key_file=sys.argv[3])
assert api.get_cluster("none") is None
signal.signal(signal.SIGALRM, handler)
told = 0
for _ in range(1000):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 3e-3))
        while True:
            api.get_cluster("none")
    except Told:
        told += 1
    assert api.get_cluster("none") is None
print(told)
"""


def test_a_call_may_be_interrupted_at_any_instant(cloud: FakeDataproc):
    """What a signal's handler raises within gRPC's own callback corrupts the heap."""
    files = [str(file) for file in (cloud.root_certificates_file, cloud.service_account_key_file)]
    command = [sys.executable, "-c", INTERRUPTED, cloud.endpoint, *files]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1000\n"), done.stderr


def test_a_call_that_was_interrupted_ends_before_the_next_begins():
    """Else a cluster could be created after nobody was found by its name."""
    ended: list[str] = []
    released = threading.Event()

    def create() -> None:
        released.wait(30)
        ended.append("create")

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    # Not at once: what comes as the main thread is about to wait, Python handles when it has waited.
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGUSR1]).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            dataproc_api._uninterrupted(create)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ended == []
    released.set()
    assert dataproc_api._uninterrupted(lambda: list(ended)) == ["create"]


def test_all_calls_are_made_in_one_thread():
    threads = {dataproc_api._uninterrupted(threading.current_thread) for _ in range(3)}
    assert len(threads) == 1
    assert threads.isdisjoint({threading.current_thread()})
    with pytest.raises(ZeroDivisionError):
        dataproc_api._uninterrupted(lambda: 1 // 0)
    assert dataproc_api._uninterrupted(threading.current_thread) in threads


# --- Names and labels

#: Names of people's deployments, and of their enemies.
texts = st.one_of(
    st.text(max_size=100),
    st.text(alphabet="aA-_./ 0Ж\n\"'\\", max_size=80),
    st.text(alphabet=st.characters(), max_size=10),  # lone surrogates as well
)


@given(deployment=texts, run_id=texts, lake=texts, attempt=st.integers(1, 999))
def test_any_deployment_has_a_name_and_labels_that_the_api_takes(deployment: str, run_id: str, lake: str, attempt: int):
    encodable = [text.encode("utf-8", "replace").decode() for text in (deployment, lake)]
    engine = DataprocEngine(deployment=encodable[0], lake_uri=encodable[1], cluster=spec.model_dump())
    request = create_request(spec, cluster_name(deployment, run_id, attempt), engine.labels(run_id, 1.6e9))
    assert violations(request) == []
    assert request.name


@given(job=st.sampled_from(["clean_transactions", "build_features", "train_model", "x"]), label=texts)
def test_any_label_makes_a_job_name_that_the_api_takes(job: str, label: str):
    request = job_service_pb2.CreateJobRequest(cluster_id="c", name=job_name(job, label, 12))
    request.pyspark_job.main_python_file_uri = "s3a://bucket/main.py"
    assert violations(request) == []
    assert request.name


@given(first=texts, second=texts, length=st.integers(20, 63))
def test_different_texts_stay_different(first: str, second: str, length: int):
    slugs = {slug(text, length) for text in (first, second)}
    assert len(slugs) == len({first, second})
    assert all(len(text) <= length for text in slugs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("production", "production"),
        ("team-a-2", "team-a-2"),
        ("", ""),
        ("Production", "production-"),
        ("team_a", "team-a-"),
        ("-a-", "a-"),
        ("бой", ""),
        ("a" * 31, "a" * 21 + "-"),
    ],
)
def test_what_need_not_be_changed_is_kept(text: str, expected: str):
    if re.fullmatch("[a-z0-9-]*[a-z0-9]|", text) and len(text) <= 30:
        assert slug(text, 30) == expected
    else:
        assert re.fullmatch(re.escape(expected) + "[0-9a-f]{8}", slug(text, 30))


def test_names_say_whose_they_are():
    run_id = "7f9c24e5-1d3b-4c5a-9e8f-0a1b2c3d4e5f"
    assert cluster_name("yandex", run_id, 1).startswith("mlp-yandex-7f9c24e5-1d3b-4c5a-9e8f")
    names = {cluster_name("yandex", run_id, 1), cluster_name("yandex", run_id, 2)}
    # Runs differ in the last characters too, which are cut.
    names |= {cluster_name("yandex", run_id[:-1] + "0", 1), cluster_name("yandex-2", run_id, 1)}
    assert len(names) == 4
    assert job_name("clean_transactions", "", 1) == "clean-transactions-1"
    assert job_name("train_model", "2020-01-31", 2) == "train-model-2020-01-31-2"


# --- The request for a cluster


def as_dict(request: Any) -> dict[str, Any]:
    return MessageToDict(request, preserving_proto_field_name=True)


def test_the_default_cluster_is_the_old_pipelines():
    labels = {"owner": "ml-platform", "deployment": "yandex", "dagster-run-id": "run", "expires-at": "1600000000"}
    request = create_request(ClusterSpec(**spec.model_dump(exclude_unset=True)), "name", labels)
    assert violations(request) == []
    assert as_dict(request) == {
        "folder_id": "folder",
        "name": "name",
        "description": "Made by ml_platform for one run; deleted at its end.",
        "labels": labels,
        "config_spec": {
            "version_id": "2.0",
            "hadoop": {"services": ["YARN", "SPARK", "HDFS", "MAPREDUCE"]},
            "subclusters_spec": [
                {
                    "name": "master",
                    "role": "MASTERNODE",
                    "resources": {
                        "resource_preset_id": "s3-c2-m8",
                        "disk_type_id": "network-ssd",
                        "disk_size": str(40 << 30),
                    },
                    "subnet_id": "subnet",
                    "hosts_count": "1",
                },
                {
                    "name": "data",
                    "role": "DATANODE",
                    "resources": {
                        "resource_preset_id": "s3-c4-m16",
                        "disk_type_id": "network-hdd",
                        "disk_size": str(128 << 30),
                    },
                    "subnet_id": "subnet",
                    "hosts_count": "3",
                },
            ],
        },
        "zone_id": "ru-central1-a",
        "service_account_id": "account",
        "ui_proxy": True,
    }


#: Each option: a value that is not its default, where it is in the request, and as what.
SCALING = "config_spec.subclusters_spec.2.autoscaling_config"
OPTIONS: dict[str, tuple[Any, str, Any]] = {
    "folder_id": ("f", "folder_id", "f"),
    "zone": ("ru-central1-d", "zone_id", "ru-central1-d"),
    "subnet_id": ("s", "config_spec.subclusters_spec.1.subnet_id", "s"),
    "security_group_ids": (["g1", "g2"], "security_group_ids", ["g1", "g2"]),
    "service_account_id": ("a", "service_account_id", "a"),
    "autoscaling_service_account_id": ("b", "autoscaling_service_account_id", "b"),
    "ssh_public_key": ("ssh-ed25519 AAAA", "config_spec.hadoop.ssh_public_keys", ["ssh-ed25519 AAAA"]),
    "bucket": ("logs", "bucket", "logs"),
    "description": ("mine", "description", "mine"),
    "labels": ({"team": "fraud"}, "labels.team", "fraud"),
    "image_version": ("2.1", "config_spec.version_id", "2.1"),
    "services": (["YARN", "SPARK", "HDFS"], "config_spec.hadoop.services", ["YARN", "SPARK", "HDFS"]),
    "properties": (
        {"spark:spark.sql.shuffle.partitions": "8"},
        "config_spec.hadoop.properties",
        {"spark:spark.sql.shuffle.partitions": "8"},
    ),
    "initialization_actions": (
        [{"uri": "s3a://bucket/init.sh", "args": ["x"], "timeout": 60}],
        "config_spec.hadoop.initialization_actions",
        [{"uri": "s3a://bucket/init.sh", "args": ["x"], "timeout": "60"}],
    ),
    "oslogin": (True, "config_spec.hadoop.oslogin_enabled", True),
    "ui_proxy": (False, "ui_proxy", None),
    "log_group_id": ("group", "log_group_id", "group"),
    "host_group_ids": (["h"], "host_group_ids", ["h"]),
    "public_ip": (True, "config_spec.subclusters_spec.0.assign_public_ip", True),
    "environment": ("PRESTABLE", "environment", "PRESTABLE"),
    **{
        f"{role}_{field}": (value, f"config_spec.subclusters_spec.{index}.{path}", expected)
        for index, role in enumerate(("master", "data", "compute"))
        for field, value, path, expected in (
            ("preset", "m3-c8-m64", "resources.resource_preset_id", "m3-c8-m64"),
            ("disk_type", "network-ssd-io-m3", "resources.disk_type_id", "network-ssd-io-m3"),
            ("disk_size_gb", 93, "resources.disk_size", str(93 << 30)),
        )
    },
    "data_count": (5, "config_spec.subclusters_spec.1.hosts_count", "5"),
    "compute_count": (2, "config_spec.subclusters_spec.2.hosts_count", "2"),
    "compute_max_count": (9, f"{SCALING}.max_hosts_count", "9"),
    "compute_preemptible": (True, f"{SCALING}.preemptible", True),
    "compute_measurement_s": (90, f"{SCALING}.measurement_duration", "90s"),
    "compute_warmup_s": (91, f"{SCALING}.warmup_duration", "91s"),
    "compute_stabilization_s": (92, f"{SCALING}.stabilization_duration", "92s"),
    "compute_cpu_target": (70.0, f"{SCALING}.cpu_utilization_target", 70.0),
    "compute_decommission_s": (93, f"{SCALING}.decommission_timeout", "93"),
}


def at(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value.get(part)
    return value


def test_every_option_is_tested():
    assert set(OPTIONS) == set(ClusterSpec.model_fields)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_reaches_the_request(option: str):
    value, path, expected = OPTIONS[option]
    others = {"compute_count": 1, "compute_max_count": 4} if option.startswith("compute_") else {}
    changed = ClusterSpec(**{**spec.model_dump(exclude_unset=True), **others, option: value})
    assert value != ClusterSpec(**spec.model_dump(exclude_unset=True)).model_dump()[option]
    request = create_request(changed, "name", LABELS)
    assert violations(request) == []
    assert at(as_dict(request), path) == expected


def test_all_options_together_are_accepted(cloud: FakeDataproc, api: DataprocApi):
    account = cloud.service_account_id
    values = {option: value for option, (value, _, _) in OPTIONS.items()} | cluster_fields(cloud)
    all_of_them = ClusterSpec(**values | {"zone": cloud.zone, "autoscaling_service_account_id": account})
    cluster_id, _ = api.create_cluster(all_of_them, "everything", LABELS)
    assert cluster_id in cloud.clusters


def test_only_the_master_gets_a_public_address():
    specs = as_dict(create_request(spec.model_copy(update={"public_ip": True, "compute_count": 1}), "name", {}))
    assert [one.get("assign_public_ip") for one in specs["config_spec"]["subclusters_spec"]] == [True, None, None]


def test_a_fixed_number_of_compute_nodes_does_not_scale():
    request = create_request(spec.model_copy(update={"compute_count": 2}), "name", {})
    assert not request.config_spec.subclusters_spec[2].HasField("autoscaling_config")


def test_a_cluster_without_data_nodes():
    light = spec.model_copy(update={"data_count": 0, "compute_count": 2, "services": ["YARN", "SPARK"]})
    request = create_request(light, "name", {})
    assert [one.name for one in request.config_spec.subclusters_spec] == ["master", "compute"]


def test_the_platforms_labels_win():
    request = create_request(spec.model_copy(update={"labels": {"owner": "me", "team": "x"}}), "name", LABELS)
    assert dict(request.labels) == {**LABELS, "team": "x"}


def test_a_service_that_the_api_does_not_have_is_named():
    with pytest.raises(DataprocError, match=r"the settings of the cluster do not fit the API: .*SPARKLE"):
        create_request(spec.model_copy(update={"services": ["YARN", "SPARKLE"]}), "name", {})


# --- States


def test_every_state_that_the_api_publishes_has_a_meaning():
    assert set(cluster_pb2.Cluster.Status.keys()) - {"STATUS_UNKNOWN"} == COMING | USABLE | UNUSABLE
    assert set(job_pb2.Job.Status.keys()) - {"STATUS_UNSPECIFIED"} == UNFINISHED_JOB | FINISHED_JOB
    assert not COMING & USABLE
    assert not (COMING | USABLE) & UNUSABLE
    assert not UNFINISHED_JOB & FINISHED_JOB


@pytest.mark.parametrize("status", [0, 77])
def test_an_unknown_state_raises(cloud: FakeDataproc, api: DataprocApi, status: int):
    cluster_id = cloud.add_cluster("cluster-1", status=status)
    with pytest.raises(DataprocError, match=f"cluster {cluster_id} is in a state that this version does not know"):
        api.get_cluster(cluster_id)
    # What only lists clusters, to delete some, must not stumble over it.
    assert [cluster.id for cluster in api.list_clusters(cloud.folder_id)] == [cluster_id]


# --- Pages


def test_a_list_of_many_pages(cloud: FakeDataproc, api: DataprocApi):
    ids = [cloud.add_cluster(f"cluster-{number}", LABELS) for number in range(250)]
    found = list(api.list_clusters(cloud.folder_id))
    assert [cluster.id for cluster in found] == ids
    assert len(cloud.calls("ClusterService.List")) == 3
    assert found[0].labels == LABELS
    assert found[0].status == "RUNNING"
    assert found[0].created_at == int(cloud.now())
    assert [cluster.id for cluster in api.list_clusters(cloud.folder_id, name="cluster-7")] == ids[7:8]


def test_pages_that_go_in_a_circle(cloud: FakeDataproc, api: DataprocApi):
    for number in range(101):
        cloud.add_cluster(f"cluster-{number}")

    def first_again(request: Any, page: Any) -> Any:
        return type(page)(clusters=page.clusters, next_page_token=request.page_token or token)

    token = ""
    cloud.answer("ClusterService.List", lambda request, page: keep(page))

    def keep(page: Any) -> Any:
        nonlocal token
        token = page.next_page_token
        return page

    cloud.answer("ClusterService.List", first_again, times=10)
    with pytest.raises(DataprocError, match="pages go in a circle"):
        list(api.list_clusters(cloud.folder_id))
    assert len(cloud.calls("ClusterService.List")) <= 3


# --- Retries


@pytest.mark.parametrize("code", [code.name for code in grpc.StatusCode if code.name not in ("OK", "UNAUTHENTICATED")])
@pytest.mark.parametrize("method", ["Get", "Create", "Delete"])
def test_what_is_repeated(cloud: FakeDataproc, api: DataprocApi, clock: FakeClock, method: str, code: str):
    cluster_id = cloud.add_cluster("cluster-1")
    cloud.fail(f"ClusterService.{method}", code, "because", times=2)
    calls: dict[str, Callable[[], Any]] = {
        "Get": lambda: api.get_cluster(cluster_id),
        "Create": lambda: api.create_cluster(spec_for(cloud), "cluster-2", LABELS),
        "Delete": lambda: api.request_deletion(cluster_id),
    }
    repeated = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "INTERNAL"}
    if method != "Create":
        repeated.add("RESOURCE_EXHAUSTED")
    if code in repeated:
        calls[method]()
        assert codes(cloud, f"ClusterService.{method}") == [code, code, "OK"]
        first, second = clock.slept
        assert 0.5 <= first <= 1
        assert 1 <= second <= 2
        return
    if code == "NOT_FOUND" and method != "Create":
        assert not calls[method]()
    else:
        with pytest.raises(DataprocError, match=rf"{code}: because|is taken by") as caught:
            calls[method]()
        assert caught.value.code == code
    assert codes(cloud, f"ClusterService.{method}") == [code]
    assert clock.slept == []


def test_a_call_is_repeated_for_three_minutes_with_growing_jittered_pauses(
    cloud: FakeDataproc, api: DataprocApi, clock: FakeClock
):
    cloud.fail("ClusterService.Get", "UNAVAILABLE", times=1000)
    runs = []
    for _ in range(5):
        clock.slept.clear()
        with pytest.raises(DataprocError, match=r"get cluster: UNAVAILABLE: .*check YC_API_ENDPOINT"):
            api.get_cluster("some-id")
        runs.append(list(clock.slept))
    for slept in runs:
        for number, pause in enumerate(slept):
            longest = min(30, 2**number)
            assert longest / 2 <= pause <= longest
        assert RETRY_FOR_S - 30 <= sum(slept) <= RETRY_FOR_S
    assert len({tuple(slept) for slept in runs}) == len(runs), "no jitter"


def test_an_answer_that_does_not_come_in_time(cloud: FakeDataproc, api: DataprocApi, monkeypatch: pytest.MonkeyPatch):
    cluster_id = cloud.add_cluster("cluster-1")
    api.get_cluster(cluster_id)
    monkeypatch.setattr(dataproc_api, "CALL_TIMEOUT_S", 0.2)
    cloud.delay("ClusterService.Get", 1.0)
    found = api.get_cluster(cluster_id)
    assert found is not None
    assert found.id == cluster_id


@pytest.mark.parametrize("method", ["ApiEndpointService.List", "IamTokenService.Create"])
def test_a_call_of_the_sdk_itself_that_is_not_answered_in_time(
    cloud: FakeDataproc, api: DataprocApi, monkeypatch: pytest.MonkeyPatch, method: str
):
    """All calls of a process are made in one thread, which it would hold up."""
    # Limits by configuration end up to a second too soon, by gRPC's own clock.
    monkeypatch.setattr(dataproc_api, "CALL_TIMEOUT_S", 2.5)
    cloud.delay(method, 30.0)
    started = time.monotonic()
    assert api.get_cluster("some-id") is None
    assert time.monotonic() - started < 15


def test_a_create_whose_answer_is_late_makes_one_cluster(
    cloud: FakeDataproc, api: DataprocApi, monkeypatch: pytest.MonkeyPatch
):
    cloud.fail("ClusterService.Create", "DEADLINE_EXCEEDED", after=True)
    cluster_id, operation_id = api.create_cluster(spec_for(cloud), "cluster-1", LABELS)
    assert (list(cloud.clusters), operation_id) == ([cluster_id], "")


# --- Clusters


def test_a_create_finds_its_own_cluster(cloud: FakeDataproc, api: DataprocApi):
    first, _ = api.create_cluster(spec_for(cloud), "cluster-1", LABELS)
    # It expires later, as it is asked for later.
    assert api.create_cluster(spec_for(cloud), "cluster-1", {**LABELS, "expires-at": "2"}) == (first, "")


@pytest.mark.parametrize("label", ["owner", "deployment", "dagster-run-id"])
def test_a_create_takes_over_nobody_elses(cloud: FakeDataproc, api: DataprocApi, label: str):
    cloud.add_cluster("cluster-1", {**LABELS, label: "other"})
    with pytest.raises(DataprocError, match="taken by a cluster that this run did not make") as caught:
        api.create_cluster(spec_for(cloud), "cluster-1", LABELS)
    assert caught.value.code == "ALREADY_EXISTS"


def test_a_cluster_comes_and_goes(cloud: FakeDataproc, api: DataprocApi, clock: FakeClock):
    said: list[str] = []
    cluster_id, operation_id = api.create_cluster(spec_for(cloud), "cluster-1", LABELS)
    wait = {"timeout_s": 600, "poll_s": 10, "say": said.append}
    api.wait_until_usable(cluster_id, operation_id, **wait)
    found = api.get_cluster(cluster_id)
    assert found is not None
    assert (found.name, found.status, found.labels) == ("cluster-1", "RUNNING", LABELS)
    api.delete_cluster(cluster_id, **wait)
    assert cloud.clusters == {}
    assert list(dict.fromkeys(said)) == [
        f"cluster {cluster_id}: {state}" for state in ("CREATING", "RUNNING", "STOPPING")
    ]


def test_deletions_that_have_nothing_to_do(cloud: FakeDataproc, api: DataprocApi):
    stopping = cloud.add_cluster("cluster-1", status=cluster_pb2.Cluster.STOPPING)
    assert api.request_deletion(stopping) is True
    assert api.request_deletion("gone") is False
    cluster_id = cloud.add_cluster("cluster-2")
    assert api.request_deletion(cluster_id) is True
    assert api.request_deletion(cluster_id) is True
    assert codes(cloud, "ClusterService.Delete")[-2:] == ["OK", "FAILED_PRECONDITION"]
    api.delete_cluster("gone", timeout_s=10, poll_s=1, say=ignore)


def test_a_deletion_is_asked_for_again(cloud: FakeDataproc, api: DataprocApi):
    cluster_id = cloud.add_cluster("cluster-1")
    cloud.script_delete(Outcome(error="INTERNAL"), times=2)
    cloud.fail("ClusterService.Delete", "FAILED_PRECONDITION", times=2)
    api.delete_cluster(cluster_id, timeout_s=900, poll_s=10, say=ignore)
    assert cloud.clusters == {}
    assert codes(cloud, "ClusterService.Delete") == ["FAILED_PRECONDITION"] * 2 + ["OK"] * 3


def test_a_deletion_that_may_not_be_is_not_waited_for(cloud: FakeDataproc, api: DataprocApi, clock: FakeClock):
    cluster_id = cloud.add_cluster("cluster-1")
    cloud.fail("ClusterService.Delete", "PERMISSION_DENIED", "not you")
    with pytest.raises(DataprocError, match=r"not you.*roles"):
        api.delete_cluster(cluster_id, timeout_s=900, poll_s=10, say=ignore)
    assert clock.slept == []


def test_a_deletion_that_is_always_refused_says_why(cloud: FakeDataproc, api: DataprocApi, clock: FakeClock):
    cluster_id = cloud.add_cluster("cluster-1", deletion_protection=True)
    with pytest.raises(DataprocError, match=r"waited 900 s in vain for .* to be deleted: .*deletion_protection"):
        api.delete_cluster(cluster_id, timeout_s=900, poll_s=10, say=ignore)
    assert sum(clock.slept) == pytest.approx(900)


# --- Jobs


@pytest.fixture
def cluster_id(cloud: FakeDataproc) -> str:
    return cloud.add_cluster("cluster-1", LABELS)


def test_a_job_is_submitted_once(cloud: FakeDataproc, api: DataprocApi, cluster_id: str, clock: FakeClock):
    cloud.fail("JobService.Create", "UNAVAILABLE", after=True)
    job_id = api.submit_job(cluster_id, "job-1", JOB)
    assert api.submit_job(cluster_id, "job-1", JOB) == job_id
    assert list(cloud.jobs) == [job_id]
    other = api.submit_job(cluster_id, "job-10", JOB)
    assert other != job_id
    clock.sleep(61)
    job = api.get_job(cluster_id, job_id)
    assert (job.id, job.name, job.status) == (job_id, "job-1", "DONE")
    assert job.yarn_application.startswith("application_")
    assert [job.id for job in api.list_jobs(cluster_id)] == [job_id, other]


def test_a_job_on_a_cluster_that_is_gone(api: DataprocApi):
    with pytest.raises(DataprocError) as caught:
        api.submit_job("gone", "job-1", JOB)
    assert caught.value.code == "NOT_FOUND"


def test_cancelling(cloud: FakeDataproc, api: DataprocApi, cluster_id: str, clock: FakeClock):
    job_id = api.submit_job(cluster_id, "job-1", JOB)
    api.cancel_job(cluster_id, job_id)
    clock.sleep(1)
    assert api.get_job(cluster_id, job_id).status == "CANCELLED"
    # It has ended, or its cluster is gone: nothing to cancel.
    api.cancel_job(cluster_id, job_id)
    api.cancel_job("gone", job_id)
    cloud.fail("JobService.Cancel", "PERMISSION_DENIED")
    with pytest.raises(DataprocError, match="cancel job"):
        api.cancel_job(cluster_id, job_id)


LINES = [(float(second), f"{second:03} größe\n") for second in range(0, 60, 3)]


@pytest.mark.parametrize("token_at_end", [False, True])
@pytest.mark.parametrize("page_bytes", [7, 40, 1 << 20])
def test_a_log_is_read_as_it_grows(
    cloud: FakeDataproc,
    api: DataprocApi,
    cluster_id: str,
    clock: FakeClock,
    script: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    token_at_end: bool,
    page_bytes: int,
):
    monkeypatch.setattr(dataproc_api, "LOG_PAGE_BYTES", page_bytes)
    cloud.log_token_at_end = token_at_end
    script["log"] = LINES
    job_id = api.submit_job(cluster_id, "job-1", JOB)
    log = api.driver_log(cluster_id, job_id)
    parts = []
    for _ in range(8):
        # A reading that fails half-way loses nothing.
        cloud.fail("JobService.ListLog", "UNAVAILABLE", when=lambda request: bool(request.page_token))
        for _ in range(3):
            try:
                parts.append(log.read())
                break
            except DataprocError:
                pass
        clock.sleep(10)
    assert "".join(parts) == "".join(text for _, text in LINES)
    assert len([part for part in parts if part]) > 3
    assert log.read() == ""


# --- Waiting


@pytest.mark.parametrize("poll_s", [0.1, 10.0, 60.0])
def test_pauses_grow_to_the_longest(api: DataprocApi, clock: FakeClock, poll_s: float):
    with pytest.raises(WaitTimeout, match="waited 1000 s in vain for godot"):
        api.wait(lambda: None, timeout_s=1000, poll_s=poll_s, what="godot")
    slept = clock.slept
    assert sum(slept) == pytest.approx(1000)
    for number, pause in enumerate(slept[:-1]):
        expected = min(poll_s, poll_s / 5 * 1.5 ** min(number, 10))
        assert 0.8 * expected <= pause <= 1.2 * expected
    assert slept[-1] <= 1.2 * poll_s


def test_what_is_there_already_is_not_waited_for(api: DataprocApi, clock: FakeClock):
    assert api.wait(lambda: 0, timeout_s=0, poll_s=10, what="it") == 0
    assert clock.slept == []


def test_the_last_look_is_after_the_deadline(api: DataprocApi, clock: FakeClock):
    deadline = clock.time() + 100
    found = api.wait(lambda: clock.time() >= deadline or None, timeout_s=100, poll_s=30, what="it")
    assert found is True


# --- Credentials


@pytest.mark.parametrize("way", ["key", "token", "metadata"])
def test_ways_to_sign_in(
    cloud: FakeDataproc, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, cluster_id: str, way: str
):
    monkeypatch.setenv("YC_METADATA_ADDR", cloud.metadata_address)
    ways: dict[str, dict[str, Any]] = {
        "key": {"service_account_key_file": cloud.service_account_key_file},
        "token": {"iam_token": cloud.iam_token()},
        "metadata": {"iam_token": None},
    }
    api = api_of(cloud, clock, **ways[way])
    assert api.get_cluster(cluster_id) is not None
    clock.sleep(cloud.token_lifetime_seconds + 1)
    if way == "token":
        # Nobody can renew it; asking again would not help.
        with pytest.raises(DataprocError, match=r"UNAUTHENTICATED: The token has expired .*YC_IAM_TOKEN"):
            api.get_cluster(cluster_id)
        assert codes(cloud, "ClusterService.Get") == ["OK", "UNAUTHENTICATED"]
    else:
        assert api.get_cluster(cluster_id) is not None
        assert codes(cloud, "ClusterService.Get") == ["OK", "UNAUTHENTICATED", "OK"]


@pytest.mark.parametrize(("has_worked", "attempts"), [(False, 1), (True, 2)])
def test_a_key_that_is_not_accepted_is_no_endless_renewal(
    cloud: FakeDataproc, api: DataprocApi, cluster_id: str, has_worked: bool, attempts: int
):
    if has_worked:
        api.get_cluster(cluster_id)
    cloud.fail("ClusterService.Get", "UNAUTHENTICATED", times=1000)
    with pytest.raises(DataprocError, match=r"UNAUTHENTICATED.*YC_SERVICE_ACCOUNT_KEY_FILE"):
        api.get_cluster(cluster_id)
    assert codes(cloud, "ClusterService.Get").count("UNAUTHENTICATED") == attempts


def test_clients_of_a_process_share_connections(cloud: FakeDataproc, clock: FakeClock):
    for _ in range(3):
        assert api_of(cloud, clock).get_cluster("some-id") is None
    assert len(cloud.calls("ApiEndpointService.List")) == 1, "each connection asks once where the services are"


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "YC_SERVICE_ACCOUNT_KEY_FILE: cannot read .*key.json: No such file"),
        ("no JSON", "YC_SERVICE_ACCOUNT_KEY_FILE: .*key.json is no authorized key: .*yc iam key create"),
        ("[]", "is no authorized key"),
        ('{"id": "x", "service_account_id": "y"}', "with id, service_account_id, private_key"),
        ('{"id": "x", "service_account_id": "y", "private_key": 1}', "is no authorized key"),
        # The SDK says what is wrong with the key itself.
        ('{"id": "x", "service_account_id": "y", "private_key": "top secret"}', "YC_SERVICE_ACCOUNT_KEY_FILE"),
        (
            '{"id": "x", "service_account_id": "y", '
            '"private_key": "-----BEGIN PRIVATE KEY-----\\ntop secret\\n-----END PRIVATE KEY-----"}',
            "YC_SERVICE_ACCOUNT_KEY_FILE",
        ),
    ],
)
def test_an_unusable_key(cloud: FakeDataproc, clock: FakeClock, tmp_path: Path, content: str | None, error: str):
    file = tmp_path / "key.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataprocError, match=error) as caught:
        api_of(cloud, clock, service_account_key_file=file).get_cluster("some-id")
    assert "top secret" not in str(caught.value)
    assert clock.slept == [], "a key that cannot be used does not become better"


def test_a_key_of_another_account(cloud: FakeDataproc, clock: FakeClock, tmp_path: Path):
    key = json.loads(cloud.service_account_key_file.read_text())
    file = tmp_path / "key.json"
    file.write_text(json.dumps(key | {"id": "ajeunknown0000000000"}))
    with pytest.raises(DataprocError, match=r"JWT: unknown key id.*YC_SERVICE_ACCOUNT_KEY_FILE") as caught:
        api_of(cloud, clock, service_account_key_file=file).get_cluster("some-id")
    assert "PRIVATE" not in str(caught.value)


def test_no_credentials_at_all(cloud: FakeDataproc, clock: FakeClock, monkeypatch: pytest.MonkeyPatch):
    # Not on a VM of the cloud either.
    monkeypatch.setenv("YC_METADATA_ADDR", "127.0.0.1:9")
    with pytest.raises(
        DataprocError, match=r"UNAUTHENTICATED: cannot sign in.*YC_SERVICE_ACCOUNT_KEY_FILE or YC_IAM_TOKEN"
    ):
        api_of(cloud, clock, iam_token=None).get_cluster("some-id")
    assert clock.slept == []


def test_a_metadata_service_that_has_answered_before_is_waited_for(
    cloud: FakeDataproc, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, cluster_id: str
):
    monkeypatch.setenv("YC_METADATA_ADDR", cloud.metadata_address)
    api = api_of(cloud, clock, iam_token=None)
    assert api.get_cluster(cluster_id) is not None
    # A token is used for some seconds; then, and by a new connection, there is nobody to give another.
    api._sdk = None
    dataproc_api._sdk.cache_clear()
    monkeypatch.setenv("YC_METADATA_ADDR", "127.0.0.1:9")
    with pytest.raises(DataprocError, match="UNAVAILABLE: cannot sign in"):
        api.get_cluster(cluster_id)
    assert sum(clock.slept) > RETRY_FOR_S / 2


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"root_certificates_file": "/nowhere.pem"}, "YC_ROOT_CERTIFICATES_FILE: cannot read /nowhere.pem"),
        ({"root_certificates_file": None}, "UNAVAILABLE: .*YC_ROOT_CERTIFICATES_FILE"),
        ({"endpoint": "localhost:9"}, "UNAVAILABLE: .*YC_API_ENDPOINT"),
    ],
    ids=["no such file", "unknown authority", "nobody there"],
)
def test_a_wrong_address(cloud: FakeDataproc, clock: FakeClock, settings: dict[str, Any], error: str):
    right = {
        "endpoint": cloud.endpoint,
        "root_certificates_file": cloud.root_certificates_file,
        "service_account_key_file": cloud.service_account_key_file,
    }
    with pytest.raises(DataprocError, match=error):
        DataprocApi(**right | settings, clock=clock).get_cluster("some-id")


def test_a_folder_of_somebody_else(cloud: FakeDataproc, api: DataprocApi):
    with pytest.raises(DataprocError, match=r"list clusters: PERMISSION_DENIED: .*YC_FOLDER_ID"):
        list(api.list_clusters("other-folder"))
