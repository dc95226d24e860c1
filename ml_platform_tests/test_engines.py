"""The same raw files, by the real commands, on every engine: Spark on this machine, a Spark cluster, and Data Proc.

Lake, model and MLflow must come out the same. What only Data Proc has (clusters, costs, driver logs) comes last.
"""

from __future__ import annotations

import io
import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ml_platform.dev.cloud import DevCloud
from ml_platform.dev.cloud.s3_server import LocalS3
from ml_platform.lake.reports import CLEANED_TABLE as CLEANED
from ml_platform.lake.reports import FEATURES_TABLE as FEATURES
from ml_platform.lake.reports import REJECTED_TABLE as REJECTED
from ml_platform.spark.session import CLASS_ARCHIVE, java_options
from ml_platform_tests.images.session import NO_CODEGEN
from ml_platform_tests.standalone import StandaloneCluster
from ml_platform_tests.world import (
    ML_PLATFORM,
    REFUSAL,
    SHORT_LIVED,
    SHORT_LIVED_JAVA,
    TOO_MANY_CONSTRAINTS,
    World,
    assert_counts,
    no_process_left,
    objects,
    simulated,
)
from spark_jobs.train_model import SCORED_COLUMNS

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.spark,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a test through /proc"),
]

FILES = [simulated(index) for index in range(2)]
KEYS = [file.key for file in FILES]


