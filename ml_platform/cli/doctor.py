"""Command ``ml-platform doctor``: checks everything that the platform needs, with advice if a check fails."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from rich.table import Table

from ml_platform.cli.clusters import dataproc_engine
from ml_platform.cli.context import CommandError, console, dagster_instance, first_line, lake_of, mlflow_of, plain
from ml_platform.lake.storage import StorageError
from ml_platform.operations.background import in_background
from ml_platform.settings import Settings, SettingsError, is_set, load_settings

if TYPE_CHECKING:
    import dagster as dg

#: Longer than any check's own timeouts; the slowest is an S3 endpoint that does not answer.
CHECK_TIMEOUT_S = 75

#: Age of the newest heartbeat of a daemon that has ended; a running one sends two a minute.
MAX_HEARTBEAT_AGE_S = 300

#: Advice if artifacts cannot be stored, by URI scheme.
ARTIFACTS_ADVICE = {
    "mlflow-artifacts": "MLflow's server stores them: check its log, that the bucket or directory of its "
    "--artifacts-destination exists, and its permissions there",
    "s3": "this machine stores them itself: check AWS_ENDPOINT_URL_S3, and the key and its permissions",
    "file": "a directory of this machine: check its owner and the free space",
}


class Remark(Exception):
    """Something to know about the installation that is not always a fault."""


def doctor() -> None:
    """Check settings, Java, storage, MLflow, its artifacts, Dagster and alerts, with advice for each failed check."""
    checks = _checks(load_settings())
    table = Table("check", "", "result", show_lines=False)
    failed: list[str] = []
    for name, check in checks.items():
        needed = {"artifacts": "MLflow", "daemon": "Dagster"}.get(name)
        if needed in failed:
            table.add_row(name, "", f"not checked: {needed} is needed for it")
            continue
        try:
            with console.status(f"checking {name}"):
                result, verdict = _with_timeout(check), "[green]ok[/green]"
        except Remark as remark:
            result, verdict = str(remark), "[yellow]note[/yellow]"
        except Exception as error:
            failed.append(name)
            result, verdict = first_line(error), "[red]failed[/red]"
        # MLflow's database URL may contain a password.
        table.add_row(name, verdict, plain(re.sub(r"//\S*@", "//", result)))
    console.print(table)
    if failed:
        raise CommandError(f"{len(failed)} of {len(checks)} checks failed")


def _checks(settings: Settings) -> dict[str, Callable[[], str]]:
    """Checks of this deployment by name. Each returns its result or raises an error that says what is wrong."""
    checks: dict[str, Callable[[Settings], str]] = {"settings": _check_settings}
    if settings.deployment == "yandex":
        checks |= {"Data Proc": _check_dataproc, "library": _check_library}
    else:
        checks |= {"Java": _check_java}
        if not settings.spark_master.startswith("local"):
            checks |= {"library": _check_library}
    checks |= {"raw files": _check_raw_files, "lake": _check_lake}
    checks |= {"MLflow": _check_mlflow, "artifacts": _check_artifacts}
    checks |= {"Dagster": _check_dagster, "daemon": _check_daemon}
    return {name: partial(check, settings) for name, check in checks.items()} | _alert_checks()


def _alert_checks() -> dict[str, Callable[[], str]]:
    """One check per alert destination, or a failing check if the alert settings are invalid."""
    from ml_platform.operations.destinations import build_destinations
    from ml_platform.settings import load_alert_settings

    try:
        destinations = build_destinations(load_alert_settings())
    except SettingsError as error:
        problem = error

        def fail() -> str:
            raise problem

        return {"alerts": fail}
    return {f"alerts: {destination.name}": destination.check for destination in destinations}


def _with_timeout(check: Callable[[], str]) -> str:
    """Run `check`. Raises CommandError if it takes too long: some libraries wait for hours."""
    future = in_background(check)
    if not wait([future], CHECK_TIMEOUT_S).done:
        raise CommandError(f"timed out after {CHECK_TIMEOUT_S:g} s: check its address and the network")
    return future.result()


def _check_settings(settings: Settings) -> str:
    yandex = settings.deployment == "yandex"
    spark = "one cluster per run" if yandex else f"Spark on {settings.spark_master}"
    return f"deployment {settings.deployment}, {spark}"


def _check_java(settings: Settings) -> str:
    if settings.spark_home and not (settings.spark_home / "bin").is_dir():
        raise CommandError(f"SPARK_HOME is {settings.spark_home}, which is not a Spark installation: unset it")
    home = settings.java_home
    java = shutil.which("java", path=str(home / "bin")) if home else shutil.which("java")
    if java is None:
        problem = f"JAVA_HOME is {home}, which has no bin/java" if home else "there is no java in PATH"
        raise CommandError(f"{problem}; Spark needs Java 17 or 21, e.g. apt-get install openjdk-17-jre-headless")
    output = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False).stderr
    version = next((line for line in output.splitlines() if " version " in line), "of unknown version")
    if not re.search(r'"(17|21)\b', version):
        raise CommandError(f"{java} is {version}; Spark needs Java 17 or 21: set JAVA_HOME to one")
    return f"{version} ({java})"


def _check_library(_: Settings) -> str:
    """Check that the learners' library for clusters can be packaged here."""
    from ml_platform.spark.code_archive import library_archive

    name, content = library_archive()
    return f"{name.rpartition('-')[0]} for clusters (Linux, x86_64), {len(content) / 1e6:.1f} MB"


