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
from yandex.cloud.dataproc.v1 import cluster_pb2, job_pb2

from ml_platform.dataproc import api as dataproc_api
from ml_platform.dataproc.api import (
    FINISHED_JOB,
    RETRY_FOR_S,
    STARTING_STATES,
    UNFINISHED_JOB,
    DataprocApi,
    DataprocError,
    WaitTimeout,
    cluster_name,
    create_request,
    job_name,
    slug,
)
from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.dev.cloud.fake_dataproc import FakeDataproc, JobScript
from ml_platform.dev.cloud.proto_validation import violations
from ml_platform.settings import ClusterSettings, ClusterSpec, load_cluster_settings
from ml_platform_tests.fakes_cloud import FakeClock, api_of, cluster_fields

JOB = {"main_python_file_uri": "s3a://bucket/main.py", "python_file_uris": ["s3a://bucket/code.zip"], "args": ["x"]}
LABELS = {"owner": "ml-platform", "deployment": "test", "dagster-run-id": "some-run", "expires-at": "1"}
#: How deletions are waited for.
WAIT: dict[str, Any] = {"timeout_s": 900, "poll_s": 10}

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


@pytest.fixture
def cluster_id(cloud: FakeDataproc) -> str:
    return cloud.add_cluster("cluster-1", LABELS)


def create(cloud: FakeDataproc, api: DataprocApi, name: str = "cluster-2", **labels: str) -> tuple[str, str]:
    return api.create_cluster(ClusterSpec(**cluster_fields(cloud)), name, LABELS | labels)


def message(method: str, fields: dict[str, Any]) -> Any:
    return dataproc_api._stub_and_request(method, fields)[1]


def request_of(spec: ClusterSpec) -> dict[str, Any]:
    """The request for a cluster as the API gets it, which violates none of the proto's annotations."""
    request = message("ClusterService.Create", create_request(spec, "name", LABELS))
    assert violations(request) == []
    return MessageToDict(request, preserving_proto_field_name=True)


def codes(cloud: FakeDataproc, method: str) -> list[str]:
    return [call["code"] for call in cloud.calls(method)]


def ignore(text: str) -> None:
    pass


# --- Signals

#: Calls of the API that are interrupted at any instant, a thousand times.
INTERRUPTED = """
import random, signal, sys
from ml_platform.dataproc.api import DataprocApi

class Interrupt(BaseException):
    pass

def handler(number, frame):
    raise Interrupt

api = DataprocApi(endpoint=sys.argv[1], root_certificates_file=sys.argv[2], service_account_key_file=sys.argv[3])
assert api.get_cluster("none") is None
signal.signal(signal.SIGALRM, handler)
interrupts = 0
for _ in range(1000):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 3e-3))
        while True:
            api.get_cluster("none")
    except Interrupt:
        interrupts += 1
    assert api.get_cluster("none") is None
print(interrupts)
"""


def test_a_call_may_be_interrupted_at_any_instant(cloud: FakeDataproc):
    """An exception that a signal handler raises inside a callback of gRPC corrupts the heap."""
    files = [str(file) for file in (cloud.root_certificates_file, cloud.service_account_key_file)]
    command = [sys.executable, "-c", INTERRUPTED, cloud.endpoint, *files]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1000\n"), done.stderr


class Interrupt(BaseException):
    """Raised by a signal's handler."""


def test_a_create_that_was_interrupted_ends_before_the_next_call_begins(cloud: FakeDataproc, api: DataprocApi):
    """Otherwise the cluster could appear after the clean-up has looked for it."""

    def handler(number: int, frame: Any) -> None:
        raise Interrupt

    assert api.get_cluster("none") is None
    cloud.delay("ClusterService.Create", 600.0)
    before = signal.signal(signal.SIGUSR1, handler)
    # Not at once: a signal that comes as the main thread is about to wait is handled after the wait.
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGUSR1])
    timer.start()
    try:
        with pytest.raises(Interrupt):
            create(cloud, api)
        assert cloud.clusters == {}
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    cloud.end_delays()
    found = api.find_cluster(cloud.folder_id, "cluster-2", LABELS)
    assert found is not None
    assert list(cloud.clusters) == [found.id]


