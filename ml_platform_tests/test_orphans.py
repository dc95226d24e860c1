"""Orphaned clusters: which count as orphaned, and what the sensor and the job do about them.

A cluster wrongly deleted costs a run; one wrongly kept costs money until it is noticed.
"""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from yandex.cloud.dataproc.v1 import cluster_pb2

from ml_platform.dataproc.api import DataprocError
from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.dataproc.orphans import delete_orphans, find_orphans
from ml_platform.dev.cloud.fake_dataproc import FakeDataproc, JobScript
from ml_platform.jobs import delete_orphaned_clusters
from ml_platform.lake.resource import LakeResource
from ml_platform.operations.changes import UndeletedClusters
from ml_platform.operations.dead_runs import PROCESS_TAG
from ml_platform.sensors import build_orphaned_clusters
from ml_platform_tests.fakes import FakeEngine
from ml_platform_tests.fakes_cloud import FakeClock, engine_of

HOUR = 3600
ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
# A queued run has done nothing yet, so it has no cluster.
ALIVE = [status for status in dg.DagsterRunStatus if status not in (*ENDED, dg.DagsterRunStatus.QUEUED)]


class Orphans:
    """A folder with clusters of a deployment, and what finds and deletes its orphans."""

    def __init__(self, cloud: FakeDataproc, engine: DataprocEngine, instance: dg.DagsterInstance) -> None:
        self.cloud, self.engine, self.instance = cloud, engine, instance

    def add_run(self, status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED, **tags: str) -> str:
        run_id = str(uuid.uuid4())
        self.instance.add_run(dg.DagsterRun("process_new_files", run_id=run_id, status=status, tags=tags))
        return run_id

    def add_cluster(
        self, run_id: str = "some-run", *, left_s: float = HOUR, status: str = "RUNNING", **labels: Any
    ) -> str:
        """A cluster as the engine labels it; labels of None are left out."""
        changes = {name.replace("_", "-"): value for name, value in labels.items()}
        wanted = self.engine.labels(run_id, time.time() + left_s) | changes
        return self.cloud.add_cluster(
            f"mlp-{uuid.uuid4().hex}",
            {name: value for name, value in wanted.items() if value is not None},
            status=cluster_pb2.Cluster.Status.Value(status),
        )

    def found(self) -> dict[str, str]:
        return {cluster.id: reason for cluster, reason in find_orphans(self.instance, self.engine)}

    def delete(self) -> str:
        """Delete, and say what was done; then time passes."""
        try:
            return delete_orphans(self.instance, self.engine, lambda: logging.getLogger("test"))
        finally:
            self.engine._clock.sleep(self.cloud.delete_seconds)

    def tick(self, engine: Any = None) -> str:
        sensor = build_orphaned_clusters(dg.DefaultSensorStatus.RUNNING)
        with dg.build_sensor_context(instance=self.instance, resources={"spark": engine or self.engine}) as context:
            result = sensor(context)
        assert isinstance(result, dg.SkipReason)
        return result.skip_message or ""


@pytest.fixture
def orphans(tmp_path: Path, lake: LakeResource, instance: dg.DagsterInstance) -> Iterator[Orphans]:
    clock = FakeClock()
    with FakeDataproc(tmp_path / "cloud", clock=clock, run_job=lambda _: JobScript(), delete_seconds=20) as cloud:
        yield Orphans(cloud, engine_of(cloud, lake, clock), instance)


@pytest.mark.parametrize("status", ALIVE, ids=lambda status: status.value)
@pytest.mark.parametrize("left_s", [HOUR, 10_000 * HOUR])
def test_a_cluster_of_an_unfinished_run_is_kept(orphans: Orphans, status: dg.DagsterRunStatus, left_s: float):
    orphans.add_cluster(orphans.add_run(status), left_s=left_s)
    assert orphans.delete() == "no orphans"
    assert orphans.cloud.calls("ClusterService.Delete") == []


@pytest.mark.parametrize("status", ENDED, ids=lambda status: status.value)
def test_a_cluster_of_a_run_that_has_ended_is_deleted(orphans: Orphans, status: dg.DagsterRunStatus):
    run_id = orphans.add_run(status)
    cluster_id = orphans.add_cluster(run_id)
    assert orphans.found() == {cluster_id: f"its run {run_id} has ended ({status.value})"}
    message = orphans.delete()
    assert message.startswith("requested deletion of 1 clusters: ")
    assert cluster_id in message
    assert orphans.cloud.clusters == {}


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({}, "its run some-run is unknown"),
        ({"dagster_run_id": None}, "its run (no label) is unknown"),
        ({"dagster_run_id": ""}, "its run (no label) is unknown"),
        # The lake need not be in the labels.
        ({"lake": None}, "its run some-run is unknown"),
    ],
)
def test_a_cluster_of_an_unknown_run_is_an_orphan(orphans: Orphans, labels: dict[str, Any], reason: str):
    cluster_id = orphans.add_cluster(**labels)
    assert orphans.found() == {cluster_id: reason}


