"""Cloud commands: ``ml-platform clusters`` lists and deletes clusters, ``dev-cloud`` runs a local emulation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ml_platform.cli.context import AsJson, CommandError, console, dagster_instance, plain, print_json, say
from ml_platform.settings import Settings, load_settings

if TYPE_CHECKING:
    from ml_platform.dataproc.engine import DataprocEngine

app = typer.Typer(help="List and delete clusters of this deployment.", no_args_is_help=True)


def dataproc_engine(settings: Settings) -> DataprocEngine:
    """Create the engine of this deployment. Raises CommandError if the deployment does not use Data Proc clusters."""
    from dagster import EnvVar

    from ml_platform.dataproc.engine import DataprocEngine
    from ml_platform.definitions import build_engine

    engine = build_engine(settings)
    if not isinstance(engine, DataprocEngine):
        raise CommandError(
            "this deployment does not use clusters: set ML_PLATFORM_DEPLOYMENT=yandex, and YC_* as in .env.example"
        )
    if isinstance(engine.iam_token, EnvVar):
        # Dagster resolves an EnvVar only in runs, sensors and jobs.
        return DataprocEngine(**engine.model_dump() | {"iam_token": engine.iam_token.get_value()})
    return engine


@app.command("list")
def list_clusters(as_json: AsJson = False) -> None:
    """Show the clusters, their runs, and which clusters are orphaned."""
    from datetime import datetime, timezone

    from ml_platform.dataproc.orphans import orphan_reason

    settings = load_settings()
    table = Table("cluster", "id", "status", "created", "run", "", title="Clusters of this deployment")
    clusters = dataproc_engine(settings).clusters()
    rows: list[dict[str, str | None]] = []
    with dagster_instance(settings) as instance:
        for cluster in clusters:
            reason = orphan_reason(instance, cluster)
            created = datetime.fromtimestamp(cluster.created_at, timezone.utc)
            verdict = plain(f"orphaned: {reason}", "red") if reason else plain("in use", "green")
            run_id = cluster.labels.get("dagster-run-id", "")
            table.add_row(
                *(plain(cluster.name), plain(cluster.id), cluster.status),
                *(f"{created:%Y-%m-%d %H:%M UTC}", plain(run_id), verdict),
            )
            rows.append(
                {
                    "name": cluster.name,
                    "id": cluster.id,
                    "status": cluster.status,
                    "created": f"{created:%Y-%m-%dT%H:%M:%SZ}",
                    "run_id": run_id or None,
                    "orphaned": reason,
                }
            )
    if as_json:
        print_json(rows)
        return
    console.print(table if clusters else "This deployment has no clusters.")


@app.command("delete")
def delete_clusters(
    cluster_ids: Annotated[list[str] | None, typer.Argument(help="Cluster ids.")] = None,
    orphaned: Annotated[bool, typer.Option("--orphaned", help="Delete all orphaned clusters.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also delete clusters that a run still needs.")] = False,
) -> None:
    """Delete clusters of this deployment, and wait until they are gone."""
    from ml_platform.dataproc.orphans import orphan_reason

    if bool(cluster_ids) == orphaned:
        raise typer.BadParameter("name clusters (see ml-platform clusters list), or give --orphaned")
    settings = load_settings()
    engine = dataproc_engine(settings)
    clusters = {cluster.id: cluster for cluster in engine.clusters()}
    unknown = [cluster_id for cluster_id in cluster_ids or [] if cluster_id not in clusters]
    if unknown:
        raise CommandError(f"not a cluster of this deployment: {', '.join(unknown)}; nothing was deleted")
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
        say("No orphaned clusters.")


def _wait_until_deleted(engine: DataprocEngine, cluster_id: str) -> None:
    with console.status(f"deleting {cluster_id}") as status:
        engine.api.delete_cluster(
            cluster_id,
            timeout_s=engine.delete_timeout_s,
            poll_s=engine.poll_s,
            say=lambda text: status.update(plain(text)),
        )


def dev_cloud(
    directory: Annotated[Path, typer.Option(help="Directory for its data and keys.")] = Path("data/dev-cloud"),
    create_seconds: Annotated[float, typer.Option(min=0, help="Time to create a cluster.")] = 10,
) -> None:
    """Run a local emulation of the cloud, the Data Proc API and an S3 server, until interrupted."""
    import shlex
    import time

    from ml_platform.dev.cloud import DevCloud

    with (
        console.status("starting (the first start builds the S3 server)"),
        DevCloud(directory, create_seconds=create_seconds) as cloud,
    ):
        path = cloud.write_environment()
        console.print("The cloud is running. In another shell:\n")
        say(f"  set -a; . {shlex.quote(str(path))}; set +a")
        console.print("\nThen ml-platform doctor, simulate, process-new-files … use it.")
        if cloud.mock_reason:
            say(f"S3 is only a mock, whose data are lost on Ctrl-C: {cloud.mock_reason}", "yellow")
        else:
            say("Stop it with Ctrl-C; its buckets are kept.", "dim")
        if (Path.cwd() / ".env").exists():
            say("The .env in this directory overrides the cloud's settings.", "red")
        while True:
            time.sleep(3600)
