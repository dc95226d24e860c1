"""The same raw files, by the real commands, with Spark on this machine and on a Spark cluster. Data Proc: test_stack.

Lake and model must come out the same.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import dagster as dg
import pytest

from ml_platform.dev.cloud.s3_server import LocalS3
from ml_platform.lake.reports import CLEANED_TABLE as CLEANED
from ml_platform.lake.reports import FEATURES_TABLE as FEATURES
from ml_platform.lake.reports import SCORED_TABLE as SCORES
from ml_platform.spark.session import CLASS_ARCHIVE, java_options
from ml_platform_tests.images.session import NO_CODEGEN
from ml_platform_tests.lake_files import LakeFiles, assert_reports_last, assert_same_model, assert_same_tables
from ml_platform_tests.standalone import StandaloneCluster
from ml_platform_tests.world import (
    FILES,
    KEYS,
    ML_PLATFORM,
    SHORT_LIVED,
    SMALL_SEARCH,
    World,
    assert_counts,
    no_process_left,
)
from spark_jobs.train_model import TEST_SCORE_COLUMNS

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.spark,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a test through /proc"),
]


@dataclass(frozen=True)
class Processed:
    """A world whose raw files were processed in one run, and its lake."""

    world: World
    lake: LakeFiles

    @property
    def run(self) -> dg.DagsterRun:
        """The run that processed the files."""
        (run,) = self.world.runs()
        return run

    @property
    def run_id(self) -> str:
        return self.run.run_id


@pytest.fixture
def local(local_world: World) -> Processed:
    return Processed(local_world, LakeFiles(local_world.lake))


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory, s3_server: LocalS3, local_world: World) -> Processed:
    """A Spark cluster whose executors have neither the project nor the connector for S3: the driver brings both.

    The local run's model is the champion, so that this run scores with it and compares its own model with it.
    """
    directory = tmp_path_factory.mktemp("standalone")
    shutil.copy(local_world.root / "mlflow.db", directory)
    s3_server.client().create_bucket(Bucket="engines")
    for file in FILES:
        s3_server.client().put_object(Bucket="engines", Key=f"raw/{file.name}", Body=file.content)
    java = {"JAVA_TOOL_OPTIONS": f"{SHORT_LIVED} {java_options(CLASS_ARCHIVE)}"}
    with StandaloneCluster(directory / "cluster", s3_server.environment() | java, workers=1) as cluster:
        settings = {
            "ML_PLATFORM_RAW_URI": "s3://engines/raw",
            "ML_PLATFORM_LAKE_URI": "s3://engines/lake",
            "SPARK_MASTER": cluster.master,
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_DRIVER_MEMORY": "1g",
            "SPARK_PROPERTIES": json.dumps(NO_CODEGEN),
            "PYSPARK_PYTHON": sys.executable,
            "HOME": os.environ["HOME"],  # where Spark's connector may have been downloaded before
            "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
        }
        world = World(directory / "world", overrides=settings | s3_server.environment())
        with no_process_left(world):
            world.run(*ML_PLATFORM, "process-new-files")
        assert list(cluster.directory.glob("worker-*/app-*/*/stderr")), "it has an executor"
    return Processed(world, LakeFiles(s3=s3_server, bucket="engines"))


@pytest.fixture(params=["local", "standalone"])
def processed(request: pytest.FixtureRequest) -> Processed:
    return request.getfixturevalue(request.param)


def test_one_run_makes_everything(processed: Processed) -> None:
    run = processed.run
    assert run.is_success
    assert processed.world.partitions() == KEYS
    for asset in (CLEANED, FEATURES):
        assert processed.world.materialized(run.run_id, asset) == KEYS


def test_counts_are_those_of_the_simulator(processed: Processed) -> None:
    for file in FILES:
        assert_counts(processed.lake.report(file.key), file.truth)
        rows = file.truth.counts["clean_rows"]
        assert processed.lake.report(file.key, FEATURES)["counts"]["rows"] == rows
        for asset in (CLEANED, FEATURES):
            assert processed.world.metadata(asset, file.key)["dagster/row_count"] == rows
    faults = Counter(dict.fromkeys(FILES[0].truth.counts, 0))
    for file in FILES:
        faults.update(file.truth.counts)
    assert all(faults.values()), f"the simulated files lack a fault: {faults}"


def test_rows_and_reports_are_the_same(standalone: Processed, local: Processed) -> None:
    assert_same_tables(standalone.lake, local.lake, KEYS)


def test_the_model_is_the_same_file(standalone: Processed, local: Processed) -> None:
    """Byte for byte; a cluster's tasks have the library from the archive that came with the code."""
    assert_same_model(standalone.lake, standalone.run_id, local.lake, local.run_id, KEYS[-1])
    metrics = standalone.lake.read_json(f"models/{KEYS[-1]}/{standalone.run_id}/_report.json")["metrics"]
    of_champion = {name: value for name, value in metrics.items() if name.startswith("champion_")}
    assert of_champion == {f"champion_{name}": metrics[name] for name in metrics if f"champion_{name}" in of_champion}
    assert of_champion