@dataclass(frozen=True)
class EngineWorld(World):
    """A world on directories or on S3, and what processing its files printed."""

    s3: LocalS3 | None = None
    printed: str = ""

    @property
    def settings(self) -> dict[str, str]:
        return {"SPARK_DRIVER_MEMORY": "1g", "MLFLOW_TRACKING_URI": self.tracking_uri, **super().settings}

    def process_files(self) -> EngineWorld:
        """Put the raw files in place and process them in one run."""
        raw = urlsplit(self.settings["ML_PLATFORM_RAW_URI"])
        for file in FILES:
            if self.s3 is None:
                (self.raw / file.name).write_bytes(file.content)
            else:
                key = f"{raw.path}/{file.name}".strip("/")
                self.s3.client().put_object(Bucket=raw.netloc, Key=key, Body=file.content)
        with no_process_left(self):
            return replace(self, printed=self.run(*ML_PLATFORM, "process-new-files"))

    @property
    def _lake_place(self) -> tuple[str, str]:
        place = urlsplit(self.settings["ML_PLATFORM_LAKE_URI"])
        return place.netloc, f"{place.path.strip('/')}/"

    def changed(self) -> dict[str, datetime]:
        """When each file of the lake was last written."""
        if self.s3 is None:
            paths = [path for path in self.lake.rglob("*") if path.is_file()]
            return {str(path.relative_to(self.lake)): datetime.fromtimestamp(path.stat().st_mtime) for path in paths}
        bucket, prefix = self._lake_place
        items = objects(self.s3, bucket, prefix).items()
        return {name.removeprefix(prefix): item["LastModified"] for name, item in items}

    def read(self, name: str) -> bytes:
        """A file of the lake."""
        if self.s3 is None:
            return (self.lake / name).read_bytes()
        bucket, prefix = self._lake_place
        return self.s3.client().get_object(Bucket=bucket, Key=prefix + name)["Body"].read()

    def read_json(self, name: str) -> dict[str, Any]:
        return json.loads(self.read(name))

    def report(self, key: str, table: str = CLEANED) -> dict[str, Any]:
        return self.read_json(f"{table}/raw_file={key}/_report.json")

    def rows(self, table: str, key: str) -> list[dict[str, Any]]:
        """The rows of a partition, in a fixed order."""
        import pyarrow.parquet as pq

        names = [name for name in self.changed() if name.startswith(f"{table}/raw_file={key}/")]
        tables = [pq.ParquetFile(io.BytesIO(self.read(name))).read() for name in names if name.endswith(".parquet")]
        return sorted(
            (row for table in tables for row in table.to_pylist()),
            key=lambda row: json.dumps(row, default=str, sort_keys=True),
        )

    @property
    def model_directory(self) -> str:
        return f"models/{KEYS[-1]}/{self.runs()[0].run_id}"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> EngineWorld:
    """Embedded Spark on directories: what the others are compared with."""
    return EngineWorld(tmp_path_factory.mktemp("local world")).process_files()


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory, s3_server: LocalS3) -> EngineWorld:
    """A Spark cluster whose executors have neither the project nor the connector for S3: the driver brings both."""
    directory = tmp_path_factory.mktemp("standalone")
    s3_server.client().create_bucket(Bucket="engines")
    java = {"JAVA_TOOL_OPTIONS": f"{SHORT_LIVED} {java_options(CLASS_ARCHIVE)}"}
    with StandaloneCluster(directory / "cluster", s3_server.environment() | java, workers=1) as cluster:
        settings = {
            "ML_PLATFORM_RAW_URI": "s3://engines/raw",
            "ML_PLATFORM_LAKE_URI": "s3://engines/lake",
            "SPARK_MASTER": cluster.master,
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_PROPERTIES": json.dumps(NO_CODEGEN),
            "PYSPARK_PYTHON": sys.executable,
            "HOME": os.environ["HOME"],  # where Spark's connector may have been downloaded before
        }
        world = EngineWorld(directory / "world", overrides=settings | s3_server.environment(), s3=s3_server)
        world = world.process_files()
        assert len(list(cluster.directory.glob("worker-*/app-*/*/stderr"))) == 1, "it has an executor"
    return world


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Generator[DevCloud]:
    directory = tmp_path_factory.mktemp("cloud")
    with DevCloud(directory, SHORT_LIVED_JAVA, create_seconds=1, delete_seconds=1) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def dataproc(tmp_path_factory: pytest.TempPathFactory, cloud: DevCloud) -> EngineWorld:
    """The stand-in for the cloud, which has real Spark for jobs."""
    prices = {"s3-c2-m8": 1, "s3-c4-m16": 2, "network-ssd": 0.1, "network-hdd": 0.01}
    settings = cloud.environment() | {
        "DATAPROC_POLL_S": "1",
        "DATAPROC_PRICES": json.dumps(prices),
        "DATAPROC_JOB_PROPERTIES": json.dumps(NO_CODEGEN),
    }
    return EngineWorld(tmp_path_factory.mktemp("dataproc"), overrides=settings, s3=cloud.s3).process_files()


@pytest.fixture(params=["local", "standalone", "dataproc"])
def world(request: pytest.FixtureRequest) -> EngineWorld:
    return request.getfixturevalue(request.param)


# --- every engine ------------------------------------------------------------------------------------------------


def test_one_run_makes_everything(world: EngineWorld) -> None:
    (run,) = world.runs()
    assert run.is_success
    assert world.partitions() == KEYS
    for asset in (CLEANED, FEATURES):
        assert world.materialized(run.run_id, asset) == KEYS
    # Of the newest partition alone there is a model.
    assert world.metadata("fraud_model", KEYS[-1])["outcome"] == "trained"


def test_counts_are_those_of_the_simulator(world: EngineWorld) -> None:
    for file in FILES:
        assert_counts(world.report(file.key), file.truth)
        assert world.report(file.key, FEATURES)["counts"]["rows"] == file.truth.counts["clean_rows"]
        for asset in (CLEANED, FEATURES):
            assert world.metadata(asset, file.key)["dagster/row_count"] == file.truth.counts["clean_rows"]
    faults = Counter(dict.fromkeys(FILES[0].truth.counts, 0))
    for file in FILES:
        faults.update(file.truth.counts)
    assert all(faults.values()), f"the simulated files lack a fault: {faults}"


