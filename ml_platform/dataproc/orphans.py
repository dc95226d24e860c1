"""Detection and deletion of orphaned clusters: the run has ended or is unknown, or the lifetime has expired."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from logging import Logger

import dagster as dg

from ml_platform.dataproc.api import Cluster, DataprocError
from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.operations.changes import UndeletedClusters
from ml_platform.operations.dead_runs import fail_dead_runs

#: Retry limit of an API call in seconds: a sensor tick must finish within a minute, and the next comes in five.
RETRY_FOR_S = 15.0


def is_expired(cluster: Cluster, now: float) -> bool:
    """Return True if a cluster is past its lifetime; `now` is from the local clock, which also set the label."""
    try:
        return int(cluster.labels.get("expires-at", "")) < now
    except ValueError:
        return False


def orphan_reason(instance: dg.DagsterInstance, cluster: Cluster) -> str | None:
    """Reason to delete a cluster of this deployment; None while its run needs it."""
    run_id = cluster.labels.get("dagster-run-id", "")
    run = instance.get_run_by_id(run_id) if run_id else None
    if run is None:
        return f"its run {run_id or '(no label)'} is unknown"
    if run.is_finished:
        return f"its run {run_id} has ended ({run.status.value})"
    if is_expired(cluster, time.time()):
        return f"it is past its lifetime, though its run {run_id} is {run.status.value}"
    return None


def find_orphans(instance: dg.DagsterInstance, engine: DataprocEngine) -> Iterator[tuple[Cluster, str]]:
    """Orphaned clusters of this deployment with the reason, except those already being deleted."""
    for cluster in engine.clusters():
        if cluster.status != "STOPPING" and (reason := orphan_reason(instance, cluster)):
            yield cluster, reason


def delete_orphans(instance: dg.DagsterInstance, engine: DataprocEngine, get_log: Callable[[], Logger]) -> str:
    """Request the deletion of each orphaned cluster; returns a one-sentence summary.

    `get_log` is called only if there is something to log, because in a sensor tick it creates a log file.

    Raises:
        DataprocError: the API does not answer.
        UndeletedClusters: some deletions were refused; the others were requested. Alerts report each of these clusters.
    """
    engine.api.retry_for_s = RETRY_FOR_S
    for run_id in fail_dead_runs(instance):
        get_log().warning(f"reported run {run_id} as failed: its process died")
    deleted, errors = [], {}
    for cluster, reason in find_orphans(instance, engine):
        try:
            engine.api.request_deletion(cluster.id)
        except DataprocError as error:
            get_log().error(f"cannot delete cluster {cluster.name} ({cluster.id}): {error}")
            errors[f"{cluster.name} ({cluster.id})"] = str(error)
        else:
            get_log().warning(f"deleting cluster {cluster.name} ({cluster.id}): {reason}")
            deleted.append(f"{cluster.name} ({cluster.id}): {reason}")
    if errors:
        raise UndeletedClusters(errors)
    return f"requested deletion of {len(deleted)} clusters: {'; '.join(deleted)}" if deleted else "no orphans"
