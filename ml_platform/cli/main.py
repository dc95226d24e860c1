"""The command ``ml-platform``: what people do beside Dagster's own commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ml_platform.escaping import printable
from ml_platform.settings import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    import dagster as dg
    from mlflow.entities.model_registry import ModelVersion
    from rich.status import Status

    from ml_platform.dataproc.engine import DataprocEngine
    from ml_platform.lake.resource import LakeResource
    from ml_platform.model.mlflow import MlflowResource

app = typer.Typer(
    help="Keep a fraud model fresh as raw transaction files arrive.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)


class CommandError(Exception):
    """Something the user can mend; the message says how."""


@app.callback()
def _options(
    context: typer.Context,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")] = False,
) -> None:
    context.obj = {"traceback": traceback}
    # As Dagster's own commands do, which let the file win.
    from dotenv import load_dotenv

    load_dotenv(Path.cwd() / ".env", override=True)


def main() -> None:
    """Run a command; an error is one line that says what to do, unless ``--traceback`` asks for more."""
    try:
        app()
    except KeyboardInterrupt:
        errors.print("interrupted", style="red")
        sys.exit(130)
    except Exception as error:
        if "--traceback" in sys.argv:
            raise
        # Here, because a command that succeeds need not wait for them.
        from ml_platform.dataproc.api import DataprocError
        from ml_platform.lake.resource import SchemaVersionError
        from ml_platform.lake.storage import StorageError
        from ml_platform.spark.code_archive import CodeArchiveError
        from ml_platform.spark.s3a import S3AError

        lines = str(error).strip().splitlines() or [type(error).__name__]
        known = isinstance(
            error,
            (CommandError, SettingsError, CodeArchiveError, DataprocError, SchemaVersionError, StorageError, S3AError),
        )
        prefix = "" if known else f"{type(error).__name__}: "
        line = printable(f"error: {prefix}{lines[0]}")
        errors.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
        if not known:
            errors.print("(ml-platform --traceback … shows where it happened)", style="dim", soft_wrap=True)
        sys.exit(1)


def _plain(text: str, style: str = "") -> Text:
    """`text` as it stands: neither rich nor the terminal finds anything in it to obey."""
    return Text(printable(text), style=style)


def _lake(settings: Settings) -> LakeResource:
    from ml_platform.lake.resource import LakeResource

    return LakeResource(raw_uri=settings.raw_uri, lake_uri=settings.lake_uri, epoch=settings.epoch.isoformat())


@contextmanager
def _instance(settings: Settings) -> Generator[dg.DagsterInstance]:
    """Dagster's storage, which must outlive this command."""
    import dagster as dg

    if settings.dagster_home is None:
        raise CommandError(
            "DAGSTER_HOME is not set: name a directory for Dagster's storage, e.g. "
            "export DAGSTER_HOME=$PWD/.dagster_home (make does it by itself)"
        )
    if not settings.dagster_home.is_absolute():
        raise CommandError("DAGSTER_HOME takes an absolute path")
    settings.dagster_home.mkdir(parents=True, exist_ok=True)
    with dg.DagsterInstance.get() as instance:
        yield instance


@app.command()
def simulate(
    files: Annotated[int, typer.Option(min=1, help="Number of raw files.")] = 3,
    first_file: Annotated[int, typer.Option(min=0, help="Number of the first one; earlier files are not made.")] = 0,
    days_per_file: Annotated[int, typer.Option(min=1, help="Days that a file covers.")] = 30,
    customers: Annotated[int, typer.Option(min=1, help="Number of customers.")] = 2_500,
    terminals: Annotated[int, typer.Option(min=1, help="Number of terminals.")] = 5_000,
    fault_rate: Annotated[
        float, typer.Option(min=0, help="How many times more faults than in real files; 0 for none.")
    ] = 50.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same files.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Make a file again that is there.")] = False,
) -> None:
    """Make raw files by a public simulation method, faults included, in ML_PLATFORM_RAW_URI."""
    from ml_platform.dev.simulator import Simulation
    from ml_platform.lake.resource import open_store

    settings = load_settings()
    try:
        simulation = Simulation(
            start=settings.epoch,
            days_per_file=days_per_file,
            customers=customers,
            terminals=terminals,
            fault_rate=fault_rate,
            seed=seed,
        )
    except ValueError as error:
        raise CommandError(str(error)) from None
    store = open_store(settings.raw_uri)
    existing = {file.name for file in store.list_directory()}
    table = Table(
        "file", "rows", "frauds", "faulty or rejected", "MB", title=escape(f"Raw files in {settings.raw_uri}")
    )
    for index in range(first_file, first_file + files):
        name = simulation.file_name(index)
        if name in existing and not overwrite:
            table.add_row(name, "kept as it is", "", "", "")
            continue
        with console.status(f"simulating {name} …") as status, store.open_new(name) as out:

            def show(rows: int, name: str = name, status: Status = status) -> None:
                status.update(f"simulating {name}: {rows:,} rows")

            truth = simulation.write_file(index, out, progress=show)
        counts = truth.counts
        faulty = counts["rejected_rows"] + counts["duplicate_rows"]
        faulty += sum(counts[rule] for rule in ("hour_24", "wrong_seconds", "unknown_terminal", "unknown_customer"))
        size = f"{truth.size_bytes / 1e6:.1f}"
        table.add_row(name, f"{counts['raw_rows']:,}", f"{counts['fraud_rows']:,}", f"{faulty:,}", size)
    console.print(table)


