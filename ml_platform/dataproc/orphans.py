"""Clusters that nobody will delete any more: their run's process was killed, or their time is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from logging import Logger

import dagster as dg

from ml_platform.dataproc.api import Cluster, DataprocError
from ml_platform.dataproc.engine import DataprocEngine, expired
from ml_platform.operations.dead_runs import fail_dead_runs

#: How long a call of the API is repeated here.
RETRY_FOR_S = 15.0


def why_orphaned(instance: dg.DagsterInstance, cluster: Cluster) -> str | None:
    """Why one of our clusters is to be deleted; None while its run needs it."""
    run_id = cluster.labels.get("dagster-run-id", "")
    run = instance.get_run_by_id(run_id) if run_id else None
    if run is None:
        return f"its run {run_id or '(no label)'} is unknown"
    if run.is_finished:
        return f"its run {run_id} has ended ({run.status.value})"
    if expired(cluster):
        return f"it is past its lifetime, though its run {run_id} is {run.status.value}"
    return None


def find_orphans(instance: dg.DagsterInstance, engine: DataprocEngine) -> Iterator[tuple[Cluster, str]]:
    """This deployment's orphaned clusters with the reason; those that are being deleted already are not among them."""
    for cluster in engine.clusters():
        if cluster.status != "STOPPING" and (reason := why_orphaned(instance, cluster)):
            yield cluster, reason


def delete_orphans(instance: dg.DagsterInstance, engine: DataprocEngine, get_log: Callable[[], Logger]) -> str:
    """Ask for the deletion of each orphaned cluster, and say in one sentence what was done.

    `get_log` is called only where there is something to log: the log of a sensor's tick is a file once it is asked for.

    Raises:
        DataprocError: some cannot be deleted; the others were.
    """
    # A tick of a sensor has a minute; the next one comes in five.
    engine.api.retry_for_s = RETRY_FOR_S
    dead = fail_dead_runs(instance)
    for run_id in dead:
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
