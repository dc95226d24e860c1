"""Run configuration of a training: what it may contain, and that a run checks it first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from pydantic import ValidationError

from ml_platform.lake.reports import CLEANED_TABLE as CLEANED
from ml_platform.lake.reports import FEATURES_TABLE as FEATURES
from ml_platform.lake.resource import LakeResource
from ml_platform.model.config import FraudModelConfig
from ml_platform.run_config import problem_of_run_config, run_config, run_limits
from ml_platform.settings import SettingsError
from ml_platform_tests.fakes import definitions, put_cleaned, put_raw, raw_spec, requests_of, run_assets
from spark_jobs.train_model import DEFAULTS


def config_of(**settings: Any) -> dict[str, Any]:
    return {"ops": {"fraud_model": {"config": settings}}}


WRONG = [
    ({"candidates": [{"learner": "gbt"}]}, "no learner 'gbt'; it was replaced by xgboost"),
    (
        {"candidates": [{"learner": "logistic_regression", "grid": {"regParam": [0.1]}}]},
        "no parameter regParam; it is now C",
    ),
    ({"candidates": [{"learner": "xgboost", "grid": {"max_depht": [3]}}]}, "XGBoost has no parameter max_depht"),
    ({"candidates": [{"learner": "xgboost", "grid": {"max_depth": ["x"]}}]}, "max_depth = 'x'"),
    ({"max_train_rows": 10}, "max_train_rows: Input should be greater than or equal to 1000"),
    ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
    ({"promotion": {"confidence": 2}}, "promotion.confidence"),
    ({"promotion": {"mode": "off"}}, "promotion.mode: Input should be 'enforce' or 'dry_run'"),
    ({"promotion": {"replicates": 100, "confidence": 0.999}}, "promotion: replicates is 100"),
]


@pytest.mark.parametrize(("settings", "told"), WRONG)
def test_wrong_settings_are_named(settings: dict[str, Any], told: str):
    assert told in (problem_of_run_config(config_of(**settings)) or "")
    with pytest.raises(ValidationError):
        FraudModelConfig(**settings)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"ops": None},
        {"ops": {"fraud_model": {}}},
        {"ops": {"cleaned_transactions": {"config": {"rebuild": True}}}},
        config_of(candidates=[{"learner": "xgboost", "grid": {"rounds": [10]}}], train_each=True),
    ],
)
def test_valid_and_unrelated_settings_are_accepted(config: dict[str, Any]):
    assert problem_of_run_config(config) is None


def test_every_setting_shows_its_default_and_description():
    """As Dagster's UI has them; those of a request are the training job's own."""
    fields = FraudModelConfig.to_fields_dict()
    for field in (*fields.values(), *fields["promotion"].config_type.fields.values()):
        assert field.description
        assert field.default_provided
    assert fields["promotion"].config_type.fields["confidence"].default_value == 0.95
    assert {**DEFAULTS, **FraudModelConfig().as_request()} == DEFAULTS


def test_settings_that_are_not_a_mapping_are_named():
    assert "must be a mapping" in (problem_of_run_config({"ops": {"fraud_model": {"config": [1]}}}) or "")


@pytest.mark.parametrize(("settings", "told"), WRONG[:2])
def test_the_deployments_file_is_checked_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], told: str
):
    import yaml

    file = tmp_path / "run_config.yaml"
    file.write_text(yaml.safe_dump(config_of(**settings)))
    monkeypatch.setenv("ML_PLATFORM_RUN_CONFIG", str(file))
    with pytest.raises(SettingsError, match=r"ML_PLATFORM_RUN_CONFIG: .*run_config\.yaml: fraud_model: ") as error:
        run_config()
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"max_reject_rate": "high"}, "max_reject_rate: Input should be a valid number"),
        ({"max_reject_rat": 0.05}, "no limit max_reject_rat; there are max_reject_rate, "),
        ([0.05], "must be a mapping of limits"),
    ],
)
def test_limits_that_cannot_be_used_are_named(limits: Any, told: str):
    with pytest.raises(SettingsError, match=r"^ML_PLATFORM_RUN_CONFIG: resources\.limits: ") as error:
        run_limits({"resources": {"limits": {"config": limits}}})
    assert told in str(error.value)


@pytest.mark.parametrize("first", [CLEANED, FEATURES])
def test_the_first_step_of_a_run_checks_the_training_too(lake: LakeResource, instance: dg.DagsterInstance, first: str):
    """Dagster itself checks an asset's configuration only when its own step starts."""
    put_raw(lake, "a", raw_spec(0))
    if first == FEATURES:
        put_cleaned(lake, "a")
    instance.add_dynamic_partitions("raw_files", ["a"])
    assets = [asset for asset in (CLEANED, FEATURES, "fraud_model") if first == CLEANED or asset != CLEANED]
    config = {"fraud_model": {"candidates": [{"learner": "random_forest"}]}}
    result = run_assets(definitions(lake), instance, *assets, keys=("a", "a"), config=config)
    assert not result.success
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert failure.step_key == first
    assert "no learner 'random_forest'; it was replaced by xgboost" in str(failure.event_specific_data)
    assert requests_of(lake, result.run_id, "clean_transactions") == []
    assert requests_of(lake, result.run_id, "build_features") == []