def test_all_calls_are_made_in_one_thread_that_survives_errors():
    threads = {dataproc_api._run_in_call_thread(threading.current_thread) for _ in range(3)}
    assert len(threads) == 1
    assert threads.isdisjoint({threading.current_thread()})
    with pytest.raises(ZeroDivisionError):
        dataproc_api._run_in_call_thread(lambda: 1 // 0)
    assert dataproc_api._run_in_call_thread(threading.current_thread) in threads


# --- Names and labels

#: Names of deployments, ordinary and hostile.
texts = st.one_of(
    st.text(max_size=100),
    st.text(alphabet="aA-_./ 0Ж\n\"'\\", max_size=80),
    st.text(alphabet=st.characters(), max_size=10),  # lone surrogates as well
)


@given(deployment=texts, run_id=texts, lake=texts, attempt=st.integers(1, 999))
def test_any_deployment_has_a_name_and_labels_that_the_api_takes(deployment: str, run_id: str, lake: str, attempt: int):
    encodable = [text.encode("utf-8", "replace").decode() for text in (deployment, lake)]
    engine = DataprocEngine(deployment=encodable[0], lake_uri=encodable[1], cluster=spec.model_dump())
    fields = create_request(spec, cluster_name(deployment, run_id, attempt), engine.labels(run_id, 1.6e9))
    assert violations(message("ClusterService.Create", fields)) == []
    assert fields["name"]


@given(job=st.sampled_from(["clean_transactions", "build_features", "train_model", "x"]), label=texts)
def test_any_label_makes_a_job_name_that_the_api_takes(job: str, label: str):
    request = message("JobService.Create", {"cluster_id": "c", "name": job_name(job, label, 12), "pyspark_job": JOB})
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
        ("Production", "production-########"),
        ("team_a", "team-a-########"),
        ("-a-", "a-########"),
        ("бой", "########"),
        ("a" * 31, "a" * 21 + "-########"),
    ],
)
def test_a_changed_text_gets_a_hash(text: str, expected: str):
    assert re.fullmatch(expected.replace("########", "[0-9a-f]{8}"), slug(text, 30))


def test_names_identify_deployment_run_and_attempt():
    run_id = "7f9c24e5-1d3b-4c5a-9e8f-0a1b2c3d4e5f"
    assert cluster_name("yandex", run_id, 1).startswith("mlp-yandex-7f9c24e5-1d3b-4c5a-9e8f")
    names = {cluster_name("yandex", run_id, 1), cluster_name("yandex", run_id, 2)}
    # The last characters of a run id are cut, but count.
    names |= {cluster_name("yandex", run_id[:-1] + "0", 1), cluster_name("yandex-2", run_id, 1)}
    assert len(names) == 4
    assert job_name("clean_transactions", "", 1) == "clean-transactions-1"
    assert job_name("train_model", "2020-01-31", 2) == "train-model-2020-01-31-2"


# --- The request for a cluster


def node_group(role: str, preset: str, disk: str, size_gb: int, hosts: int) -> dict[str, Any]:
    resources = {"resource_preset_id": preset, "disk_type_id": disk, "disk_size": str(size_gb << 30)}
    return {
        **{"name": role, "role": f"{role.upper()}NODE", "resources": resources},
        **{"subnet_id": "subnet", "hosts_count": str(hosts)},
    }


def test_the_default_cluster_is_the_old_pipelines():
    assert request_of(spec) == {
        "folder_id": "folder",
        "name": "name",
        "description": "Made by ml_platform for one run; deleted at its end.",
        "labels": LABELS,
        "config_spec": {
            "version_id": "2.0",
            "hadoop": {"services": ["YARN", "SPARK", "HDFS", "MAPREDUCE"]},
            "subclusters_spec": [
                node_group("master", "s3-c2-m8", "network-ssd", 40, 1),
                node_group("data", "s3-c4-m16", "network-hdd", 128, 3),
            ],
        },
        "zone_id": "ru-central1-a",
        "service_account_id": "account",
        "ui_proxy": True,
    }


