"""Finds and deletes orphaned clusters: their run has ended or is unknown, or they are past their lifetime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from logging import Logger

import dagster as dg

from ml_platform.dataproc.api import Cluster, DataprocError
from ml_platform.dataproc.engine import DataprocEngine
from ml_platform.operations.dead_runs import fail_dead_runs

#: How long a call of the API is repeated here: a tick of a sensor has a minute, and the next one comes in five.
RETRY_FOR_S = 15.0


def is_expired(cluster: Cluster, now: float) -> bool:
    """Whether a cluster is past its lifetime, by our own clock, which wrote the label: the API's may differ."""
    try:
        return int(cluster.labels.get("expires-at", "")) < now
    except ValueError:
        return False


def why_orphaned(instance: dg.DagsterInstance, cluster: Cluster) -> str | None:
    """Why one of our clusters is to be deleted; None while its run needs it."""
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
    """This deployment's orphaned clusters with the reason, without those that are being deleted already."""
    for cluster in engine.clusters():
        if cluster.status != "STOPPING" and (reason := why_orphaned(instance, cluster)):
            yield cluster, reason


def delete_orphans(instance: dg.DagsterInstance, engine: DataprocEngine, get_log: Callable[[], Logger]) -> str:
    """Ask for the deletion of each orphaned cluster; returns a sentence that says what was done.

    `get_log` is called only where there is something to log, because it makes a file for a sensor's tick.

    Raises:
        DataprocError: some cannot be deleted; the deletion of the others was asked for.
    """
    engine.api.retry_for_s = RETRY_FOR_S
    for run_id in fail_dead_runs(instance):
        get_log().warning(f"reported run {run_id} as failed: its process died")
    deleted, refused = [], []
    for cluster, reason in find_orphans(instance, engine):
        try:
            engine.api.request_deletion(cluster.id)
        except DataprocError as error:
            get_log().error(f"cannot delete cluster {cluster.name} ({cluster.id}): {error}")
            refused.append(str(error))
        else:
            get_log().warning(f"deleting cluster {cluster.name} ({cluster.id}): {reason}")
            deleted.append(f"{cluster.name} ({cluster.id}): {reason}")
    if refused:
        raise DataprocError(f"{len(refused)} orphaned clusters cannot be deleted: {refused[0]}")
    return f"asked for the deletion of {len(deleted)} clusters: {'; '.join(deleted)}" if deleted else "no orphans"