def test_a_cluster_scores_as_the_training_did(standalone: Processed) -> None:
    """Each clean row once, and the held-out rows with the very scores that training gave them."""
    report = standalone.lake.report(KEYS[-1], SCORES)
    assert (report["outcome"], report["model_version"]) == ("scored", 1)
    scored = {row["transaction_id"]: row for row in standalone.lake.rows(SCORES, KEYS[-1])}
    assert len(scored) == report["counts"]["rows"] == standalone.lake.report(KEYS[-1])["counts"]["clean_rows"]
    held_out = standalone.lake.rows_of(f"models/{KEYS[-1]}/{standalone.run_id}/test_scores/")
    assert held_out
    assert [scored[row["transaction_id"]]["score"] for row in held_out] == [row["score"] for row in held_out]
    alerts = standalone.lake.rows("alerts", KEYS[-1])
    assert {row["transaction_id"] for row in alerts} == {key for key, row in scored.items() if row["alert"]}
    assert all(row["reason_1"] for row in alerts if row["contribution_1"])


def test_the_report_comes_last_and_nothing_temporary_stays(processed: Processed) -> None:
    assert_reports_last(processed.lake, KEYS)


def test_requests_and_reports_are_kept(processed: Processed) -> None:
    for job in ("clean_transactions", "build_features"):
        for kind in ("request", "report"):
            found = processed.lake.read_json(f"_runs/{processed.run_id}/{job}.{kind}.json")
            assert found["run_id"] == processed.run_id
        assert list(found["partitions"]) == KEYS


# --- MLflow ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def champion(local_world: World) -> tuple[Any, Any]:
    """The champion's version and its MLflow run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=local_world.tracking_uri, registry_uri=local_world.tracking_uri)
    version = client.get_model_version_by_alias("fraud_model", "champion")
    run = client.get_run(version.run_id)
    experiment = client.get_experiment_by_name("fraud_model")
    assert experiment is not None
    assert run.info.experiment_id == experiment.experiment_id
    return version, run


def test_mlflow_and_dagster_name_each_other(local: Processed, champion: tuple[Any, Any]) -> None:
    version, run = champion
    assert run.info.status == "FINISHED"
    assert run.data.tags["dagster.run_id"] == local.run_id
    assert run.data.tags["partitions"] == ",".join(KEYS)
    for key in KEYS:
        metadata = local.world.metadata("fraud_model", key)
        assert metadata["mlflow_run_id"] == run.info.run_id
        assert metadata["model_version"] == int(version.version)
    # The newest partition is the one that the model was trained at.
    assert metadata["outcome"] == "trained"
    for name in ("average_precision", "roc_auc", "card_precision_at_100", "rows", "frauds"):
        assert metadata[f"test_{name}"] == round(run.data.metrics[f"test_{name}"], 4)


def test_mlflow_has_every_grid_point_and_the_winner(champion: tuple[Any, Any]) -> None:
    run = champion[1]
    expected = [
        {"learner": candidate["learner"], **dict(zip(candidate["grid"], values, strict=True))}
        for candidate in SMALL_SEARCH["candidates"]
        for values in itertools.product(*candidate["grid"].values())
    ]
    points = [json.loads(run.data.params[f"grid.{number}"]) for number in range(len(expected))]
    scores = [run.data.metrics[f"grid.{number}.validation_average_precision"] for number in range(len(expected))]
    assert sorted(map(str, points)) == sorted(map(str, expected))
    assert run.data.metrics["validation_average_precision"] == max(scores)
    best = points[scores.index(max(scores))]
    assert {name: run.data.params[f"best.{name}"] for name in best} == {
        name: str(value) for name, value in best.items()
    }


def test_logged_metrics_are_those_of_the_test_scores(local: Processed, champion: tuple[Any, Any]) -> None:
    import pandas as pd
    from sklearn.metrics import average_precision_score, roc_auc_score

    metrics = champion[1].data.metrics
    scores = pd.read_parquet(local.world.lake / "models" / KEYS[-1] / local.run_id / "test_scores")
    assert list(scores.columns) == [*TEST_SCORE_COLUMNS, "score", "champion_score"]
    assert scores["champion_score"].isna().all()
    assert metrics["test_rows"] == len(scores)
    assert metrics["test_frauds"] == scores["tx_fraud"].sum() >= 10
    average_precision = average_precision_score(scores["tx_fraud"], scores["score"])
    assert metrics["test_average_precision"] == pytest.approx(average_precision, rel=1e-6)
    assert metrics["test_roc_auc"] == pytest.approx(roc_auc_score(scores["tx_fraud"], scores["score"]), rel=1e-6)
    assert metrics["test_average_precision"] > 2 * scores["tx_fraud"].mean(), "the model is no better than chance"