#: Each variable of the cluster: its text, where the option is in the request, and as what.
SCALING = "config_spec.subclusters_spec.2.autoscaling_config"
VARIABLES: dict[str, tuple[str, str, Any]] = {
    "YC_FOLDER_ID": ("f", "folder_id", "f"),
    "YC_ZONE": ("ru-central1-d", "zone_id", "ru-central1-d"),
    "YC_SUBNET_ID": ("s", "config_spec.subclusters_spec.1.subnet_id", "s"),
    "YC_SECURITY_GROUP_IDS": ("g1, g2,", "security_group_ids", ["g1", "g2"]),
    "YC_SERVICE_ACCOUNT_ID": ("a", "service_account_id", "a"),
    "YC_SSH_PUBLIC_KEY": ("ssh-ed25519 AAAA me", "config_spec.hadoop.ssh_public_keys", ["ssh-ed25519 AAAA me"]),
    "DATAPROC_AUTOSCALING_SERVICE_ACCOUNT_ID": ("b", "autoscaling_service_account_id", "b"),
    "DATAPROC_BUCKET": ("logs", "bucket", "logs"),
    "DATAPROC_DESCRIPTION": ("mine", "description", "mine"),
    "DATAPROC_LABELS": ('{"team": "fraud"}', "labels.team", "fraud"),
    "DATAPROC_IMAGE_VERSION": ("2.1", "config_spec.version_id", "2.1"),
    "DATAPROC_SERVICES": ("YARN,SPARK,HDFS", "config_spec.hadoop.services", ["YARN", "SPARK", "HDFS"]),
    "DATAPROC_PROPERTIES": ('{"spark:a.b": "c"}', "config_spec.hadoop.properties", {"spark:a.b": "c"}),
    "DATAPROC_INITIALIZATION_ACTIONS": (
        '[{"uri": "s3a://bucket/init.sh", "args": ["x"]}]',
        "config_spec.hadoop.initialization_actions",
        [{"uri": "s3a://bucket/init.sh", "args": ["x"], "timeout": "600"}],
    ),
    "DATAPROC_OSLOGIN": ("true", "config_spec.hadoop.oslogin_enabled", True),
    "DATAPROC_UI_PROXY": ("false", "ui_proxy", None),
    "DATAPROC_LOG_GROUP_ID": ("group", "log_group_id", "group"),
    "DATAPROC_HOST_GROUP_IDS": ("h", "host_group_ids", ["h"]),
    "DATAPROC_PUBLIC_IP": ("1", "config_spec.subclusters_spec.0.assign_public_ip", True),
    "DATAPROC_ENVIRONMENT": ("PRESTABLE", "environment", "PRESTABLE"),
    **{
        f"DATAPROC_{role}_{option}": (text, f"config_spec.subclusters_spec.{index}.resources.{path}", expected)
        for index, role in enumerate(("MASTER", "DATA", "COMPUTE"))
        for option, text, path, expected in (
            ("PRESET", "m3-c8-m64", "resource_preset_id", "m3-c8-m64"),
            ("DISK_TYPE", "network-ssd-io-m3", "disk_type_id", "network-ssd-io-m3"),
            ("DISK_SIZE_GB", "93", "disk_size", str(93 << 30)),
        )
    },
    "DATAPROC_DATA_COUNT": ("5", "config_spec.subclusters_spec.1.hosts_count", "5"),
    "DATAPROC_COMPUTE_COUNT": ("2", "config_spec.subclusters_spec.2.hosts_count", "2"),
    "DATAPROC_COMPUTE_MAX_COUNT": ("9", f"{SCALING}.max_hosts_count", "9"),
    "DATAPROC_COMPUTE_PREEMPTIBLE": ("yes", f"{SCALING}.preemptible", True),
    "DATAPROC_COMPUTE_MEASUREMENT_S": ("90", f"{SCALING}.measurement_duration", "90s"),
    "DATAPROC_COMPUTE_WARMUP_S": ("91", f"{SCALING}.warmup_duration", "91s"),
    "DATAPROC_COMPUTE_STABILIZATION_S": ("92", f"{SCALING}.stabilization_duration", "92s"),
    "DATAPROC_COMPUTE_CPU_TARGET": ("70", f"{SCALING}.cpu_utilization_target", 70.0),
    "DATAPROC_COMPUTE_DECOMMISSION_S": ("93", f"{SCALING}.decommission_timeout", "93"),
}


