"""The stack of deploy/ on a real PostgreSQL and S3: all it needs for a run is killed while a cluster works for it.

In the end every partition is complete, nothing was done twice, and no cluster is left.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import dagster as dg
import pytest

from ml_platform.dev.cloud import LAKE_BUCKET, RAW_BUCKET, DevCloud
from ml_platform_tests.postgres import PostgresServer
from ml_platform_tests.stack import ARTIFACTS_BUCKET, DEPLOY, START_TIMEOUT_S, Stack
from ml_platform_tests.world import COMMAND_TIMEOUT_S, SHORT_LIVED_JAVA, assert_counts, objects, simulated, wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.spark,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform != "linux", reason="a run is known to be dead by /proc"),
]

FILES = [simulated(index) for index in range(2)]
KEYS = [file.key for file in FILES]

#: The webserver is not among them: no run depends on it.
KILLED = ("daemon", "postgres", "code", "mlflow")

Etags = dict[str, str]


@dataclass(frozen=True)
class Healed:
    """A stack whose processes were killed in the middle of a run, when all is quiet again."""

    stack: Stack
    #: Objects of the partitions that were cleaned when the run was killed.
    cleaned_before: Etags
    killed_run: str

    def read(self, name: str) -> bytes:
        """An object of the lake."""
        return self.stack.cloud.s3.client().get_object(Bucket=LAKE_BUCKET, Key=name)["Body"].read()

    def report(self, key: str, table: str = "cleaned_transactions") -> dict[str, Any]:
        """The report of a partition."""
        return json.loads(self.read(report_name(key, table)))


def etags(stack: Stack, prefix: str = "", bucket: str = LAKE_BUCKET) -> Etags:
    """Names of a bucket's objects, and what changes with their content."""
    return {name: item["ETag"] for name, item in objects(stack.cloud.s3, bucket, prefix).items()}


def report_name(key: str, table: str = "cleaned_transactions") -> str:
    return f"lake/{table}/raw_file={key}/_report.json"


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
                cleaned_before, killed_run = kill_one_after_another(stack)
                yield Healed(stack, cleaned_before, killed_run)
    finally:
        postgres.remove()


def kill_one_after_another(stack: Stack) -> tuple[Etags, str]:
    """Kill the services of KILLED during the runs that the sensor starts; returns when a run has succeeded."""

    def wait(condition: Callable[[], Any], what: str) -> Any:
        return wait_until(condition, what, COMMAND_TIMEOUT_S, pause=0.5)

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

        name = report_name(KEYS[0])
        wait_until(lambda: name in etags(stack, name), "the first file is cleaned", COMMAND_TIMEOUT_S)
        kill("code")
        assert status(killed) == dg.DagsterRunStatus.STARTED, "the run was over too early"
        done = [key for key in KEYS if report_name(key) in etags(stack)]
        cleaned = {}
        for key in done:
            cleaned |= etags(stack, f"lake/cleaned_transactions/raw_file={key}/")

        def retry() -> str | None:
            return next((run.run_id for run in instance.get_runs() if run.parent_run_id == killed), None)

        second = wait(retry, "the run is started again")
        wait(lambda: has_started(instance, second, "fraud_model"), "the model's turn has come")
        kill("mlflow")
        wait(lambda: all(run.is_finished for run in instance.get_runs()), "all runs have ended")
    return cleaned, killed


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
    assert jobs in (["clean", "build", "train"], ["clean", "clean", "build", "train"])
    assert all(job.finished for job in dataproc.jobs.values())


def test_every_file_is_cleaned_once(healed: Healed) -> None:
    import pandas as pd

    now = etags(healed.stack, "lake/cleaned_transactions/")
    assert report_name(KEYS[0]) in healed.cleaned_before
    assert {name: now.get(name) for name in healed.cleaned_before} == healed.cleaned_before
    for file in FILES:
        key, counts = file.key, file.truth.counts
        report = healed.report(key)
        assert_counts(report, file.truth)
        # The killed run's job went on, until the next run had its cluster deleted.
        assert report["run_id"] == healed.killed_run or report_name(key) not in healed.cleaned_before
        parts = [name for name in now if name.startswith(f"lake/cleaned_transactions/raw_file={key}/part-")]
        ids = pd.concat([pd.read_parquet(io.BytesIO(healed.read(name)))["transaction_id"] for name in parts])
        assert ids.is_unique
        assert len(ids) == counts["clean_rows"]
        assert healed.report(key, "transaction_features")["counts"]["rows"] == counts["clean_rows"]


def test_one_model_per_finished_run(healed: Healed) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=healed.stack.mlflow_url, registry_uri=healed.stack.mlflow_url)
    (version,) = client.search_model_versions("name='fraud_model'")
    assert client.get_model_version_by_alias("fraud_model", "champion").version == version.version
    experiment = client.get_experiment_by_name("fraud_model")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (version.run_id, "FINISHED")
    with healed.stack.instance() as instance:
        finished = instance.get_runs()[0].run_id
        filters = dg.AssetRecordsFilter(asset_key=dg.AssetKey("fraud_model"), asset_partitions=[KEYS[-1]])
        (record,) = instance.fetch_materializations(filters, limit=10).records
    assert run.data.tags["dagster.run_id"] == finished
    # Artifacts went through MLflow's server, which alone has the bucket's key.
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert any(name.endswith("MLmodel") for name in etags(healed.stack, "mlflow/", ARTIFACTS_BUCKET))
    assert record.asset_materialization is not None
    # The link is for a browser, which knows no service by its name.
    link = record.asset_materialization.metadata["mlflow_run"].value
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
        if name != "postgres"
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
