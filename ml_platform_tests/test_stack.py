"""The stack of deploy/ on a real PostgreSQL, S3 and Data Proc: what a run needs is killed while a cluster works for it.

In the end every partition and the model are what this machine makes of the same files, nothing was done twice, and no
cluster is left.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg
import pytest

from ml_platform.dev.cloud import LAKE_BUCKET, RAW_BUCKET, DevCloud
from ml_platform_tests.lake_files import LakeFiles, assert_reports_last, assert_same_model, assert_same_tables
from ml_platform_tests.postgres import PostgresServer
from ml_platform_tests.stack import ARTIFACTS_BUCKET, DEPLOY, START_TIMEOUT_S, Stack
from ml_platform_tests.world import FILES, KEYS, SHORT_LIVED_JAVA, World, assert_counts, wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.spark,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform != "linux", reason="a run is known to be dead by /proc"),
]

#: The webserver is not among them: no run depends on it.
KILLED = ("daemon", "postgres", "code", "mlflow")

CLEANED = "cleaned_transactions"


@dataclass(frozen=True)
class Healed:
    """A stack whose processes were killed in the middle of a run, when all is quiet again."""

    stack: Stack
    lake: LakeFiles
    #: Files of the partitions that were cleaned when the run was killed, and when they were written.
    cleaned_before: dict[str, datetime]
    killed_run: str
    finished_run: str


def report_name(key: str) -> str:
    return f"{CLEANED}/raw_file={key}/_report.json"


def has_logged(instance: dg.DagsterInstance, run_id: str, text: str) -> bool:
    return any(text in record.message for record in instance.all_logs(run_id))


def has_started(instance: dg.DagsterInstance, run_id: str, step: str) -> bool:
    events = instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_START)
    return any(record.dagster_event and record.dagster_event.step_key == step for record in events)


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> Generator[Healed]:
    directory = tmp_path_factory.mktemp("stack")
    postgres = PostgresServer()
    postgres.create()
    try:
        with DevCloud(directory / "cloud", SHORT_LIVED_JAVA, create_seconds=1, delete_seconds=1) as cloud:
            cloud.s3.client().create_bucket(Bucket=ARTIFACTS_BUCKET)
            for file in FILES:
                cloud.s3.client().put_object(Bucket=RAW_BUCKET, Key=file.name, Body=file.content)
            with Stack(directory / "stack", postgres, cloud) as stack:
                yield kill_one_after_another(stack)
    finally:
        postgres.remove()


def kill_one_after_another(stack: Stack) -> Healed:
    """Kill the services of KILLED during the runs that the sensor starts; returns when a run has succeeded."""

    lake = LakeFiles(s3=stack.cloud.s3, bucket=LAKE_BUCKET)

    def wait(condition: Callable[[], Any], what: str) -> Any:
        return wait_until(condition, what, pause=0.5)

    def kill(name: str) -> None:
        assert len(stack.cloud.dataproc.clusters) == 1, "there is the run's cluster, and none of an earlier run"
        stack.kill(name)

    with stack.instance() as instance:

        def status(run_id: str) -> dg.DagsterRunStatus | None:
            run = instance.get_run_by_id(run_id)
            return run and run.status

        (run,) = wait(instance.get_runs, "the sensor has started a run")
        killed = run.run_id
        wait(lambda: status(killed) == dg.DagsterRunStatus.STARTED, "the run has started")
        wait(lambda: stack.cloud.dataproc.jobs, "the run has given its cluster a job")
        kill("daemon")
        kill("postgres")

        wait(lambda: lake.changed(report_name(KEYS[0])), "the first file is cleaned")
        kill("code")
        assert status(killed) == dg.DagsterRunStatus.STARTED, "the run was over too early"
        partitions = [lake.changed(f"{CLEANED}/raw_file={key}/") for key in KEYS if lake.changed(report_name(key))]
        cleaned = {name: at for partition in partitions for name, at in partition.items()}

        def retry() -> str | None:
            return next((run.run_id for run in instance.get_runs() if run.parent_run_id == killed), None)

        second = wait(retry, "the run is started again")
        wait(lambda: has_started(instance, second, "fraud_model"), "the model's turn has come")
        kill("mlflow")
        wait(lambda: all(run.is_finished for run in instance.get_runs()), "all runs have ended")
    return Healed(stack, lake, cleaned, killed, second)


def test_every_service_is_healthy_again(healed: Healed) -> None:
    for name, service in healed.stack.services.items():
        assert service.starts >= (2 if name in KILLED else 1), f"{name}: {healed.stack.said(name)}"
        wait_until(lambda name=name: healed.stack.is_healthy(name), f"{name} is healthy", START_TIMEOUT_S)  # type: ignore[misc]


def test_the_killed_run_has_failed_and_its_retry_has_finished_the_work(healed: Healed) -> None:
    with healed.stack.instance() as instance:
        last, first = instance.get_runs()
        assert (first.run_id, first.status) == (healed.killed_run, dg.DagsterRunStatus.FAILURE)
        assert has_logged(instance, first.run_id, "The process of the run died")
        assert (last.parent_run_id, last.status) == (first.run_id, dg.DagsterRunStatus.SUCCESS)
        assert instance.get_dynamic_partitions("raw_files") == KEYS
        for asset in ("cleaned_transactions", "transaction_features", "fraud_model"):
            assert instance.get_materialized_partitions(dg.AssetKey(asset)) == set(KEYS), asset


def test_no_cluster_is_left_and_no_job_ran_twice(healed: Healed) -> None:
    dataproc = healed.stack.cloud.dataproc
    assert dataproc.clusters == {}
    with healed.stack.instance() as instance:
        last, first = (run.run_id for run in instance.get_runs())
    created = [call["request"]["labels"]["dagster-run-id"] for call in dataproc.calls("ClusterService.Create")]
    assert created == [first, last]
    jobs = [job.proto.name.split("-")[0] for job in dataproc.jobs.values()]
    # The second run's cluster cleans what the first one's did not get to, if that is anything.
    assert jobs in (["clean", "build", "score", "train"], ["clean", "clean", "build", "score", "train"])
    assert all(job.finished for job in dataproc.jobs.values())


def test_every_file_is_cleaned_once(healed: Healed) -> None:
    now = healed.lake.changed()
    assert report_name(KEYS[0]) in healed.cleaned_before
    assert {name: now.get(name) for name in healed.cleaned_before} == healed.cleaned_before
    for file in FILES:
        report = healed.lake.report(file.key)
        assert_counts(report, file.truth)
        # The killed run's job went on, until the next run had its cluster deleted.
        assert report["run_id"] == healed.killed_run or report_name(file.key) not in healed.cleaned_before
    assert_reports_last(healed.lake, KEYS)


def test_tables_and_model_are_those_of_this_machine(healed: Healed, local_world: World) -> None:
    expected = LakeFiles(local_world.lake)
    assert_same_tables(healed.lake, expected, KEYS)
    assert_same_model(healed.lake, healed.finished_run, expected, local_world.runs()[0].run_id, KEYS[-1])


def test_a_step_says_what_its_cluster_was_and_cost(healed: Healed) -> None:
    metadata = {name: value.value for name, value in model_of(healed).metadata.items()}
    with healed.stack.instance() as instance:
        run = instance.get_run_by_id(healed.finished_run)
        assert run is not None
        # The driver's log is shown as it grows.
        assert has_logged(instance, run.run_id, f"features 2/2: {KEYS[1]} done")
    assert f"features 2/2: {KEYS[1]} done" in healed.lake.read(f"_runs/{run.run_id}/build_features.driver.log").decode()
    assert metadata["cluster_id"] == run.tags["ml_platform/cluster_id"]
    assert [job["name"].split("-")[0] for job in metadata["cluster_jobs"]][-3:] == ["build", "score", "train"]
    # 4 hosts, of which 3 cost 2 + 128 GB x 0.01 and one 1 + 40 GB x 0.1 an hour.
    hours = metadata["cluster_node_hours"] / 4
    assert metadata["cluster_cost"] == pytest.approx(hours * (3 * 3.28 + 5), abs=0.02)


def test_no_secret_is_anywhere(healed: Healed) -> None:
    """In requests to the API, databases, logs, files of Dagster, and the lake; each credential by its own text."""
    stack = healed.stack
    environment = stack.cloud.environment()
    key = json.loads(Path(environment["YC_SERVICE_ACCOUNT_KEY_FILE"]).read_text())["private_key"]
    secrets = {
        "S3 secret key": environment["AWS_SECRET_ACCESS_KEY"],
        "S3 access key": environment["AWS_ACCESS_KEY_ID"],
        "private key": key.splitlines()[2],
        **{path.name: path.read_text() for path in stack.secrets.glob("*_password")},
        **{f"IAM token {number}": token for number, token in enumerate(stack.cloud.dataproc.issued_tokens())},
    }
    assert len(secrets) > 6
    requests = [call["request"] for call in stack.cloud.dataproc.journal if "IamToken" not in call["method"]]
    places = {"requests": json.dumps(requests).encode()}
    for database in ("dagster", "mlflow"):
        dump = [stack.postgres.programs / "pg_dump", database]
        places[database] = subprocess.run(
            dump, env=stack.postgres.environment(), check=True, capture_output=True
        ).stdout
    for path in [*stack.home.rglob("*"), *(service.log for service in stack.services.values())]:
        if path.is_file():
            places[str(path)] = path.read_bytes()
    for name in healed.lake.changed():
        if not name.endswith(".parquet"):
            places[f"lake {name}"] = healed.lake.read(name)
    assert len(places) > 20
    assert not [
        (name, place) for name, text in secrets.items() for place, content in places.items() if text.encode() in content
    ]


def test_processes_of_a_cluster_end_with_it(healed: Healed) -> None:
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    own = str(healed.stack.cloud.directory / "dataproc")
    assert not [line for line in listed.splitlines() if own in line and str(os.getpid()) not in line.split()[:1]]


def model_of(healed: Healed) -> dg.AssetMaterialization:
    """The only materialization of fraud_model at the newest partition."""
    with healed.stack.instance() as instance:
        filters = dg.AssetRecordsFilter(asset_key=dg.AssetKey("fraud_model"), asset_partitions=[KEYS[-1]])
        (record,) = instance.fetch_materializations(filters, limit=10).records
    assert record.asset_materialization is not None
    return record.asset_materialization


def test_one_model_per_finished_run(healed: Healed) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=healed.stack.mlflow_url, registry_uri=healed.stack.mlflow_url)
    (version,) = client.search_model_versions("name='fraud_model'")
    assert client.get_model_version_by_alias("fraud_model", "champion").version == version.version
    experiment = client.get_experiment_by_name("fraud_model")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (version.run_id, "FINISHED")
    assert run.data.tags["dagster.run_id"] == healed.finished_run
    # Artifacts went through MLflow's server, which alone has the bucket's key.
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert healed.stack.cloud.s3.client().list_objects_v2(Bucket=ARTIFACTS_BUCKET, Prefix="mlflow/")["KeyCount"]
    # The link is for a browser, which knows no service by its name.
    link = model_of(healed).metadata["mlflow_run"].value
    assert str(link).startswith(f"{healed.stack.mlflow_url}/#/experiments/")


def test_the_doctor_finds_nothing_wrong(healed: Healed) -> None:
    assert "docker compose exec code entrypoint.sh ml-platform doctor" in (DEPLOY / "README.md").read_text()
    healed.stack.run("code", "ml-platform", "doctor")


def test_the_webserver_shows_the_runs(healed: Healed) -> None:
    query = json.dumps({"query": "{ runsOrError { ... on Runs { results { runId status } } } }"}).encode()
    request = urllib.request.Request(f"{healed.stack.dagster_url}/graphql", query, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        shown = json.load(response)["data"]["runsOrError"]["results"]
    assert [run["status"] for run in shown] == ["SUCCESS", "FAILURE"]


def test_the_metrics_are_those_of_the_deployment(healed: Healed) -> None:
    with urllib.request.urlopen(f"{healed.stack.metrics_url}/metrics", timeout=120) as response:
        lines = response.read().decode().splitlines()
    for source in ("dagster", "lake", "mlflow", "dataproc"):
        assert f'ml_platform_source_up{{source="{source}"}} 1.0' in lines
    for line in (
        "ml_platform_files_waiting 0.0",
        "ml_platform_champion_version 1.0",
        'ml_platform_clusters{status="running"} 0.0',
        'ml_platform_runs{job="process_new_files",status="success"} 1.0',
    ):
        assert line in lines
    (node_hours,) = (line.split()[1] for line in lines if line.startswith("ml_platform_last_run_node_hours "))
    assert float(node_hours) == model_of(healed).metadata["cluster_node_hours"].value


#: As Dagster's servers and runs write text, and MLflow's server. Dagster's sensors log text whatever is asked for.
TEXT_LINE = re.compile(
    r"\d{4}-\d\d-\d\d \S+ \S+ - dagster\S* - [A-Z]+ - (?!__repository__ - )|\d{4}/\d\d/\d\d \S+ (INFO|WARNING)|INFO: "
)
COLOUR = re.compile(r"\x1b\[[\d;]*m")


def test_logs_are_json_lines(healed: Healed) -> None:
    """Each line of Dagster's servers, of its runs and of MLflow's server is an object."""
    lines = {
        name: [COLOUR.sub("", line) for line in service.log.read_text().splitlines()]
        for name, service in healed.stack.services.items()
        if name not in ("postgres", "scorer", "metrics")  # the last two have formats of their own
    }
    logged = {name: [json.loads(line) for line in lines[name] if line.startswith("{")] for name in lines}
    # In a run, MLflow's client speaks for itself.
    lines["code"] = [line for line in lines["code"] if "mlflow." not in line]
    assert [(name, line) for name, said in lines.items() for line in said if TEXT_LINE.match(line)] == []
    for name in ("code", "daemon", "webserver"):
        assert any(str(line.get("logger")).startswith("dagster") and line["event"] for line in logged[name]), name
    assert any(line["logger"] == "uvicorn.access" and "/health" in line["event"] for line in logged["mlflow"])
    of_runs = {line["dagster_meta"]["run_id"] for line in logged["code"] if "dagster_meta" in line}
    assert healed.killed_run in of_runs


# --- backup and restore -----------------------------------------------------------------------------------------

#: Stands in for Docker: a command in the container of PostgreSQL is one of this machine, with the server's environment.
DOCKER = """#!/bin/sh
set -eu
case "$*" in
"compose exec -T postgres "*) shift 4; exec "$@" ;;
"compose up --detach --wait"* | "compose stop "*) ;;
*) echo "what is: docker $*" >&2; exit 1 ;;
esac
"""


def commands_of_the_readme() -> list[str]:
    """What deploy/README.md says to type in for a backup, and then to restore it."""
    section = (DEPLOY / "README.md").read_text().partition("\n## Back up and restore\n")[2].partition("\n## ")[0]
    return [
        re.sub(r"^\$ ", "", block, flags=re.MULTILINE) for block in re.findall(r"```console\n(.*?)```", section, re.S)
    ]


def test_backup_is_restored_into_a_new_server(healed: Healed, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    stack = healed.stack
    stack.stop("webserver", "daemon", "code", "mlflow")
    docker = tmp_path / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    backup, restore = commands_of_the_readme()

    def type_in(commands: str, server: PostgresServer) -> None:
        environment = {**os.environ, **server.environment(f"{tmp_path}:{os.environ['PATH']}")}
        subprocess.run(["sh", "-euc", commands], cwd=tmp_path, env=environment, check=True, timeout=300)

    type_in(backup, stack.postgres)
    assert sorted(path.name for path in tmp_path.glob("*.dump")) == ["dagster.dump", "mlflow.dump"]
    with stack.instance() as instance:
        runs = [(run.run_id, run.status, run.tags) for run in instance.get_runs()]

    with PostgresServer() as server:
        stack.create_databases(server)
        type_in(restore, server)
        with stack.instance(server) as restored:
            assert [(run.run_id, run.status, run.tags) for run in restored.get_runs()] == runs
            assert restored.get_dynamic_partitions("raw_files") == KEYS
            for asset in ("cleaned_transactions", "transaction_features", "fraud_model"):
                assert restored.get_materialized_partitions(dg.AssetKey(asset)) == set(KEYS), asset
        uri, password = stack.mlflow_database(server)
        with mock.patch.dict(os.environ, {"PGPASSWORD": password}):
            champion = MlflowClient(tracking_uri=uri, registry_uri=uri).get_model_version_by_alias(
                "fraud_model", "champion"
            )
        assert champion.tags["dagster.run_id"] == runs[0][0]