def at(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value.get(part)
    return value


def test_every_variable_is_tested():
    assert set(VARIABLES) == {ClusterSettings.model_fields[name].alias for name in ClusterSpec.model_fields}


@pytest.mark.parametrize("variable", VARIABLES)
def test_every_variable_reaches_the_request(monkeypatch: pytest.MonkeyPatch, variable: str):
    text, path, expected = VARIABLES[variable]
    others = {"YC_FOLDER_ID": "folder", "YC_SUBNET_ID": "subnet", "YC_SERVICE_ACCOUNT_ID": "account"}
    if variable.startswith("DATAPROC_COMPUTE_"):
        others |= {"DATAPROC_COMPUTE_COUNT": "1", "DATAPROC_COMPUTE_MAX_COUNT": "4"}
    for name, value in others.items():
        monkeypatch.setenv(name, value)
    assert at(request_of(load_cluster_settings()), path) != expected
    monkeypatch.setenv(variable, text)
    assert at(request_of(load_cluster_settings()), path) == expected


def test_node_groups_of_a_request():
    def subclusters(**changes: Any) -> list[dict[str, Any]]:
        return request_of(spec.model_copy(update=changes))["config_spec"]["subclusters_spec"]

    groups = subclusters(public_ip=True, compute_count=2)
    assert [group.get("assign_public_ip") for group in groups] == [True, None, None], "the master alone"
    assert "autoscaling_config" not in groups[2], "a fixed number of compute nodes does not scale"
    light = subclusters(data_count=0, compute_count=2, services=["YARN", "SPARK"])
    assert [group["name"] for group in light] == ["master", "compute"]


def test_the_platforms_labels_win():
    assert request_of(spec.model_copy(update={"labels": {"owner": "me", "team": "x"}}))["labels"] == {
        **LABELS,
        "team": "x",
    }


def test_an_unknown_service_is_named(cloud: FakeDataproc, api: DataprocApi):
    with pytest.raises(DataprocError, match=r"the cluster settings do not match the API: .*SPARKLE"):
        api.create_cluster(spec.model_copy(update={"services": ["YARN", "SPARKLE"]}), "name", {})


# --- States


def test_every_published_state_is_known():
    unusable = {"ERROR", "STOPPING", "STOPPED"}
    assert set(cluster_pb2.Cluster.Status.keys()) - {"STATUS_UNKNOWN"} == STARTING_STATES | {"RUNNING"} | unusable
    assert set(job_pb2.Job.Status.keys()) - {"STATUS_UNSPECIFIED"} == UNFINISHED_JOB | FINISHED_JOB
    assert not UNFINISHED_JOB & FINISHED_JOB


@pytest.mark.parametrize(("status", "name"), [(0, "STATUS_UNKNOWN"), (77, "77")])
def test_a_cluster_in_an_unknown_state_can_be_deleted_but_not_used(
    cloud: FakeDataproc, api: DataprocApi, clock: FakeClock, status: int, name: str
):
    cluster_id = cloud.add_cluster("cluster-1", status=status)
    with pytest.raises(DataprocError, match=rf"cluster {cluster_id} could not be created: .*\(its state: {name}\)"):
        api.wait_until_running(cluster_id, "", **WAIT, say=ignore)
    assert clock.slept == []
    assert [cluster.id for cluster in api.list_clusters(cloud.folder_id)] == [cluster_id]
    api.delete_cluster(cluster_id, **WAIT, say=ignore)
    assert cloud.clusters == {}


# --- Pages


def test_all_pages_of_a_list_are_read(cloud: FakeDataproc, api: DataprocApi):
    ids = [cloud.add_cluster(f"cluster-{number}", LABELS) for number in range(250)]
    found = list(api.list_clusters(cloud.folder_id))
    assert [cluster.id for cluster in found] == ids
    assert len(cloud.calls("ClusterService.List")) == 3
    assert (found[0].labels, found[0].status) == (LABELS, "RUNNING")
    assert found[0].created_at == int(cloud.now())
    assert [cluster.id for cluster in api.list_clusters(cloud.folder_id, name="cluster-7")] == ids[7:8]


def test_a_page_that_links_to_itself_is_an_error(cloud: FakeDataproc, api: DataprocApi):
    for number in range(101):
        cloud.add_cluster(f"cluster-{number}")

    def again(request: Any, page: Any) -> Any:
        return type(page)(clusters=page.clusters, next_page_token=request.page_token or page.next_page_token)

    cloud.answer("ClusterService.List", again, times=10)
    with pytest.raises(DataprocError, match="the API returned a page that is its own next page"):
        list(api.list_clusters(cloud.folder_id))
    assert len(cloud.calls("ClusterService.List")) == 2


# --- Retries

REPEATED = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "INTERNAL"}


