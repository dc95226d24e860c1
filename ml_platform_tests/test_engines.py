"""What every engine owes the assets: one suite, run on this machine's Spark, on a Spark cluster, and on Data Proc.

The commands are the user's own, in processes of their own; only the settings differ.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import pytest

from ml_platform.dev.cloud import DevCloud
from ml_platform.dev.cloud.s3_server import LocalS3
from ml_platform.dev.simulator import FileTruth, Simulation
from ml_platform.lake.reports import CLEANED_TABLE as CLEANED
from ml_platform.lake.reports import FEATURES_TABLE as FEATURES
from ml_platform.lake.reports import REJECTED_TABLE as REJECTED
from ml_platform.lake.reports import CleanedReport, FeaturesReport
from ml_platform.lake.resource import LakeResource
from ml_platform.spark.session import CLASS_ARCHIVE, java_options
from ml_platform_tests.standalone import StandaloneCluster
from ml_platform_tests.world import (
    SHORT_LIVED,
    SHORT_LIVED_JAVA,
    World,
    no_process_left,
)

pytestmark = [pytest.mark.e2e, pytest.mark.spark, pytest.mark.timeout(900)]

SIMULATION = Simulation(days_per_file=5, customers=200, terminals=300, radius=10, fault_rate=500, seed=5)
KEYS = [SIMULATION.file_name(index).removesuffix(".txt") for index in range(2)]

ENGINES = ("local", "standalone", "dataproc")


@dataclass(frozen=True)
class EngineWorld(World):
    """A world on directories or on S3, and what its engine has started and not ended."""

    truths: dict[str, FileTruth] = field(kw_only=True)
    left_over: Callable[[], list[str]] = field(kw_only=True)
    started: Callable[[], int] = field(kw_only=True)

    @property
    def settings(self) -> dict[str, str]:
        return {"SPARK_DRIVER_MEMORY": "1g", "MLFLOW_TRACKING_URI": self.tracking_uri, **super().settings}

    def lake_resource(self) -> LakeResource:
        """The lake; it needs `environment` while it is used."""
        return LakeResource(
            raw_uri=self.settings["ML_PLATFORM_RAW_URI"],
            lake_uri=self.settings["ML_PLATFORM_LAKE_URI"],
            epoch="2019-08-22",
        )

    def put_raw_files(self) -> None:
        """Simulate the raw files to where they belong."""
        with mock.patch.dict(os.environ, self.overrides):
            for index, key in enumerate(KEYS):
                with self.lake_resource().raw.open_new(f"{key}.txt") as out:
                    self.truths[key] = SIMULATION.write_file(index, out)

    def json_file(self, name: str) -> Any:
        with mock.patch.dict(os.environ, self.overrides):
            return self.lake_resource().read_json(name)

    def reports(self, table: str) -> dict[str, dict[str, Any]]:
        with mock.patch.dict(os.environ, self.overrides):
            return self.lake_resource().reports(table)

    def rows(self, table: str, key: str, copy: Path) -> list[dict[str, Any]]:
        """The rows of a partition, in a fixed order."""
        import pyarrow.parquet as pq

        with mock.patch.dict(os.environ, self.overrides):
            self.lake_resource().store.download(f"{table}/raw_file={key}", copy / table / key)
        files = sorted((copy / table / key).glob("*.parquet"))
        # One by one: pyarrow would take the directory's name for a column.
        found = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
        return sorted(found, key=lambda row: json.dumps(row, default=str, sort_keys=True))

    def changed(self) -> dict[str, datetime]:
        """When each file of the lake was last written."""
        import boto3

        place = urlsplit(self.settings["ML_PLATFORM_LAKE_URI"])
        if place.scheme != "s3":
            paths = [path for path in self.lake.rglob("*") if path.is_file()]
            return {str(path.relative_to(self.lake)): datetime.fromtimestamp(path.stat().st_mtime) for path in paths}
        prefix = place.path.strip("/") + "/"
        with mock.patch.dict(os.environ, self.overrides):
            # A session of its own: the default one keeps the credentials of an earlier test.
            pager = boto3.Session().client("s3").get_paginator("list_objects_v2")
            files = [item for page in pager.paginate(Bucket=place.netloc, Prefix=prefix) for item in page["Contents"]]
        return {item["Key"].removeprefix(prefix): item["LastModified"] for item in files}


def bucket_settings(server: LocalS3, bucket: str) -> dict[str, str]:
    server.client().create_bucket(Bucket=bucket)
    uris = {"ML_PLATFORM_RAW_URI": f"s3://{bucket}/raw", "ML_PLATFORM_LAKE_URI": f"s3://{bucket}/lake"}
    return uris | server.environment()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> EngineWorld:
    """Embedded Spark on directories: what the others are compared with."""
    return prepare(EngineWorld(tmp_path_factory.mktemp("local"), overrides={}, truths={}, **NOTHING))


#: Of engines whose processes are children of the run: `no_process_left` watches them.
NOTHING: dict[str, Any] = {"left_over": list, "started": int}


def training(**grid: Any) -> dict[str, Any]:
    """Run config of a training that ten days of data are enough for."""
    candidates = [{"learner": "xgboost", "grid": {"rounds": [10], "subsample": [0.7], **grid}}]
    windows = {"test_days": 2, "delay_days": 1, "validation_days": 1, "min_train_days": 2, "min_frauds": 1}
    return {"ops": {"fraud_model": {"config": {"candidates": candidates, **windows}}}}


#: XGBoost refuses it when it sees that there are fewer inputs: in a task of the job.
TOO_MANY_CONSTRAINTS = training(monotone_constraints=["({})".format(",".join("0" * 100))])


def prepare(world: EngineWorld) -> EngineWorld:
    """Raw files in place, then cleaned, with features and a model, all in one run."""
    world.put_raw_files()
    world.register(*KEYS)
    selection = "cleaned_transactions,transaction_features,fraud_model"
    with no_process_left(world):
        world.materialize(selection, KEYS[0], KEYS[1], config=training())
    return world


@pytest.fixture(scope="module", params=ENGINES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[EngineWorld]:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "local":
        yield request.getfixturevalue("local")
    elif request.param == "standalone":
        # Its executors have neither the project nor the connector for S3: the driver brings both.
        server: LocalS3 = request.getfixturevalue("s3_server")
        java = {"JAVA_TOOL_OPTIONS": f"{SHORT_LIVED} {java_options(CLASS_ARCHIVE)}"}
        with StandaloneCluster(directory / "cluster", server.environment() | java) as cluster:
            settings = bucket_settings(server, "engines") | {
                "SPARK_MASTER": cluster.master,
                "SPARK_LOCAL_IP": "127.0.0.1",
                "PYSPARK_PYTHON": sys.executable,
                "HOME": os.environ["HOME"],  # where Spark's connector may have been downloaded before
            }

            def executors() -> int:
                return len(list(cluster.directory.glob("worker-*/app-*/*/stderr")))

            prepared = prepare(
                EngineWorld(directory / "world", overrides=settings, truths={}, left_over=list, started=executors)
            )
            assert executors() == 2, "one of each worker"
            yield prepared
    else:
        with DevCloud(directory / "cloud", SHORT_LIVED_JAVA, create_seconds=1, delete_seconds=1) as cloud:
            settings = cloud.environment() | {"DATAPROC_POLL_S": "1"}
            yield prepare(
                EngineWorld(
                    directory / "world",
                    overrides=settings,
                    truths={},
                    left_over=lambda: list(cloud.dataproc.clusters),
                    started=lambda: len(cloud.dataproc.jobs),
                )
            )


def test_counts_are_the_truth(world: EngineWorld) -> None:
    reports = world.reports(CleanedReport)
    for key, truth in world.truths.items():
        counts = reports[key]["counts"]
        assert {name: counts[name] for name in truth.counts} == truth.counts
    assert sorted(reports) == sorted(world.reports(FeaturesReport)) == KEYS


def test_rows_are_the_same_on_every_engine(world: EngineWorld, local: EngineWorld, tmp_path: Path) -> None:
    for table in (CLEANED, REJECTED, FEATURES):
        for key in KEYS:
            wanted = local.rows(table, key, tmp_path / "local")
            assert wanted
            assert world.rows(table, key, tmp_path / "copy") == wanted
    for table in (CLEANED, FEATURES):
        found, expected = world.reports(table), local.reports(table)
        assert {key: comparable(found[key]) for key in KEYS} == {key: comparable(expected[key]) for key in KEYS}


def comparable(report: dict[str, Any]) -> dict[str, Any]:
    """What two reports of the same data agree on."""
    left_out = {"run_id", "seconds", "raw", "inputs"}
    return {name: value for name, value in report.items() if name not in left_out}


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
    run = world.runs()[0]
    for job in ("clean_transactions", "build_features"):
        assert world.json_file(f"_runs/{run.run_id}/{job}.request.json")["run_id"] == run.run_id
        report = world.json_file(f"_runs/{run.run_id}/{job}.report.json")
        assert report["run_id"] == run.run_id
        assert list(report["partitions"]) == KEYS


def test_nothing_is_left_running(world: EngineWorld) -> None:
    assert world.left_over() == []


def test_the_model_is_the_same_file_on_every_engine(world: EngineWorld, local: EngineWorld) -> None:
    """Byte for byte; a cluster's tasks have the library from the archive that came with the code."""
    models = []
    for each in (world, local):
        directory = f"models/{KEYS[1]}/{each.runs()[0].run_id}"
        report = each.json_file(f"{directory}/_report.json")
        assert (report["outcome"], report["best"]["learner"]) == ("trained", "xgboost")
        with mock.patch.dict(os.environ, each.overrides):
            models.append(
                (each.lake_resource().store.read(f"{directory}/model.json"), report["metrics"], report["profile"])
            )
    assert models[0] == models[1]


def test_a_job_that_fails_fails_the_run_in_its_own_words(world: EngineWorld) -> None:
    with no_process_left(world):
        said = world.materialize("fraud_model", KEYS[0], KEYS[1], config=TOO_MANY_CONSTRAINTS, fails=True)
    assert world.runs()[-1].is_failure
    assert "size of monotone constraint should be less or equal to the number of features" in said
    with sqlite3.connect(world.root / "mlflow.db") as registry:
        assert registry.execute("SELECT count(*) FROM model_versions").fetchone() == (1,)


def test_nothing_to_do_starts_nothing(world: EngineWorld) -> None:
    before = world.started()
    said = world.materialize("cleaned_transactions,transaction_features", KEYS[0], KEYS[1])
    assert "0 files to clean, 2 already clean" in said
    assert "starting Spark" not in said
    assert world.started() == before
    assert world.left_over() == []
