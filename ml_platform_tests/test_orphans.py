"""Clusters that nobody else will delete: which are taken for such, what the sensor and the job do about them.

A cluster that is wrongly deleted costs a run, one that is wrongly kept costs money until somebody looks.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml_platform.dataproc.api import OWNER, DataprocError
from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.dataproc.orphans import delete_orphans, find_orphans, why_orphaned
from ml_platform.dev.cloud.fake_dataproc import FakeDataproc, JobScript
from ml_platform.jobs import delete_orphaned_clusters
from ml_platform.lake.resource import LakeResource
from ml_platform.operations.dead_runs import PROCESS_TAG
from ml_platform.sensors import build_orphaned_clusters
from ml_platform_tests.fakes import FakeEngine
from ml_platform_tests.fakes_cloud import FakeClock, engine_of

HOUR = 3600
ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
# A queued run has done nothing yet, so it has no cluster.
ALIVE = [status for status in dg.DagsterRunStatus if status not in (*ENDED, dg.DagsterRunStatus.QUEUED)]

log = logging.getLogger("test")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def cloud(tmp_path: Path, clock: FakeClock) -> Iterator[FakeDataproc]:
    with FakeDataproc(tmp_path / "cloud", clock=clock, run_job=lambda _: JobScript(), delete_seconds=20) as cloud:
        yield cloud


@pytest.fixture
def engine(cloud: FakeDataproc, lake: LakeResource, clock: FakeClock) -> DataprocEngine:
    return engine_of(cloud, lake, clock)


def add_run(instance: dg.DagsterInstance, status: dg.DagsterRunStatus, **tags: str) -> str:
    run_id = str(uuid.uuid4())
    instance.add_run(dg.DagsterRun("process_new_files", run_id=run_id, status=status, tags=tags))
    return run_id


def add_cluster(
    cloud: FakeDataproc, engine: DataprocEngine, run_id: str, *, left_s: float = HOUR, **labels: Any
) -> str:
    """A cluster as the engine labels it; labels of None are left out."""
    wanted = engine.labels(run_id, time.time() + left_s) | {name.replace("_", "-"): labels[name] for name in labels}
    return cloud.add_cluster(
        f"mlp-{uuid.uuid4().hex}", {name: value for name, value in wanted.items() if value is not None}
    )


def orphans(instance: dg.DagsterInstance, engine: DataprocEngine) -> dict[str, str]:
    return {cluster.id: reason for cluster, reason in find_orphans(instance, engine)}


@pytest.mark.parametrize("status", ALIVE, ids=lambda status: status.value)
@pytest.mark.parametrize("left_s", [1 * HOUR, 10_000 * HOUR])
def test_a_cluster_of_a_run_that_lives_is_kept(
    instance: dg.DagsterInstance,
    cloud: FakeDataproc,
    engine: DataprocEngine,
    status: dg.DagsterRunStatus,
    left_s: float,
):
    add_cluster(cloud, engine, add_run(instance, status), left_s=left_s)
    assert delete_orphans(instance, engine, lambda: log) == "no orphans"
    assert cloud.calls("ClusterService.Delete") == []


@pytest.mark.parametrize("status", ENDED, ids=lambda status: status.value)
def test_a_cluster_of_a_run_that_has_ended_is_deleted(
    instance: dg.DagsterInstance,
    cloud: FakeDataproc,
    engine: DataprocEngine,
    clock: FakeClock,
    status: dg.DagsterRunStatus,
):
    run_id = add_run(instance, status)
    cluster_id = add_cluster(cloud, engine, run_id)
    assert orphans(instance, engine) == {cluster_id: f"its run {run_id} has ended ({status.value})"}
    said = delete_orphans(instance, engine, lambda: log)
    assert said.startswith("asked for the deletion of 1 clusters: ")
    assert cluster_id in said
    clock.sleep(20)
    assert cloud.clusters == {}


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({}, "is unknown"),
        ({"dagster_run_id": None}, "its run (no label) is unknown"),
        ({"dagster_run_id": ""}, "its run (no label) is unknown"),
        # From before lakes were in the labels.
        ({"lake": None}, "is unknown"),
    ],
)
def test_a_cluster_of_a_run_that_nobody_knows_is_deleted(
    instance: dg.DagsterInstance, cloud: FakeDataproc, engine: DataprocEngine, labels: dict[str, Any], reason: str
):
    cluster_id = add_cluster(cloud, engine, "some-run", **labels)
    found = orphans(instance, engine)
    assert list(found) == [cluster_id]
    assert reason in found[cluster_id]


def test_a_cluster_past_its_lifetime_is_deleted_even_of_a_run_that_lives(
    instance: dg.DagsterInstance, cloud: FakeDataproc, engine: DataprocEngine
):
    run_id = add_run(instance, dg.DagsterRunStatus.STARTED)
    cluster_id = add_cluster(cloud, engine, run_id, left_s=-2)
    assert orphans(instance, engine) == {cluster_id: f"it is past its lifetime, though its run {run_id} is STARTED"}


@pytest.mark.parametrize("label", [None, "", "soon", "1e3"])
def test_a_lifetime_that_cannot_be_read_has_no_end(
    instance: dg.DagsterInstance, cloud: FakeDataproc, engine: DataprocEngine, label: str | None
):
    add_cluster(cloud, engine, add_run(instance, dg.DagsterRunStatus.STARTED), expires_at=label)
    assert orphans(instance, engine) == {}


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"owner": None, "deployment": None, "lake": None, "dagster_run_id": None}, "a stranger's, without a label"),
        ({"owner": None}, "a stranger's that looks like ours"),
        ({"owner": "somebody"}, "somebody's"),
        ({"owner": OWNER.upper().lower() + "-2"}, "of a similar owner"),
        ({"deployment": "other"}, "of another deployment"),
        ({"deployment": None}, "of no deployment"),
        ({"lake": "other"}, "of a deployment of the same name, on another lake"),
        ({"deployment": "test-2"}, "of a deployment with a similar name"),
    ],
)
def test_what_is_not_ours_is_never_touched(
    instance: dg.DagsterInstance, cloud: FakeDataproc, engine: DataprocEngine, labels: dict[str, Any], reason: str
):
    cluster_id = add_cluster(cloud, engine, "some-run", left_s=-HOUR, **labels)
    assert delete_orphans(instance, engine, lambda: log) == "no orphans", reason
    assert cloud.clusters[cluster_id].state == "RUNNING"
    assert engine.clusters() == []


def test_deployments_with_names_that_labels_cannot_hold_stay_apart(
    instance: dg.DagsterInstance, cloud: FakeDataproc, lake: LakeResource, clock: FakeClock
):
    names = ["Team A", "team a", "team_a", "team-a", "команда"]
    engines = [engine_of(cloud, lake, clock, deployment=name) for name in names]
    ids = [add_cluster(cloud, engine, "some-run") for engine in engines]
    assert [[cluster.id for cluster in engine.clusters()] for engine in engines] == [[one] for one in ids]


@pytest.mark.parametrize("state", ["CREATING", "STARTING", "RUNNING", "ERROR", "STOPPED", "STOPPING", "STATUS_UNKNOWN"])
def test_whatever_its_state(instance: dg.DagsterInstance, cloud: FakeDataproc, engine: DataprocEngine, state: str):
    from yandex.cloud.dataproc.v1 import cluster_pb2

    labels = engine.labels("some-run", time.time() + HOUR)
    cluster_id = cloud.add_cluster("mlp-1", labels, status=cluster_pb2.Cluster.Status.Value(state))
    # What is being deleted need not be asked for again.
    assert list(orphans(instance, engine)) == ([] if state == "STOPPING" else [cluster_id])


def test_each_is_tried_though_one_is_refused(
    instance: dg.DagsterInstance, cloud: FakeDataproc, engine: DataprocEngine, clock: FakeClock
):
    ids = [add_cluster(cloud, engine, "some-run") for _ in range(3)]
    cloud.fail(
        "ClusterService.Delete", "PERMISSION_DENIED", "not you", when=lambda request: request.cluster_id == ids[0]
    )
    with pytest.raises(DataprocError, match=r"1 orphaned clusters cannot be deleted: .*not you"):
        delete_orphans(instance, engine, lambda: log)
    clock.sleep(20)
    assert list(cloud.clusters) == ids[:1]
    # The next tick tries again.
    assert "asked for the deletion of 1 clusters" in delete_orphans(instance, engine, lambda: log)
    clock.sleep(20)
    assert cloud.clusters == {}


def test_a_daemon_that_starts_again_goes_on(
    instance: dg.DagsterInstance, cloud: FakeDataproc, lake: LakeResource, clock: FakeClock
):
    # Nothing is remembered between ticks but what the API and Dagster's storage know.
    first = engine_of(cloud, lake, clock)
    add_cluster(cloud, first, "some-run")
    assert "asked for" in delete_orphans(instance, first, lambda: log)
    assert delete_orphans(instance, engine_of(cloud, lake, clock), lambda: log) == "no orphans"
    clock.sleep(20)
    assert delete_orphans(instance, engine_of(cloud, lake, clock), lambda: log) == "no orphans"
    assert (len(cloud.clusters), len(cloud.calls("ClusterService.Delete"))) == (0, 1)


def test_many_clusters(instance: dg.DagsterInstance, cloud: FakeDataproc, engine: DataprocEngine):
    kept = [add_cluster(cloud, engine, add_run(instance, dg.DagsterRunStatus.STARTED)) for _ in range(5)]
    strangers = [cloud.add_cluster(f"stranger-{number}") for number in range(200)]
    left = [add_cluster(cloud, engine, "some-run") for _ in range(5)]
    assert list(orphans(instance, engine)) == left
    delete_orphans(instance, engine, lambda: log)
    assert {cluster_id for cluster_id, cluster in cloud.clusters.items() if cluster.state == "RUNNING"} == {
        *kept,
        *strangers,
    }


# --- The sensor and the job


def tick(instance: dg.DagsterInstance, spark: Any) -> str:
    sensor = build_orphaned_clusters(dg.DefaultSensorStatus.RUNNING)
    with dg.build_sensor_context(instance=instance, resources={"spark": spark}) as context:
        result = sensor(context)
    assert isinstance(result, dg.SkipReason)
    assert result.skip_message
    return result.skip_message


def test_a_tick_says_what_it_did(instance: dg.DagsterInstance, cloud: FakeDataproc, engine: DataprocEngine):
    assert tick(instance, engine) == "no orphans"
    cluster_id = add_cluster(cloud, engine, "some-run")
    said = tick(instance, engine)
    assert cluster_id in said
    assert "some-run" in said
    assert cloud.clusters[cluster_id].state == "STOPPING"


def test_a_tick_reports_runs_whose_process_died(
    instance: dg.DagsterInstance, cloud: FakeDataproc, engine: DataprocEngine
):
    import socket

    # The process of this id started at another time than this one's run says.
    run_id = add_run(instance, dg.DagsterRunStatus.STARTED, **{PROCESS_TAG: f"{socket.gethostname()}:1:0"})
    cluster_id = add_cluster(cloud, engine, run_id)
    assert f"its run {run_id} has ended (FAILURE)" in tick(instance, engine)
    assert cloud.clusters[cluster_id].state == "STOPPING"


def test_an_api_that_is_away_is_an_error_of_the_tick(
    instance: dg.DagsterInstance, cloud: FakeDataproc, engine: DataprocEngine
):
    cloud.fail("ClusterService.List", "PERMISSION_DENIED", "not you")
    with pytest.raises(DataprocError, match="not you"):
        tick(instance, engine)


def test_a_deployment_without_clusters(instance: dg.DagsterInstance):
    assert "makes no clusters" in tick(instance, FakeEngine())


@pytest.mark.parametrize("refused", [False, True])
def test_the_job(instance: dg.DagsterInstance, cloud: FakeDataproc, engine: DataprocEngine, refused: bool):
    cluster_id = add_cluster(cloud, engine, "some-run")
    own = add_cluster(cloud, engine, add_run(instance, dg.DagsterRunStatus.STARTED))
    if refused:
        cloud.fail("ClusterService.Delete", "PERMISSION_DENIED", "not you")
    result = delete_orphaned_clusters.execute_in_process(
        instance=instance, resources={"spark": engine}, raise_on_error=False
    )
    assert result.success is not refused
    assert cloud.clusters[cluster_id].state == ("RUNNING" if refused else "STOPPING")
    assert cloud.clusters[own].state == "RUNNING"
    assert cloud.calls("ClusterService.Create") == []


def test_why(instance: dg.DagsterInstance, cloud: FakeDataproc, engine: DataprocEngine):
    add_cluster(cloud, engine, add_run(instance, dg.DagsterRunStatus.STARTED))
    (cluster,) = engine.clusters()
    assert why_orphaned(instance, cluster) is None