@pytest.mark.parametrize("code", [code.name for code in grpc.StatusCode if code.name not in ("OK", "UNAUTHENTICATED")])
@pytest.mark.parametrize("method", ["Get", "Create", "Delete"])
def test_calls_are_repeated_after_transient_errors_only(
    cloud: FakeDataproc, api: DataprocApi, clock: FakeClock, method: str, code: str
):
    cluster_id = cloud.add_cluster("cluster-1")
    cloud.fail(f"ClusterService.{method}", code, "because", times=2)
    calls: dict[str, Callable[[], Any]] = {
        "Get": lambda: api.get_cluster(cluster_id),
        "Create": lambda: create(cloud, api),
        "Delete": lambda: api.request_deletion(cluster_id),
    }
    if code in REPEATED or (code == "RESOURCE_EXHAUSTED" and method != "Create"):  # of a create, it is a quota
        calls[method]()
        assert codes(cloud, f"ClusterService.{method}") == [code, code, "OK"]
        first, second = clock.slept
        assert 0.5 <= first <= 1 <= second <= 2
        return
    if code == "NOT_FOUND" and method != "Create":
        assert calls[method]() is None
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


def test_a_call_that_times_out_is_repeated(cloud: FakeDataproc, api: DataprocApi, monkeypatch: pytest.MonkeyPatch):
    cluster_id = cloud.add_cluster("cluster-1")
    api.get_cluster(cluster_id)
    monkeypatch.setattr(dataproc_api, "CALL_TIMEOUT_S", 0.2)
    cloud.delay("ClusterService.Get", 1.0)
    found = api.get_cluster(cluster_id)
    assert found is not None
    assert found.id == cluster_id


@pytest.mark.parametrize("method", ["ApiEndpointService.List", "IamTokenService.Create"])
def test_the_sdks_own_calls_time_out_too(
    cloud: FakeDataproc, api: DataprocApi, monkeypatch: pytest.MonkeyPatch, method: str
):
    """All calls share one thread, which a call that hangs would block."""
    # Limits by configuration end up to a second too soon, by gRPC's own clock.
    monkeypatch.setattr(dataproc_api, "CALL_TIMEOUT_S", 2.5)
    cloud.delay(method, 600.0)
    started = time.monotonic()
    assert api.get_cluster("some-id") is None
    assert time.monotonic() - started < 300


# --- Clusters


def test_a_repeated_create_finds_its_own_cluster(cloud: FakeDataproc, api: DataprocApi):
    first, _ = create(cloud, api)
    # It expires later, as it is asked for later.
    assert create(cloud, api, **{"expires-at": "2"}) == (first, "")


def test_a_cluster_is_created_and_deleted(cloud: FakeDataproc, api: DataprocApi):
    said: list[str] = []
    cluster_id, operation_id = create(cloud, api)
    api.wait_until_running(cluster_id, operation_id, **WAIT, say=said.append)
    found = api.get_cluster(cluster_id)
    assert found is not None
    assert (found.name, found.status, found.labels) == ("cluster-2", "RUNNING", LABELS)
    api.delete_cluster(cluster_id, **WAIT, say=said.append)
    assert cloud.clusters == {}
    assert list(dict.fromkeys(said)) == [
        f"cluster {cluster_id}: {state}" for state in ("CREATING", "RUNNING", "STOPPING")
    ]


def test_deleting_a_cluster_again_is_no_error(cloud: FakeDataproc, api: DataprocApi, cluster_id: str):
    api.request_deletion("gone")
    api.request_deletion(cluster_id)
    api.request_deletion(cluster_id)
    assert codes(cloud, "ClusterService.Delete") == ["NOT_FOUND", "OK", "FAILED_PRECONDITION"]
    api.delete_cluster("gone", **WAIT, say=ignore)


