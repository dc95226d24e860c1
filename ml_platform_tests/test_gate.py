"""The gate, from raw files through real trainings to the registry, on the tests' Spark session."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml_platform.cli.champion import set_champion, show_champion
from ml_platform.dev.simulator import Simulation
from ml_platform.lake.reports import CLEANED_TABLE, FEATURES_TABLE, CleanedReport
from ml_platform.lake.resource import LakeResource
from ml_platform.model.mlflow import MODEL_NAME, MlflowResource
from ml_platform_tests.fakes import SessionEngine, definitions, recorded, run_assets
from spark_jobs.features.registry import MODEL_INPUTS

pytestmark = pytest.mark.spark

SIMULATION = Simulation(days_per_file=20, customers=400, terminals=400, radius=10, seed=3)
KEYS = [SIMULATION.file_name(index).removesuffix(".txt") for index in range(3)]

#: One that learns, in seconds.
FAIR = [{"learner": "xgboost", "grid": {"rounds": [30], "max_depth": [4]}}]
#: A model that can hardly learn: a stump.
WEAK = [{"learner": "xgboost", "grid": {"rounds": [1], "max_depth": [1], "gamma": [1000]}}]


@pytest.mark.usefixtures("no_pictures")
def test_champion_changes_only_for_a_better_model(
    session_engine: SessionEngine,
    instance: dg.DagsterInstance,
    empty_mlflow_store: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same data again change nothing; a champion made worse is replaced, one that is better is not.

    In the end, MLflow alone loads the champion, which gives the scores that it was judged by.
    """
    import mlflow
    import pandas as pd

    epoch = SIMULATION.start.isoformat()
    lake = LakeResource(raw_uri=str(tmp_path / "raw"), lake_uri=str(tmp_path / "lake"), epoch=epoch)
    for index, key in enumerate(KEYS):
        with lake.raw.open_new(f"{key}.txt") as out:
            SIMULATION.write_file(index, out)
    instance.add_dynamic_partitions("raw_files", KEYS)
    store = f"sqlite:///{shutil.copy(empty_mlflow_store, tmp_path)}"
    resource = MlflowResource(tracking_uri=store, artifact_root=str(tmp_path / "artifacts"))
    platform = definitions(lake, session_engine, resource)
    assert run_assets(platform, instance, CLEANED_TABLE, FEATURES_TABLE, keys=(KEYS[0], KEYS[-1])).success

    def train(candidates: list[dict[str, Any]]) -> dict[str, Any]:
        config = {MODEL_NAME: {"candidates": candidates}}
        result = run_assets(platform, instance, MODEL_NAME, keys=(KEYS[-1], KEYS[-1]), config=config)
        assert result.success
        return recorded(instance, MODEL_NAME, result.run_id)[KEYS[-1]] | {"run_id": result.run_id}

    first = train(FAIR)
    assert (first["promotion"], first["is_champion"]) == ("first_model", True)
    assert "%|" not in capfd.readouterr().err, "no bars of MLflow's in a log"

    again = train(FAIR)
    assert (again["promotion"], again["is_champion"]) == ("no_difference", False)
    assert again["test_average_precision"] == first["test_average_precision"]
    assert "as the champion" in again["promotion_reasons"]

    weak = train(WEAK)
    assert (weak["promotion"], weak["is_champion"]) == ("not_better", False)
    assert "worse" in weak["promotion_reasons"]
    assert weak["champion_version"] == first["model_version"]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    set_champion(str(weak["model_version"]), "made worse on purpose")
    better = train(FAIR)
    assert (better["promotion"], better["is_champion"]) == ("better", True)
    capfd.readouterr()
    show_champion()
    assert f"version {better['model_version']}" in capfd.readouterr().out

    mlflow.set_tracking_uri(store)
    model = mlflow.pyfunc.load_model(f"models:/{MODEL_NAME}@champion")
    features = pd.read_parquet(f"{lake.lake_uri}/{FEATURES_TABLE}/raw_file={KEYS[-1]}")
    found = model.predict(features[list(MODEL_INPUTS)])["score"].set_axis(features["transaction_id"])
    judged = pd.read_parquet(f"{lake.lake_uri}/models/{KEYS[-1]}/{better['run_id']}/test_scores")
    expected = judged.set_index("transaction_id")["score"]
    assert len(found) == lake.reports(CleanedReport)[KEYS[-1]].counts.clean_rows > len(expected) > 0
    assert (found[expected.index] == expected).all()
