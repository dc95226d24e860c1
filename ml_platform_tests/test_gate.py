"""The gate, from raw files through real trainings to the registry, on the tests' Spark session."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml_platform.resources.lake import CLEANED, FEATURES, LakeResource
from ml_platform.resources.mlflow import MODEL_NAME, MlflowResource
from ml_platform.simulator import Simulation
from ml_platform_tests.fakes import SessionEngine, definitions, recorded, run_assets
from ml_platform_tests.world import ML_PLATFORM, World

pytestmark = pytest.mark.spark

SIMULATION = Simulation(days_per_file=20, customers=400, terminals=400, radius=10, seed=3)
KEYS = [SIMULATION.file_name(index).removesuffix(".txt") for index in range(3)]

#: One that learns, in seconds.
FAIR = [{"learner": "logistic_regression", "grid": {"regParam": [0.0], "maxIter": [15]}}]
#: A model that can hardly learn: one step of a heavily regularised regression.
WEAK = [{"learner": "logistic_regression", "grid": {"regParam": [100.0], "elasticNetParam": [1.0], "maxIter": [1]}}]


@pytest.mark.usefixtures("no_pictures")
def test_champion_changes_only_for_a_better_model(
    session_engine: SessionEngine,
    instance: dg.DagsterInstance,
    empty_mlflow_store: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The same data again change nothing; a champion made worse is replaced, one that is better is not."""
    epoch = SIMULATION.start.isoformat()
    lake = LakeResource(raw_uri=str(tmp_path / "raw"), lake_uri=str(tmp_path / "lake"), epoch=epoch)
    for index, key in enumerate(KEYS):
        with lake.raw.open_new(f"{key}.txt") as out:
            SIMULATION.write_file(index, out)
    instance.add_dynamic_partitions("raw_files", KEYS)
    store = f"sqlite:///{shutil.copy(empty_mlflow_store, tmp_path)}"
    mlflow = MlflowResource(tracking_uri=store, artifact_root=str(tmp_path / "artifacts"))
    platform = definitions(lake, session_engine, mlflow)
    assert run_assets(platform, instance, CLEANED, FEATURES, keys=(KEYS[0], KEYS[-1])).success

    def train(candidates: list[dict[str, Any]]) -> dict[str, Any]:
        config = {MODEL_NAME: {"candidates": candidates}}
        result = run_assets(platform, instance, MODEL_NAME, keys=(KEYS[-1], KEYS[-1]), config=config)
        assert result.success
        return recorded(instance, MODEL_NAME, result.run_id)[KEYS[-1]]

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

    user = World(tmp_path / "user", overrides={"MLFLOW_TRACKING_URI": store})
    user.run(*ML_PLATFORM, "champion", "set", str(weak["model_version"]), "--why", "made worse on purpose")
    better = train(FAIR)
    assert (better["promotion"], better["is_champion"]) == ("better", True)
    shown = user.run(*ML_PLATFORM, "champion", "show")
    assert f"version {better['model_version']}" in shown