@pytest.mark.parametrize("engine", ["standalone", "dataproc"])
def test_rows_and_reports_are_those_of_this_machine(
    request: pytest.FixtureRequest, engine: str, local: EngineWorld
) -> None:
    world: EngineWorld = request.getfixturevalue(engine)
    for key in KEYS:
        for table in (CLEANED, REJECTED, FEATURES):
            expected = local.rows(table, key)
            assert expected
            assert world.rows(table, key) == expected
        for table in (CLEANED, FEATURES):
            assert comparable(world.report(key, table)) == comparable(local.report(key, table))


def comparable(report: dict[str, Any]) -> dict[str, Any]:
    """What two reports of the same data agree on."""
    return {name: value for name, value in report.items() if name not in {"run_id", "seconds", "raw", "inputs"}}


@pytest.mark.parametrize("engine", ["standalone", "dataproc"])
def test_the_model_is_the_same_file_as_on_this_machine(
    request: pytest.FixtureRequest, engine: str, local: EngineWorld
) -> None:
    """Byte for byte; a cluster's tasks have the library from the archive that came with the code."""
    world: EngineWorld = request.getfixturevalue(engine)
    report, expected = (each.read_json(f"{each.model_directory}/_report.json") for each in (world, local))
    assert report["best"]["learner"] == "xgboost"
    for name in ("best", "metrics", "profile"):
        assert report[name] == expected[name]
    assert world.read(f"{world.model_directory}/model.json") == local.read(f"{local.model_directory}/model.json")


def test_the_report_comes_last_and_nothing_temporary_stays(world: EngineWorld) -> None:
    changed = world.changed()
    assert not [name for name in changed if "_temporary" in name]
    for table in (CLEANED, FEATURES):
        for key in KEYS:
            directory = f"{table}/raw_file={key}"
            rows = [at for name, at in changed.items() if name.startswith(f"{directory}/part-")]
            assert rows
            assert max(rows) <= changed[f"{directory}/_report.json"]


def test_requests_and_reports_are_kept(world: EngineWorld) -> None:
    run_id = world.runs()[0].run_id
    for job in ("clean_transactions", "build_features"):
        for kind in ("request", "report"):
            assert world.read_json(f"_runs/{run_id}/{job}.{kind}.json")["run_id"] == run_id
        assert list(world.read_json(f"_runs/{run_id}/{job}.report.json")["partitions"]) == KEYS


def small_search() -> dict[str, Any]:
    import yaml

    config = yaml.safe_load(Path(__file__).with_name("small_search.yaml").read_text())
    return config["ops"]["fraud_model"]["config"]


# --- MLflow ------------------------------------------------------------------------------------------------------


def mlflow_client(world: EngineWorld) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=world.tracking_uri, registry_uri=world.tracking_uri)


@pytest.fixture(scope="module")
def champion(local: EngineWorld) -> tuple[Any, Any]:
    """The champion's version and its MLflow run, on this machine."""
    client = mlflow_client(local)
    version = client.get_model_version_by_alias("fraud_model", "champion")
    return version, client.get_run(version.run_id)


def test_mlflow_and_dagster_name_each_other(world: EngineWorld) -> None:
    client = mlflow_client(world)
    version = client.get_model_version_by_alias("fraud_model", "champion")
    run = client.get_run(version.run_id)
    assert run.info.experiment_id == client.get_experiment_by_name("fraud_model").experiment_id
    assert run.info.status == "FINISHED"
    assert run.data.tags["dagster.run_id"] == world.runs()[0].run_id
    assert run.data.tags["partitions"] == ",".join(KEYS)
    for key in KEYS:
        metadata = world.metadata("fraud_model", key)
        assert metadata["mlflow_run_id"] == run.info.run_id
        assert metadata["model_version"] == int(version.version)
    for name in ("average_precision", "roc_auc", "card_precision_at_100", "rows", "frauds"):
        assert metadata[f"test_{name}"] == pytest.approx(run.data.metrics[f"test_{name}"], rel=1e-12)