@app.command()
def sync() -> None:
    """Register the raw files as partitions, so that Dagster's commands and UI know them."""
    from ml_platform.assets.raw import raw_file_observation
    from ml_platform.lake.partitions import raw_files

    settings = load_settings()
    files, ignored = _lake(settings).list_raw_files()
    for name, reason in ignored.items():
        errors.print(f"ignored {name!r}: {reason}", style="yellow", markup=False, soft_wrap=True)
    with _instance(settings) as instance:
        registered = set(instance.get_dynamic_partitions(str(raw_files.name)))
        new = [key for key in files if key not in registered]
        instance.add_dynamic_partitions(str(raw_files.name), new)
        for key in new:
            instance.report_runless_asset_event(raw_file_observation(files[key]))
    console.print(
        f"{len(files)} raw files in {settings.raw_uri}, {len(new)} newly registered", markup=False, soft_wrap=True
    )


@app.command("process-new-files")
def process_new_files() -> None:
    """Do now, in this process, what the sensor new_raw_files would start: one run per range of new files."""

    settings = load_settings()
    with _instance(settings) as instance:
        from ml_platform.definitions import defs
        from ml_platform.jobs import run_config
        from ml_platform.lake.partitions import range_tags
        from ml_platform.planning import plan_runs, prepare

        plan = plan_runs(instance, _lake(settings))
        for name, reason in plan.ignored.items():
            errors.print(f"ignored {name!r}: {reason}", style="yellow", markup=False, soft_wrap=True)
        prepare(instance, plan)
        console.print(plan.reason, markup=False, soft_wrap=True)
        failed = []
        for start, end in plan.ranges:
            console.print(f"processing {start} to {end}", style="bold")
            result = defs.resolve_job_def("process_new_files").execute_in_process(
                instance=instance, tags=range_tags(start, end), run_config=run_config(), raise_on_error=False
            )
            if not result.success:
                failed.append(result.run_id)
    if failed:
        raise CommandError(
            f"{len(failed)} of {len(plan.ranges)} runs failed: {', '.join(failed)}; the log above says why"
        )


@app.command()
def summary() -> None:
    """Show what is in the lake, and the champion."""
    from ml_platform.lake.reports import CleanedReport, FeaturesReport

    settings = load_settings()
    lake = _lake(settings)
    files, _ = lake.list_raw_files()
    cleaned, features = lake.reports(CleanedReport), lake.reports(FeaturesReport)
    table = Table("raw file", "raw rows", "clean", "duplicate", "rejected", "frauds", "features", title="Lake")
    for key in sorted(files.keys() | cleaned.keys()):
        if key not in cleaned:
            table.add_row(key, "not cleaned yet")
            continue
        counts = cleaned[key].counts
        shown = [
            getattr(counts, name)
            for name in ("raw_rows", "clean_rows", "duplicate_rows", "rejected_rows", "fraud_rows")
        ]
        table.add_row(key, *[f"{count:,}" for count in shown], "yes" if key in features else "no")
    console.print(table)
    _show_champion(settings)