def test_a_deletion_that_is_denied_is_not_waited_for(
    cloud: FakeDataproc, api: DataprocApi, clock: FakeClock, cluster_id: str
):
    cloud.fail("ClusterService.Delete", "PERMISSION_DENIED", "not you")
    with pytest.raises(DataprocError, match=r"not you.*roles"):
        api.delete_cluster(cluster_id, **WAIT, say=ignore)
    assert clock.slept == []


def test_a_deletion_that_is_always_refused_says_why(cloud: FakeDataproc, api: DataprocApi, clock: FakeClock):
    cluster_id = cloud.add_cluster("cluster-1", deletion_protection=True)
    with pytest.raises(DataprocError, match=r"timed out after 900 s waiting for .* deleted: .*deletion_protection"):
        api.delete_cluster(cluster_id, **WAIT, say=ignore)
    assert sum(clock.slept) == pytest.approx(900)


# --- Jobs


def test_a_job_is_submitted_once(cloud: FakeDataproc, api: DataprocApi, cluster_id: str, clock: FakeClock):
    cloud.fail("JobService.Create", "UNAVAILABLE", after=True)
    job_id = api.submit_job(cluster_id, "job-1", JOB)
    assert api.submit_job(cluster_id, "job-1", JOB) == job_id
    assert list(cloud.jobs) == [job_id]
    other = api.submit_job(cluster_id, "job-10", JOB)
    clock.sleep(61)
    job = api.get_job(cluster_id, job_id)
    assert (job.id, job.name, job.status) == (job_id, "job-1", "DONE")
    assert job.yarn_application.startswith("application_")
    assert [job.id for job in api.list_jobs(cluster_id)] == [job_id, other]
    with pytest.raises(DataprocError) as caught:
        api.submit_job("gone", "job-1", JOB)
    assert caught.value.code == "NOT_FOUND"


def test_a_job_that_ended_or_is_gone_may_be_cancelled(
    cloud: FakeDataproc, api: DataprocApi, cluster_id: str, clock: FakeClock
):
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
    log = api.follow_log(cluster_id, api.submit_job(cluster_id, "job-1", JOB))
    parts = []
    for _ in range(8):
        # A reading that fails half-way loses nothing.
        cloud.fail("JobService.ListLog", "UNAVAILABLE", when=lambda request: bool(request.page_token))
        parts += [next(log), next(log)]
        clock.sleep(10)
    assert "".join(parts) == "".join(text for _, text in LINES)
    assert len([part for part in parts if part]) > 3
    assert next(log) == ""


# --- Waiting


@pytest.mark.parametrize("poll_s", [0.1, 10.0, 60.0])
def test_pauses_grow_to_the_longest(api: DataprocApi, clock: FakeClock, poll_s: float):
    with pytest.raises(WaitTimeout, match="timed out after 1000 s waiting for godot"):
        api.wait(lambda: None, timeout_s=1000, poll_s=poll_s, what="godot")
    slept = clock.slept
    assert sum(slept) == pytest.approx(1000)
    for number, pause in enumerate(slept[:-1]):
        expected = min(poll_s, poll_s / 5 * 1.5 ** min(number, 10))
        assert 0.8 * expected <= pause <= 1.2 * expected
    assert slept[-1] <= 1.2 * poll_s


def test_a_condition_that_holds_already_is_not_waited_for(api: DataprocApi, clock: FakeClock):
    assert api.wait(lambda: 0, timeout_s=0, poll_s=10, what="it") == 0
    assert clock.slept == []


def test_the_condition_is_checked_once_more_after_the_deadline(api: DataprocApi, clock: FakeClock):
    deadline = clock.time() + 100
    found = api.wait(lambda: clock.time() >= deadline or None, timeout_s=100, poll_s=30, what="it")
    assert found is True


# --- Credentials


@pytest.mark.parametrize("way", ["key", "token", "metadata"])
def test_ways_to_sign_in(
    cloud: FakeDataproc, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, cluster_id: str, way: str
):
    monkeypatch.setenv("YC_METADATA_ADDR", cloud.metadata_address)
    without_key: dict[str, Any] = {"service_account_key_file": None}
    ways = {"key": {}, "token": without_key | {"iam_token": cloud.iam_token()}, "metadata": without_key}
    api = api_of(cloud, clock, **ways[way])
    assert api.get_cluster(cluster_id) is not None
    clock.sleep(cloud.token_lifetime_seconds + 1)
    if way == "token":
        # It cannot be renewed.
        with pytest.raises(DataprocError, match=r"UNAUTHENTICATED: The token has expired .*YC_IAM_TOKEN"):
            api.get_cluster(cluster_id)
        assert codes(cloud, "ClusterService.Get") == ["OK", "UNAUTHENTICATED"]
    else:
        assert api.get_cluster(cluster_id) is not None
        assert codes(cloud, "ClusterService.Get") == ["OK", "UNAUTHENTICATED", "OK"]