def _check_dataproc(settings: Settings) -> str:
    engine = dataproc_engine(settings)
    engine.api.retry_for_s = 15
    return f"the API answers; {len(engine.clusters())} clusters of this deployment in folder {engine.spec.folder_id}"


@contextmanager
def _directory_advice(needed: str, variable: str) -> Generator[None]:
    """Turn the operating system's error about a local directory into advice; errors of S3 have their own."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.filename is None:
            raise
        raise CommandError(
            f"{error.strerror}: {error.filename}: check that the directory exists and is {needed}, or set {variable}"
        ) from error


@_directory_advice("readable", "ML_PLATFORM_RAW_URI")
def _check_raw_files(settings: Settings) -> str:
    from ml_platform.escaping import shorten_list

    lake = lake_of(settings)
    files, ignored = lake.list_raw_files()
    if not files:
        raise CommandError(
            f"no raw files (*.txt) in {settings.raw_uri}: add some, run ml-platform simulate, "
            "or set ML_PLATFORM_RAW_URI"
        )
    # S3 has separate permissions to list and to read.
    if non_empty := [file for file in files.values() if file.size]:
        lake.raw.read_start(non_empty[0].name)
    size = sum(file.size for file in files.values()) / 1e6
    names = f": {shorten_list([f'{name!r} ({why})' for name, why in ignored.items()])}" if ignored else ""
    return f"{len(files)} files, {size:,.1f} MB in {settings.raw_uri}, {len(ignored)} ignored{names}"


@_directory_advice("writable", "ML_PLATFORM_LAKE_URI")
def _check_lake(settings: Settings) -> str:
    from ml_platform.lake.reports import CleanedReport

    lake = lake_of(settings)
    lake.write_json("_runs/doctor.json", {"written_by": "ml-platform doctor"})
    if lake.read_json("_runs/doctor.json")["written_by"] != "ml-platform doctor":
        raise CommandError(f"{settings.lake_uri} returns different content than was written")
    cleaned, outdated = lake.split_reports(CleanedReport)
    older = f", {len(outdated)} of an older version (ml-platform migrate)" if outdated else ""
    return f"writable, {len(cleaned)} cleaned partitions in {settings.lake_uri}{older}"


def _check_mlflow(settings: Settings) -> str:
    from ml_platform.model.mlflow import limit_retries

    scheme = re.split("[:+]", settings.tracking_uri)[0]
    if scheme in ("postgresql", "mysql", "mssql"):
        _check_database(settings.tracking_uri, "MLFLOW_TRACKING_URI")
    elif scheme.startswith("http"):
        limit_retries()
        _check_server(settings.tracking_uri)
    from ml_platform.model.gate import champion_problem, lost_parts
    from ml_platform.model.mlflow import EXPERIMENT

    resource = mlflow_of(settings)
    experiment = resource.experiment()
    if experiment is not None and experiment.lifecycle_stage == "deleted":
        raise CommandError(
            f"the experiment {EXPERIMENT} is in MLflow's trash, where no run can log to it: "
            f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        )
    champion = resource.champion()
    if champion is None:
        return f"{scheme}: no champion yet"
    if problem := champion_problem(champion) or lost_parts(resource, champion):
        raise CommandError(f"problem with the champion: {problem}")
    return f"{scheme}: champion is version {champion.version}"


def _check_server(url: str) -> None:
    """MLflow's server must answer, and be of the client's major version."""
    import requests

    try:
        answer = requests.get(f"{url.rstrip('/')}/version", timeout=15)
    except (requests.exceptions.SSLError, requests.exceptions.ProxyError):
        return  # MLflow's client, with its own settings for TLS, will say why
    except (requests.ConnectionError, requests.Timeout) as error:
        reason = re.search(r"\[Errno -?\d+\] ([^'\")]+)", str(error))
        raise CommandError(
            f"MLflow's server at {url} does not answer ({reason[1] if reason else type(error).__name__}): "
            "start it, or check MLFLOW_TRACKING_URI"
        ) from None
    except requests.RequestException:
        return
    server = re.fullmatch(r"([0-9]+)\.[0-9a-z.]+", answer.text.strip()) if answer.ok else None
    client = version("mlflow")
    if server and server[1] != client.partition(".")[0]:
        raise CommandError(
            f"MLflow's server is version {server[0]}, its client here {client}: install the same major version on both"
        )


def _check_database(url: str, variable: str) -> None:
    """Connect once to the database that `variable` names; MLflow and Dagster would retry and log each attempt."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    arguments = {"connect_timeout": 10} if url.startswith("postgresql") else {}
    try:
        engine = create_engine(url, connect_args=arguments)
        engine.connect().close()
        engine.dispose()
    except ImportError as error:
        raise CommandError(f"{variable} needs the driver {error.name}: install it") from None
    except SQLAlchemyError as error:
        # Leave out the error's text: it may contain the URL.
        cause = getattr(error, "orig", None)
        reason = first_line(cause) if cause else type(error).__name__
        raise CommandError(
            f"cannot connect to the database in {variable}: {reason}: start the database, or check its address and "
            "password"
        ) from None