def test_mlflow_has_every_grid_point_and_the_winner(champion: tuple[Any, Any]) -> None:
    run = champion[1]
    points = [json.loads(run.data.params[f"grid.{number}"]) for number in range(4)]
    scores = [run.data.metrics[f"grid.{number}.validation_average_precision"] for number in range(4)]
    assert sorted(json.dumps(point, sort_keys=True) for point in points) == sorted(
        json.dumps({"learner": candidate["learner"], **point}, sort_keys=True)
        for candidate in small_search()["candidates"]
        for point in grid_points(candidate["grid"])
    )
    assert run.data.metrics["validation_average_precision"] == max(scores)
    best = points[scores.index(max(scores))]
    assert {name: run.data.params[f"best.{name}"] for name in best} == {
        name: str(value) for name, value in best.items()
    }


def grid_points(grid: dict[str, list[Any]]) -> list[dict[str, Any]]:
    import itertools

    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def test_logged_metrics_are_those_of_the_test_scores(local: EngineWorld, champion: tuple[Any, Any]) -> None:
    import pandas as pd
    from sklearn.metrics import average_precision_score, roc_auc_score

    metrics = champion[1].data.metrics
    scores = pd.read_parquet(local.lake / local.model_directory / "test_scores")
    assert list(scores.columns) == [*SCORED_COLUMNS, "score", "champion_score"]
    assert scores["champion_score"].isna().all()
    assert metrics["test_rows"] == len(scores)
    assert metrics["test_frauds"] == scores["tx_fraud"].sum() >= 10
    average_precision = average_precision_score(scores["tx_fraud"], scores["score"])
    assert metrics["test_average_precision"] == pytest.approx(average_precision, rel=1e-6)
    assert metrics["test_roc_auc"] == pytest.approx(roc_auc_score(scores["tx_fraud"], scores["score"]), rel=1e-6)
    assert metrics["test_average_precision"] > 2 * scores["tx_fraud"].mean(), "the model is no better than chance"


# --- Data Proc ---------------------------------------------------------------------------------------------------


def test_a_run_has_one_cluster(dataproc: EngineWorld, cloud: DevCloud) -> None:
    run = dataproc.runs()[0]
    created = [call["request"] for call in cloud.dataproc.calls("ClusterService.Create")]
    (request,) = [request for request in created if request["labels"]["dagster-run-id"] == run.run_id]
    assert run.tags["ml_platform/cluster_name"] == request["name"]
    assert run.tags["ml_platform/cluster_id"]
    assert len(cloud.dataproc.calls("ClusterService.Delete")) == len(created) == len(dataproc.runs())
    assert cloud.dataproc.clusters == {}
    jobs = list(cloud.dataproc.jobs.values())[:3]
    assert [job.proto.name.split("-")[0] for job in jobs] == ["clean", "build", "train"]
    assert all(job.state == "DONE" for job in jobs)


def test_steps_say_what_the_cluster_was_and_cost(dataproc: EngineWorld) -> None:
    metadata = dataproc.metadata("fraud_model", KEYS[-1])
    assert metadata["cluster_id"] == dataproc.runs()[0].tags["ml_platform/cluster_id"]
    assert metadata["cluster_id"] in metadata["cluster"]
    assert [job["name"].split("-")[0] for job in metadata["cluster_jobs"]] == ["clean", "build", "train"]
    # 4 hosts, of which 3 cost 2 + 128 GB x 0.01 and one 1 + 40 GB x 0.1 an hour.
    hours = metadata["cluster_node_hours"] / 4
    assert metadata["cluster_cost"] == pytest.approx(hours * (3 * 3.28 + 5), abs=0.02)