@pytest.mark.parametrize(("has_worked", "attempts"), [(False, 1), (True, 2)])
def test_a_rejected_key_is_not_renewed_endlessly(
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
        ("", "cannot connect: .*YC_SERVICE_ACCOUNT_KEY_FILE"),
        ("no JSON", "cannot connect: .*YC_SERVICE_ACCOUNT_KEY_FILE"),
        ("null", "Invalid Service Account Key.*YC_SERVICE_ACCOUNT_KEY_FILE"),
        ('{"id": "x", "service_account_id": "y"}', "missing private key.*YC_SERVICE_ACCOUNT_KEY_FILE"),
        ('{"id": "x", "service_account_id": "y", "private_key": 1}', "YC_SERVICE_ACCOUNT_KEY_FILE"),
        ('{"id": "x", "service_account_id": "y", "private_key": "top secret"}', "YC_SERVICE_ACCOUNT_KEY_FILE"),
        (
            '{"id": "x", "service_account_id": "y", '
            '"private_key": "-----BEGIN PRIVATE KEY-----\\ntop secret\\n-----END PRIVATE KEY-----"}',
            "YC_SERVICE_ACCOUNT_KEY_FILE",
        ),
    ],
)
def test_an_unusable_key_file_is_named(
    cloud: FakeDataproc, clock: FakeClock, tmp_path: Path, content: str | None, error: str
):
    file = tmp_path / "key.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataprocError, match=error) as caught:
        api_of(cloud, clock, service_account_key_file=str(file)).get_cluster("some-id")
    assert "top secret" not in str(caught.value)
    assert clock.slept == []


def test_an_unknown_key_is_refused(cloud: FakeDataproc, clock: FakeClock, tmp_path: Path):
    key = json.loads(cloud.service_account_key_file.read_text())
    file = tmp_path / "key.json"
    file.write_text(json.dumps(key | {"id": "ajeunknown0000000000"}))
    with pytest.raises(DataprocError, match=r"JWT: unknown key id.*YC_SERVICE_ACCOUNT_KEY_FILE") as caught:
        api_of(cloud, clock, service_account_key_file=str(file)).get_cluster("some-id")
    assert "PRIVATE" not in str(caught.value)


def test_missing_credentials_are_named(cloud: FakeDataproc, clock: FakeClock, monkeypatch: pytest.MonkeyPatch):
    # Not on a VM of the cloud either.
    monkeypatch.setenv("YC_METADATA_ADDR", "127.0.0.1:9")
    with pytest.raises(
        DataprocError, match=r"UNAUTHENTICATED: cannot sign in.*YC_SERVICE_ACCOUNT_KEY_FILE or YC_IAM_TOKEN"
    ):
        api_of(cloud, clock, service_account_key_file=None).get_cluster("some-id")
    assert clock.slept == []


def test_a_metadata_service_that_has_answered_before_is_waited_for(
    cloud: FakeDataproc, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, cluster_id: str
):
    monkeypatch.setenv("YC_METADATA_ADDR", cloud.metadata_address)
    api = api_of(cloud, clock, service_account_key_file=None)
    assert api.get_cluster(cluster_id) is not None
    # A new connection needs a new token, and the service that gives it is away.
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
    ids=["no such file", "unknown authority", "connection refused"],
)
def test_an_unreachable_or_untrusted_api_is_named(
    cloud: FakeDataproc, clock: FakeClock, settings: dict[str, Any], error: str
):
    with pytest.raises(DataprocError, match=error):
        api_of(cloud, clock, **settings).get_cluster("some-id")


def test_a_denied_folder_is_named(cloud: FakeDataproc, api: DataprocApi):
    with pytest.raises(DataprocError, match=r"list clusters: PERMISSION_DENIED: .*YC_FOLDER_ID"):
        list(api.list_clusters("other-folder"))