def _check_artifacts(settings: Settings) -> str:
    resource = mlflow_of(settings)
    location = resource.artifact_location()
    if location is None:
        return "their location is not known before the first run"
    probe_artifacts(location, resource.tracking_uri)
    return f"can be written, read and deleted in {location}"


def probe_artifacts(location: str, tracking_uri: str) -> None:
    """Write a small artifact below `location`, read it back and delete it without leaving anything behind.

    Raises:
        CommandError: one of these steps failed.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    from ml_platform.model.mlflow import hide_progress_bars

    name = f"ml-platform-doctor-{uuid4().hex}"
    scheme = location.partition(":")[0] if ":" in location else "file"
    advice = ARTIFACTS_ADVICE.get(scheme, "check this location")
    problems: list[str] = []

    @contextmanager
    def step(verb: str) -> Generator[None]:
        try:
            yield
        except Exception as error:
            # The cause is at the end of a long message about the URL.
            cause = first_line(error).rpartition("(Caused by ")[2][:300]
            problems.append(f"artifacts cannot be {verb} in {location}: {cause} ({advice})")

    hide_progress_bars()
    repository = get_artifact_repository(location, tracking_uri=tracking_uri)
    directory = getattr(repository, "artifact_dir", None)  # only local repositories have it
    created = [path for path in (Path(directory), *Path(directory).parents) if not path.exists()] if directory else []
    with tempfile.TemporaryDirectory(prefix="ml-platform-") as temporary:
        probe, copy = Path(temporary, "probe.txt"), Path(temporary, "copy")
        probe.write_text(name)
        copy.mkdir()
        with step("written"):
            repository.log_artifact(str(probe), name)
        if not problems:
            with step("read"):
                content = Path(repository.download_artifacts(f"{name}/{probe.name}", str(copy))).read_text()
                if content != name:
                    raise CommandError("the content read differs from what was written")
        with step("deleted"):
            repository.delete_artifacts(name)
            # MLflow ignores S3's response about objects that could not be deleted.
            if repository.list_artifacts(name):
                raise CommandError(f"{name} still exists")
    for path in created:
        with suppress(OSError):
            path.rmdir()
    if problems:
        raise CommandError(problems[0])


def _check_dagster(settings: Settings) -> str:
    from ml_platform.lake.partitions import raw_files

    config = _dagster_config(settings)
    if missing := sorted({name for name in _variables(config) if not is_set(name)}):
        raise CommandError(f"{', '.join(missing)}: not set, but {settings.dagster_home}/dagster.yaml needs it")
    _check_dagster_database(config)
    try:
        with dagster_instance(settings) as instance:
            _check_tables(instance)
            partitions = len(instance.get_dynamic_partitions(str(raw_files.name)))
            storage = type(instance.event_log_storage).__name__
    except CommandError:
        raise
    except Exception as error:
        # Dagster wraps the database's error in "too many retries".
        cause = error.__cause__ or error.__context__ or error
        cause = getattr(cause, "orig", None) or cause
        raise CommandError(f"{first_line(cause)}: check storage in {settings.dagster_home}/dagster.yaml") from error
    kind = "PostgreSQL" if "Postgres" in storage else "MySQL" if "MySQL" in storage else str(settings.dagster_home)
    return f"{partitions} partitions in {kind}"


def _dagster_config(settings: Settings) -> Mapping[str, Any]:
    """Content of dagster.yaml, empty without DAGSTER_HOME, which the next check names."""
    import dagster as dg

    if settings.dagster_home is None:
        return {}
    file = settings.dagster_home / "dagster.yaml"
    if not file.is_file():
        raise CommandError(
            f"there is no {file}, so Dagster would use its defaults (no monitoring of runs, SQLite): copy the "
            "dagster.yaml of this project there (of deploy/ for PostgreSQL), or check DAGSTER_HOME"
        )
    return dg.config_from_files([str(file)])


def _variables(value: object) -> Iterator[str]:
    """Environment variables that a part of dagster.yaml names, such as DAGSTER_POSTGRES_URL."""
    if isinstance(value, dict):
        if set(value) == {"env"}:
            yield str(value["env"])
        for item in value.values():
            yield from _variables(item)
    elif isinstance(value, list):
        for item in value:
            yield from _variables(item)


def _check_dagster_database(config: Mapping[str, Any]) -> None:
    """Connect once to the PostgreSQL that dagster.yaml names."""
    import dagster as dg

    url = config.get("storage", {}).get("postgres", {}).get("postgres_url")
    if isinstance(url, dict):
        _check_database(dg.EnvVar(url["env"]).get_value() or "", url["env"])
    elif url:
        _check_database(str(url), "dagster.yaml")


def _check_tables(instance: dg.DagsterInstance) -> None:
    """Raise CommandError if Dagster's tables are of another version than its code."""
    for storage in (instance.run_storage, instance.event_log_storage, instance.schedule_storage):
        found, expected = (storage and storage.alembic_version()) or (None, None)
        if found != expected:
            raise CommandError(
                f"Dagster's tables are of revision {found}, and this version needs {expected}: back them up, then run "
                "dagster instance migrate (or install the newer version that has changed them)"
            )


def _check_daemon(settings: Settings) -> str:
    """Find out whether a daemon runs. None is needed for runs by hand."""
    with dagster_instance(settings) as instance:
        heartbeats = instance.get_daemon_heartbeats().values()
    advice = "sensors, schedules and queued runs need one (dagster-daemon run, or make dev)"
    if not heartbeats:
        raise Remark(f"none has run yet: {advice}")
    age = time.time() - max(heartbeat.timestamp for heartbeat in heartbeats)
    if age > MAX_HEARTBEAT_AGE_S:
        raise Remark(f"none has run for {age / 60:,.0f} minutes: {advice}")
    return f"last heartbeat {max(age, 0):.0f} s ago"