def test_driver_logs_are_shown_and_kept(dataproc: EngineWorld) -> None:
    log = dataproc.read(f"_runs/{dataproc.runs()[0].run_id}/clean_transactions.driver.log").decode()
    line = f"cleaning 2/2: {KEYS[-1]} done"
    assert line in log
    assert line in dataproc.printed


def test_no_secret_is_anywhere(dataproc: EngineWorld, cloud: DevCloud) -> None:
    """In requests to the API, the event log, what commands print, and the lake; each credential by its own text."""
    environment = cloud.environment()
    key = json.loads(Path(environment["YC_SERVICE_ACCOUNT_KEY_FILE"]).read_text())["private_key"]
    secrets = {
        "S3 secret key": environment["AWS_SECRET_ACCESS_KEY"],
        "S3 access key": environment["AWS_ACCESS_KEY_ID"],
        "private key": key.splitlines()[2],
        **{f"IAM token {number}": token for number, token in enumerate(cloud.dataproc.issued_tokens())},
    }
    assert len(secrets) > 3
    requests = [call["request"] for call in cloud.dataproc.journal if "IamToken" not in call["method"]]
    places: dict[str, bytes] = {"requests": json.dumps(requests).encode(), "output": dataproc.printed.encode()}
    for name in dataproc.changed():
        if not name.endswith(".parquet"):
            places[f"lake {name}"] = dataproc.read(name)
    for path in dataproc.home.rglob("*"):
        if path.is_file():
            places[str(path)] = path.read_bytes()
    for path in dataproc.home.rglob("*.db"):
        with sqlite3.connect(path) as connection:
            places[f"{path} dump"] = "\n".join(connection.iterdump()).encode()
    assert len(places) > 20
    found = [
        (name, place) for name, text in secrets.items() for place, content in places.items() if text.encode() in content
    ]
    assert not found


def test_job_arguments_are_two_addresses(dataproc: EngineWorld, cloud: DevCloud) -> None:
    calls = cloud.dataproc.calls("JobService.Create")
    assert calls
    for call in calls:
        job = call["request"]["pyspark_job"]
        assert job["args"][0::2] == ["--request", "--report"]
        assert all(uri.startswith("s3a://") for uri in job["args"][1::2])
        assert job["properties"]["spark.submit.deployMode"] == "client"


def test_a_job_that_fails_fails_the_run_in_its_own_words(dataproc: EngineWorld, cloud: DevCloud) -> None:
    """What is done already is not done again. On this machine: see test_upgrade."""
    before, jobs = dataproc.changed(), len(cloud.dataproc.jobs)
    config = small_search() | {"candidates": [TOO_MANY_CONSTRAINTS]}
    printed = dataproc.materialize(
        f"{CLEANED},{FEATURES},fraud_model",
        KEYS[0],
        KEYS[-1],
        config={"ops": {"fraud_model": {"config": config}}},
        fails=True,
    )
    assert dataproc.runs()[-1].is_failure
    assert REFUSAL in printed
    with sqlite3.connect(dataproc.root / "mlflow.db") as registry:
        assert registry.execute("SELECT count(*) FROM model_versions").fetchone() == (1,)
    assert "0 files to clean, 2 already clean" in printed
    for key in KEYS:
        assert dataproc.metadata(CLEANED, key)["outcome"] == "already clean"
    after = dataproc.changed()
    tables = (f"{CLEANED}/", f"{REJECTED}/", f"{FEATURES}/")
    assert [name for name in before if name.startswith(tables) and after[name] != before[name]] == []
    assert [job.proto.name.split("-")[0] for job in list(cloud.dataproc.jobs.values())[jobs:]] == ["train"]
    assert cloud.dataproc.clusters == {}


def test_processes_of_a_cluster_end_with_it(dataproc: EngineWorld, cloud: DevCloud) -> None:
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    own = str(cloud.directory / "dataproc")
    assert not [line for line in listed.splitlines() if own in line and str(os.getpid()) not in line.split()[:1]]
