"""Commands on the cloud: ``ml-platform clusters`` lists and deletes clusters, ``dev-cloud`` runs a local stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ml_platform.cli.context import CommandError, console, dagster_instance, plain, say
from ml_platform.settings import Settings, load_settings

if TYPE_CHECKING:
    from ml_platform.dataproc.engine import DataprocEngine

app = typer.Typer(help="Clusters that this deployment made.", no_args_is_help=True)


def dataproc_engine(settings: Settings) -> DataprocEngine:
    """The engine of this deployment. Raises CommandError where Spark runs without clusters of Data Proc."""
    from dagster import EnvVar

    from ml_platform.dataproc.engine import DataprocEngine
    from ml_platform.definitions import build_engine

    engine = build_engine(settings)
    if not isinstance(engine, DataprocEngine):
        raise CommandError(
            "this deployment makes no clusters: set ML_PLATFORM_DEPLOYMENT=yandex, and YC_* as in .env.example"
        )
    if isinstance(engine.iam_token, EnvVar):
        # Dagster resolves variables for runs, sensors and jobs only.
        return DataprocEngine(**engine.model_dump() | {"iam_token": engine.iam_token.get_value()})
    return engine


@app.command("list")
def list_clusters() -> None:
    """Show the clusters, their runs, and which of them are left over."""
    from datetime import datetime, timezone

    from ml_platform.dataproc.orphans import orphan_reason

    settings = load_settings()
    table = Table("cluster", "id", "state", "made", "run", "", title="Clusters of this deployment")
    clusters = dataproc_engine(settings).clusters()
    with dagster_instance(settings) as instance:
        for cluster in clusters:
            reason = orphan_reason(instance, cluster)
            created = datetime.fromtimestamp(cluster.created_at, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
            verdict = plain(f"left over: {reason}", "red") if reason else plain("in use", "green")
            run_id = cluster.labels.get("dagster-run-id", "")
            table.add_row(plain(cluster.name), plain(cluster.id), cluster.status, created, plain(run_id), verdict)
    console.print(table if clusters else "This deployment has no clusters.")


@app.command("delete")
def delete_clusters(
    cluster_ids: Annotated[list[str] | None, typer.Argument(help="Ids of clusters.")] = None,
    orphaned: Annotated[bool, typer.Option("--orphaned", help="All that are left over.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even a cluster whose run still needs it.")] = False,
) -> None:
    """Delete clusters of this deployment, and wait until they are gone."""
    from ml_platform.dataproc.orphans import orphan_reason

    if bool(cluster_ids) == orphaned:
        raise CommandError("name clusters (ml-platform clusters list shows them), or give --orphaned")
    settings = load_settings()
    engine = dataproc_engine(settings)
    clusters = {cluster.id: cluster for cluster in engine.clusters()}
    unknown = [cluster_id for cluster_id in cluster_ids or [] if cluster_id not in clusters]
    if unknown:
        raise CommandError(f"no cluster of this deployment: {', '.join(unknown)}; nothing was deleted")
    with dagster_instance(settings) as instance:
        reasons = {cluster_id: orphan_reason(instance, cluster) for cluster_id, cluster in clusters.items()}
    selected = cluster_ids or [cluster_id for cluster_id, reason in reasons.items() if reason]
    in_use = [cluster_id for cluster_id in selected if not reasons[cluster_id]]
    if in_use and not force:
        raise CommandError(f"a run still needs {', '.join(in_use)}: terminate it, or give --force; nothing was deleted")
    for cluster_id in selected:
        engine.api.request_deletion(cluster_id)
    for cluster_id in selected:
        _wait_until_deleted(engine, cluster_id)
        say(f"deleted {clusters[cluster_id].name} ({cluster_id}): {reasons[cluster_id] or 'by force'}")
    if not selected:
        say("No cluster is left over.")


def _wait_until_deleted(engine: DataprocEngine, cluster_id: str) -> None:
    with console.status(f"deleting {cluster_id}") as status:
        engine.api.delete_cluster(
            cluster_id,
            timeout_s=engine.delete_timeout_s,
            poll_s=engine.poll_s,
            say=lambda text: status.update(plain(text)),
        )


def dev_cloud(
    directory: Annotated[Path, typer.Option(help="Where its data and keys are kept.")] = Path("data/dev-cloud"),
    create_seconds: Annotated[float, typer.Option(min=0, help="How long a cluster takes to be created.")] = 10,
) -> None:
    """A stand-in for the cloud on this machine: the Data Proc API and an S3 server. Runs until it is interrupted."""
    import time

    from ml_platform.dev.cloud import DevCloud

    with (
        console.status("starting; the first time, the S3 server is built"),
        DevCloud(directory, create_seconds=create_seconds) as cloud,
    ):
        path = cloud.write_environment()
        console.print("The cloud is up. In another shell:\n")
        say(f"  set -a; . {path}; set +a")
        console.print("\nThen ml-platform doctor, simulate, process-new-files … work on it.")
        if cloud.mock_reason:
            say(f"S3 is only a mock, and empty after Ctrl-C: {cloud.mock_reason}", "yellow")
        else:
            say("It runs until Ctrl-C; what is in its buckets stays.", "dim")
        if (Path.cwd() / ".env").exists():
            say("There is a .env here: its settings win over the cloud's.", "red")
        while True:
            time.sleep(3600)
