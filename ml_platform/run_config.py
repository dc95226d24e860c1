"""Run configuration of the deployment: read from its file, and its parts checked before a run depends on them."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
from pydantic import ValidationError

from ml_platform.lake.quality import QualityLimits
from ml_platform.model.config import FraudModelConfig
from ml_platform.settings import SettingsError, load_settings, problems_of


def run_config() -> dict[str, Any]:
    """Run config of runs started by a sensor, the schedule or a command, from ML_PLATFORM_RUN_CONFIG.

    Raises:
        SettingsError: the file cannot be read, is not YAML, or contains invalid training settings.
    """
    # Name the logger explicitly; otherwise Dagster uses its default instead of the logger in the definitions.
    config: dict[str, Any] = {"loggers": {"console": {"config": {"log_level": "INFO"}}}}
    path = load_settings().run_config_file
    if path is not None:
        try:
            config |= dg.config_from_files([str(path)])
        except Exception as error:  # a hand-written file may fail in many ways
            raise SettingsError(f"ML_PLATFORM_RUN_CONFIG: cannot read {path}: {error}") from None
        if problem := problem_of_run_config(config):
            raise SettingsError(f"ML_PLATFORM_RUN_CONFIG: {path}: fraud_model: {problem}")
    return config


def training_config(run_config: Mapping[str, Any]) -> FraudModelConfig:
    """Training settings of a run configuration, which must be valid; scores are graded and handed over by them, too."""
    return FraudModelConfig(**(_settings_in(run_config) or {}))


def _settings_in(run_config: Mapping[str, Any]) -> Any:
    """The settings of ``fraud_model`` as a run configuration has them; None without any."""
    config: Any = run_config
    for key in ("ops", "fraud_model", "config"):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def check_run_config(run_config: Mapping[str, Any]) -> None:
    """Validate a run's training settings early; Dagster itself validates them only when the training starts.

    Raises dagster.Failure for an unknown learner, parameter or setting, or an invalid value.
    """
    problem = problem_of_run_config(run_config)
    if problem:
        raise dg.Failure(f"invalid run configuration of fraud_model: {problem}", allow_retries=False)


def problem_of_run_config(run_config: Mapping[str, Any]) -> str | None:
    """Problem in the training settings of a run configuration; None if they are valid."""
    config = _settings_in(run_config)
    if not config:
        return None
    if not isinstance(config, Mapping):
        return f"ops.fraud_model.config must be a mapping of settings, not {config!r}"
    try:
        FraudModelConfig(**config)
    except ValidationError as error:
        return problems_of(error)
    return None


def run_limits(config: dict[str, Any]) -> QualityLimits:
    """Quality limits of the runs with this run config. Raises SettingsError if they are invalid."""
    options = config
    for name in ("resources", "limits", "config"):
        options = (options.get(name) if isinstance(options, dict) else None) or {}
    place, known = "ML_PLATFORM_RUN_CONFIG: resources.limits", QualityLimits.model_fields
    if not isinstance(options, dict):
        raise SettingsError(f"{place}: config must be a mapping of limits, not {options!r}")
    if unknown := [str(name) for name in options if name not in known]:
        raise SettingsError(f"{place}: no limit {', '.join(unknown)}; there are {', '.join(known)}")
    try:
        return QualityLimits(**options)
    except ValidationError as error:
        raise SettingsError(f"{place}: {problems_of(error)}") from None