@pytest.mark.parametrize(
    ("expires_at", "is_orphan"),
    [("1600000000", True), (None, False), ("", False), ("soon", False), ("1e3", False)],
)
def test_a_cluster_past_its_lifetime_is_an_orphan_even_of_an_unfinished_run(
    orphans: Orphans, expires_at: str | None, is_orphan: bool
):
    """An unreadable lifetime never ends."""
    run_id = orphans.add_run()
    cluster_id = orphans.add_cluster(run_id, expires_at=expires_at)
    reason = f"it is past its lifetime, though its run {run_id} is STARTED"
    assert orphans.found() == ({cluster_id: reason} if is_orphan else {})


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param({"owner": None, "deployment": None, "lake": None, "dagster_run_id": None}, id="no labels"),
        pytest.param({"owner": None}, id="no owner"),
        pytest.param({"owner": "other"}, id="another owner"),
        pytest.param({"owner": "ml-platform-2"}, id="a similar owner"),
        pytest.param({"deployment": "other"}, id="another deployment"),
        pytest.param({"deployment": None}, id="no deployment"),
        pytest.param({"lake": "other"}, id="a deployment of the same name on another lake"),
        pytest.param({"deployment": "test-2"}, id="a deployment with a similar name"),
    ],
)
def test_foreign_clusters_are_never_touched(orphans: Orphans, labels: dict[str, Any]):
    cluster_id = orphans.add_cluster(left_s=-HOUR, **labels)
    assert orphans.delete() == "no orphans"
    assert orphans.cloud.clusters[cluster_id].state == "RUNNING"
    assert orphans.engine.clusters() == []


def test_deployments_with_names_that_labels_cannot_hold_stay_apart(orphans: Orphans, lake: LakeResource):
    names = ["Team A", "team a", "team_a", "team-a", "команда"]
    engines = [engine_of(orphans.cloud, lake, orphans.engine._clock, deployment=name) for name in names]
    ids = [Orphans(orphans.cloud, engine, orphans.instance).add_cluster() for engine in engines]
    assert [[cluster.id for cluster in engine.clusters()] for engine in engines] == [[one] for one in ids]


@pytest.mark.parametrize("state", cluster_pb2.Cluster.Status.keys())
def test_an_orphan_in_any_state_is_deleted_unless_it_is_being_deleted(orphans: Orphans, state: str):
    cluster_id = orphans.add_cluster(status=state)
    assert list(orphans.found()) == ([] if state == "STOPPING" else [cluster_id])


def test_each_orphan_is_tried_and_a_refused_one_again_at_the_next_tick(orphans: Orphans):
    refused, _, _ = (orphans.add_cluster() for _ in range(3))
    orphans.cloud.fail(
        "ClusterService.Delete", "PERMISSION_DENIED", "not you", when=lambda request: request.cluster_id == refused
    )
    with pytest.raises(UndeletedClusters, match=rf"1 orphaned clusters .*\nmlp-\w+ \({refused}\): .*not you"):
        orphans.delete()
    assert list(orphans.cloud.clusters) == [refused]
    assert "requested deletion of 1 clusters" in orphans.delete()
    assert orphans.cloud.clusters == {}


def test_a_restarted_daemon_deletes_each_orphan_once(orphans: Orphans, lake: LakeResource):
    orphans.add_cluster()
    for expected in ("requested deletion of 1 clusters", "no orphans", "no orphans"):
        engine = engine_of(orphans.cloud, lake, orphans.engine._clock)
        assert expected in delete_orphans(orphans.instance, engine, lambda: logging.getLogger("test"))
    assert len(orphans.cloud.calls("ClusterService.Delete")) == 1


def test_orphans_are_found_among_many_clusters(orphans: Orphans):
    kept = [orphans.add_cluster(orphans.add_run()) for _ in range(5)]
    kept += [orphans.cloud.add_cluster(f"stranger-{number}") for number in range(200)]
    for _ in range(5):
        orphans.add_cluster()
    orphans.delete()
    assert set(orphans.cloud.clusters) == set(kept)


# --- The sensor and the job


def test_a_tick_says_what_it_did(orphans: Orphans):
    assert orphans.tick() == "no orphans"
    # The process with this id started at another time than the run's tag says.
    run_id = orphans.add_run(**{PROCESS_TAG: f"{socket.gethostname()}:1:0"})
    cluster_id = orphans.add_cluster(run_id)
    assert f"({cluster_id}): its run {run_id} has ended (FAILURE)" in orphans.tick()
    assert orphans.cloud.clusters[cluster_id].state == "STOPPING"


def test_an_api_that_refuses_is_an_error_of_the_tick(orphans: Orphans):
    orphans.cloud.fail("ClusterService.List", "PERMISSION_DENIED", "not you")
    with pytest.raises(DataprocError, match="not you"):
        orphans.tick()


def test_a_tick_without_clusters_says_so(orphans: Orphans):
    assert "does not use clusters" in orphans.tick(FakeEngine())


@pytest.mark.parametrize("refused", [False, True])
def test_the_job_deletes_only_orphans(orphans: Orphans, refused: bool):
    cluster_id, own = orphans.add_cluster(), orphans.add_cluster(orphans.add_run())
    if refused:
        orphans.cloud.fail("ClusterService.Delete", "PERMISSION_DENIED", "not you")
    result = delete_orphaned_clusters.execute_in_process(
        instance=orphans.instance, resources={"spark": orphans.engine}, raise_on_error=False
    )
    assert result.success is not refused
    assert orphans.cloud.clusters[cluster_id].state == ("RUNNING" if refused else "STOPPING")
    assert orphans.cloud.clusters[own].state == "RUNNING"
    assert orphans.cloud.calls("ClusterService.Create") == []