@app.command()
def migrate(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Move what an older version left in the lake to this version, after an upgrade. May be run again at any time."""
    from ml_platform.lake.migrations import migrate_lake
    from ml_platform.planning import has_active_runs

    settings = load_settings()
    if not dry_run:
        with _instance(settings) as instance:
            if has_active_runs(instance):
                raise CommandError("runs are queued or running: wait for them, or stop them, and try again")
    lake = _lake(settings)
    table = Table("table", "raw file", "schema", "", title="Partitions of an older version")
    outcomes = list(migrate_lake(lake, dry_run=dry_run))
    for item in outcomes:
        table.add_row(item.table, _plain(item.key), str(item.version), _plain(item.outcome))
    console.print(table if outcomes else f"Nothing of an older version is in {escape(settings.lake_uri)}.")
    if dry_run and any(item.can_move for item in outcomes):
        console.print("This was a dry run: without --dry-run it is done.")
    _name_problem(_mlflow(settings).champion())


champion_app = typer.Typer(help="See and move the alias champion of the fraud model.", no_args_is_help=True)
app.add_typer(champion_app, name="champion")


def _mlflow(settings: Settings) -> MlflowResource:
    from ml_platform.model.mlflow import MlflowResource

    return MlflowResource(tracking_uri=settings.tracking_uri, artifact_root=settings.artifact_root)


@champion_app.command("show")
def champion_show() -> None:
    """Who is champion, since when, on what data, and why."""
    _show_champion(load_settings())


def _show_champion(settings: Settings) -> None:
    from ml_platform.model.mlflow import MODEL_NAME

    resource = _mlflow(settings)
    champion = resource.champion()
    if champion is None:
        console.print(f"No model of {MODEL_NAME} is the champion yet.")
        return
    run = resource.client().get_run(champion.run_id)
    table = Table("", "value", title=f"Champion: {MODEL_NAME} version {champion.version}")
    for label, tag in (
        ("champion since", "champion_since"),
        ("by", "champion_by"),
        ("because", "champion_why"),
        ("trained up to partition", "cutoff"),
        ("last day trained on", "train_last_date"),
        ("learner", "learner"),
        ("Dagster run", "dagster.run_id"),
    ):
        table.add_row(label, _plain(champion.tags.get(tag, "not recorded")))
    table.add_section()
    for name, value in sorted(run.data.metrics.items()):
        if name.startswith("test_"):
            table.add_row(name, f"{value:,.4f}".rstrip("0").rstrip("."))
    console.print(table)
    _name_problem(champion)


def _name_problem(champion: ModelVersion | None) -> None:
    """Say so if the champion cannot score with this version of the platform."""
    from ml_platform.model.gate import champion_problem

    if champion is not None and (problem := champion_problem(champion)):
        console.print(_plain(f"The champion, {problem}.", "yellow"), soft_wrap=True)


@champion_app.command("set")
def champion_set(
    version: Annotated[str, typer.Argument(help="Version of the registered model.")],
    why: Annotated[str, typer.Option(help="Why; it is recorded with the version.")],
    who: Annotated[str | None, typer.Option(help="Who decides; default: the user who runs this.")] = None,
) -> None:
    """Make a version the champion by hand; one that this platform cannot score with is refused."""
    _move_champion(load_settings(), version, who, why)


@champion_app.command("rollback")
def champion_rollback(
    why: Annotated[str, typer.Option(help="Why; it is recorded with the version.")],
    who: Annotated[str | None, typer.Option(help="Who decides; default: the user who runs this.")] = None,
) -> None:
    """Give the alias back to the version that was champion before."""
    settings = load_settings()
    champion = _mlflow(settings).champion()
    before = champion.tags.get("champion_before") if champion else None
    if before is None:
        raise CommandError("there is no earlier champion to go back to; ml-platform champion set VERSION names one")
    _move_champion(settings, before, who, why)


def _move_champion(settings: Settings, version: str, who: str | None, why: str) -> None:
    import getpass

    from mlflow.exceptions import MlflowException

    from ml_platform.model.gate import PROOF_TAG, champion_problem, champion_tags
    from ml_platform.model.mlflow import MODEL_NAME, NOT_THERE

    resource = _mlflow(settings)
    try:
        found = resource.client().get_model_version(MODEL_NAME, version)
    except MlflowException as error:
        if error.error_code not in NOT_THERE:
            raise
        raise CommandError(f"{MODEL_NAME} has no version {version!r}; MLflow's UI lists the versions") from None
    if not why.strip():
        raise CommandError("--why is empty: say why, for whoever asks later")
    # Before there was the tag, the gate proved what it promoted, and nothing else.
    if PROOF_TAG not in found.tags and found.tags.get("champion_by") != "fraud_model":
        raise CommandError(
            f"version {version} was never loaded back from MLflow and held against its own scores (it has no tag "
            f"{PROOF_TAG}): materialize fraud_model for a version that was. The champion is as it was"
        )
    if problem := champion_problem(found):
        raise CommandError(f"{problem}. The champion is as it was")
    resource.set_champion(version, champion_tags(who=who or getpass.getuser(), why=why))
    console.print(f"version {version} is the champion of {MODEL_NAME}")


clusters_app = typer.Typer(help="Clusters that this deployment made.", no_args_is_help=True)
app.add_typer(clusters_app, name="clusters")


def _engine(settings: Settings) -> DataprocEngine:
    from dagster import EnvVar

    from ml_platform.dataproc.engine import DataprocEngine
    from ml_platform.definitions import build_engine

    engine = build_engine(settings)
    if not isinstance(engine, DataprocEngine):
        raise CommandError(
            "this deployment makes no clusters: set ML_PLATFORM_DEPLOYMENT=yandex, and YC_* as in .env.example"
        )
    if isinstance(engine.iam_token, EnvVar):
        # Nobody resolves it here: Dagster does for runs, sensors and jobs.
        return DataprocEngine(**engine.model_dump() | {"iam_token": engine.iam_token.get_value()})
    return engine


@clusters_app.command("list")
def clusters_list() -> None:
    """Show the clusters, their runs, and which of them are left over."""
    from datetime import datetime, timezone

    from ml_platform.dataproc.orphans import why_orphaned

    settings = load_settings()
    engine = _engine(settings)
    table = Table("cluster", "id", "state", "made", "run", "", title="Clusters of this deployment")
    clusters = engine.clusters()
    with _instance(settings) as instance:
        for cluster in clusters:
            reason = why_orphaned(instance, cluster)
            made = datetime.fromtimestamp(cluster.created_at, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
            verdict = _plain(f"left over: {reason}", "red") if reason else _plain("in use", "green")
            run_id = cluster.labels.get("dagster-run-id", "")
            table.add_row(_plain(cluster.name), _plain(cluster.id), cluster.status, made, _plain(run_id), verdict)
    console.print(table if clusters else "This deployment has no clusters.")


@clusters_app.command("delete")
def clusters_delete(
    cluster_ids: Annotated[list[str] | None, typer.Argument(help="Ids of clusters.")] = None,
    orphaned: Annotated[bool, typer.Option("--orphaned", help="All that are left over.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even a cluster whose run still needs it.")] = False,
) -> None:
    """Delete clusters of this deployment, and wait until they are gone."""
    from ml_platform.dataproc.orphans import why_orphaned

    if bool(cluster_ids) == orphaned:
        raise CommandError("name clusters (ml-platform clusters list shows them), or give --orphaned")
    settings = load_settings()
    engine = _engine(settings)
    own = {cluster.id: cluster for cluster in engine.clusters()}
    strangers = [cluster_id for cluster_id in cluster_ids or [] if cluster_id not in own]
    if strangers:
        raise CommandError(f"no cluster of this deployment: {', '.join(strangers)}; nothing was deleted")
    with _instance(settings) as instance:
        reasons = {cluster_id: why_orphaned(instance, cluster) for cluster_id, cluster in own.items()}
    wanted = cluster_ids or [cluster_id for cluster_id, reason in reasons.items() if reason]
    needed = [cluster_id for cluster_id in wanted if not reasons[cluster_id]]
    if needed and not force:
        raise CommandError(f"a run still needs {', '.join(needed)}: terminate it, or give --force; nothing was deleted")
    for cluster_id in wanted:
        engine.api.request_deletion(cluster_id)
    for cluster_id in wanted:
        with console.status(f"deleting {cluster_id}") as status:
            engine.api.delete_cluster(
                cluster_id, timeout_s=engine.delete_timeout_s, poll_s=engine.poll_s, say=_updater(status)
            )
        console.print(f"deleted {escape(own[cluster_id].name)} ({cluster_id}): {reasons[cluster_id] or 'by force'}")
    if not wanted:
        console.print("No cluster is left over.")


def _updater(status: Status) -> Callable[[str], None]:
    return lambda text: status.update(_plain(text))


@app.command("dev-cloud")
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
        console.print(
            f"The cloud is up. In another shell:\n\n  set -a; . {escape(str(path))}; set +a\n", soft_wrap=True
        )
        console.print("Then ml-platform doctor, simulate, process-new-files … work on it.")
        if cloud.mock_reason:
            console.print(
                f"S3 is only a mock, and empty after Ctrl-C: {cloud.mock_reason}", style="yellow", markup=False
            )
        else:
            console.print("It runs until Ctrl-C; what is in its buckets stays.", style="dim")
        if (Path.cwd() / ".env").exists():
            console.print("There is a .env here: what it sets wins over the cloud's settings.", style="red")
        while True:
            time.sleep(3600)


#: A check that takes longer is wrong. It is above what the slowest of them allows itself, an S3 that is away.
CHECK_TIMEOUT_S = 75


@app.command()
def doctor() -> None:
    """Check settings, Java, storage, MLflow, its artifacts, Dagster and alerts; say what is wrong and what to do."""
    checks: list[tuple[str, Callable[[], str]]] = []
    settings = load_settings()
    if settings.deployment == "yandex":
        checks.append(("settings", lambda: f"deployment {settings.deployment}, clusters made for each run"))
        checks.append(("Data Proc", lambda: _check_dataproc(settings)))
        checks.append(("library", _check_library))
    else:
        checks.append(("settings", lambda: f"deployment {settings.deployment}, Spark on {settings.spark_master}"))
        checks.append(("Java", lambda: _check_java(settings)))
        if not settings.spark_master.startswith("local"):
            checks.append(("library", _check_library))
    checks.append(("raw files", lambda: _check_raw_files(settings)))
    checks.append(("lake", lambda: _check_lake(settings)))
    checks.append(("MLflow", lambda: _check_mlflow(settings)))
    checks.append(("artifacts", lambda: _check_artifacts(settings)))
    checks.append(("Dagster", lambda: _check_dagster(settings)))
    checks += _alert_checks()
    table = Table("what", "", "found", show_lines=False)
    wrong: list[str] = []
    for name, check in checks:
        if name == "artifacts" and "MLflow" in wrong:
            table.add_row(name, "", "not checked, as MLflow does not say where they go")
            continue
        try:
            with console.status(f"checking {name}"):
                found, verdict = _within(CHECK_TIMEOUT_S, check), "[green]ok[/green]"
        except Exception as error:
            wrong.append(name)
            found, verdict = (
                (str(error).strip().splitlines() or [type(error).__name__])[0],
                "[red]wrong[/red]",
            )
        # The address of MLflow's database may hold a password.
        table.add_row(name, verdict, _plain(re.sub(r"//\S*@", "//", found)))
    console.print(table)
    if wrong:
        raise CommandError(f"{len(wrong)} of {len(checks)} checks failed")


def _within(timeout_s: float, check: Callable[[], str]) -> str:
    """What `check` returns or raises, unless it takes too long: some libraries wait for ever, or nearly so."""
    import threading

    outcome: list[str | BaseException] = []

    def call() -> None:
        try:
            outcome.append(check())
        except BaseException as error:
            outcome.append(error)

    # A daemon, which does not keep the command from ending.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise CommandError(f"no answer within {timeout_s:g} s: check its address and the network")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _alert_checks() -> list[tuple[str, Callable[[], str]]]:
    """A check of each place where failed runs are reported; settings that cannot be used are a check of their own."""
    from ml_platform.operations.alerts import build_destinations
    from ml_platform.settings import load_alert_settings

    try:
        destinations = build_destinations(load_alert_settings())
    except SettingsError as error:
        text = str(error)

        def fail() -> str:
            raise CommandError(text)

        return [("alerts", fail)]
    return [(f"alerts: {destination.name}", destination.check) for destination in destinations]


def _check_java(settings: Settings) -> str:
    home = settings.java_home
    java = shutil.which("java", path=str(home / "bin")) if home else shutil.which("java")
    if java is None:
        where = f"JAVA_HOME is {home}, which has no bin/java" if home else "there is no java in PATH"
        raise CommandError(f"{where}; Spark needs Java 17 or 21, e.g. apt-get install openjdk-17-jre-headless")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False).stderr
    version = next((line for line in said.splitlines() if " version " in line), "of no known version")
    if not re.search(r'"(17|21)\b', version):
        raise CommandError(f"{java} is {version}; Spark needs Java 17 or 21: set JAVA_HOME to one")
    return f"{version} ({java})"


def _check_library() -> str:
    """Whether what the tasks of a cluster need can be had here."""
    from ml_platform.spark.code_archive import library_archive

    name, content = library_archive()
    return f"{name.rpartition('-')[0]} for clusters (Linux, x86_64), {len(content) / 1e6:.1f} MB"


def _check_dataproc(settings: Settings) -> str:
    engine = _engine(settings)
    engine.api.retry_for_s = 15
    return f"the API answers; {len(engine.clusters())} clusters of this deployment in folder {engine.spec.folder_id}"


def _check_raw_files(settings: Settings) -> str:
    from ml_platform.lake.partitions import RAW_SUFFIX

    lake = _lake(settings)
    files, ignored = lake.list_raw_files()
    if not files:
        raise CommandError(
            f"no raw file (*.txt) in {settings.raw_uri}: put some there, run ml-platform simulate, "
            "or set ML_PLATFORM_RAW_URI"
        )
    # To list is one permission, to read another.
    if filled := [file.key for file in files.values() if file.size]:
        lake.raw.read_start(f"{filled[0]}{RAW_SUFFIX}")
    size = sum(file.size for file in files.values()) / 1e6
    return f"{len(files)} files, {size:,.1f} MB in {settings.raw_uri}, {len(ignored)} with unusable names"


def _check_lake(settings: Settings) -> str:
    from ml_platform.lake.reports import CleanedReport

    lake = _lake(settings)
    lake.write_json("_runs/doctor.json", {"written_by": "ml-platform doctor"})
    if lake.read_json("_runs/doctor.json")["written_by"] != "ml-platform doctor":
        raise CommandError(f"what was written to {settings.lake_uri} could not be read back")
    cleaned, outdated = lake.reports(CleanedReport), lake.outdated_reports(CleanedReport)
    older = f", {len(outdated)} of an older version (ml-platform migrate)" if outdated else ""
    return f"writable, {len(cleaned)} cleaned partitions in {settings.lake_uri}{older}"


def _check_mlflow(settings: Settings) -> str:
    kind = re.split("[:+]", settings.tracking_uri)[0]
    if kind in ("postgresql", "mysql", "mssql"):
        _check_database(settings.tracking_uri)
    _shorten_mlflows_patience(settings)
    from ml_platform.model.gate import champion_problem

    champion = _mlflow(settings).champion()
    if champion is not None and (problem := champion_problem(champion)):
        raise CommandError(f"the champion, {problem} (ml-platform champion set)")
    found = "no champion yet" if champion is None else f"champion is version {champion.version}"
    return f"{kind}: {found}"


def _shorten_mlflows_patience(settings: Settings) -> None:
    """Let MLflow's client give up on a server within the time of a check: by itself it tries for minutes."""
    if not settings.tracking_uri.startswith("http"):
        return
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

    for variable, value in ((MLFLOW_HTTP_REQUEST_MAX_RETRIES, "1"), (MLFLOW_HTTP_REQUEST_TIMEOUT, "15")):
        if not variable.is_set():
            variable.set(value)


def _check_artifacts(settings: Settings) -> str:
    from ml_platform.model.mlflow import try_artifacts

    resource = _mlflow(settings)
    where = resource.artifact_location()
    if where is None:
        return "where they go is known with the first run"
    try_artifacts(where, resource.tracking_uri)
    return f"can be written, read and deleted in {where}"


def _check_database(url: str) -> None:
    """Connect once, for MLflow itself tries for minutes."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    arguments = {"connect_timeout": 10} if url.startswith("postgresql") else {}
    try:
        engine = create_engine(url, connect_args=arguments)
        engine.connect().close()
        engine.dispose()
    except ImportError as error:
        raise CommandError(f"MLFLOW_TRACKING_URI needs the driver {error.name}: install it") from None
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or type(error).__name__).strip().splitlines()[0]
        raise CommandError(f"the database of MLFLOW_TRACKING_URI refuses: {cause}") from None


def _check_dagster(settings: Settings) -> str:
    from ml_platform.lake.partitions import raw_files

    try:
        with _instance(settings) as instance:
            partitions = len(instance.get_dynamic_partitions(str(raw_files.name)))
            storage = type(instance.event_log_storage).__name__
    except CommandError:
        raise
    except Exception as error:
        # Dagster hides what the database says behind "too many retries".
        cause = error.__cause__ or error.__context__ or error
        said = (str(getattr(cause, "orig", None) or cause).strip().splitlines() or [type(cause).__name__])[0]
        raise CommandError(f"{said}: check storage in {settings.dagster_home}/dagster.yaml") from error
    kind = "PostgreSQL" if "Postgres" in storage else "MySQL" if "MySQL" in storage else str(settings.dagster_home)
    return f"{partitions} partitions in {kind}"


if __name__ == "__main__":
    main()
