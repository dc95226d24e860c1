"""Run configuration: that of the deployment, and the settings of ``fraud_model`` with their early validation."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
from pydantic import Field, ValidationError, field_validator

from ml_platform.model.promotion import PromotionRule
from ml_platform.settings import SettingsError, load_settings, problems_of
from spark_jobs.train_model import DEFAULTS
from spark_jobs.training.learners import check_candidates


class PromotionConfig(PromotionRule):
    """Promotion rule and thresholds of the check ``champion_health``; see docs/model.md."""

    min_champion_average_precision: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="champion_health warns if the champion's average precision is below this in its last graded week "
        "or, until there is one, on the held-out week.",
    )
    max_champion_age_days: int = Field(
        default=120, ge=1, description="champion_health warns after this many days without a comparable challenger."
    )


def _setting(name: str, description: str, ge: int | None = None) -> Any:
    """Setting of the training job with the job's default."""
    return Field(DEFAULTS[name], description=description, ge=ge)


class FraudModelConfig(dg.Config):
    """Training and evaluation settings. Days are whole days."""

    train_each: bool = Field(False, description="Train one model per partition, oldest first (walk-forward test).")
    test_days: int = _setting("test_days", "Held-out days at the end of the data.", ge=1)
    delay_days: int = _setting("delay_days", "Label delay in days.", ge=0)
    train_days: int = _setting("train_days", "Maximum length of the training window.", ge=1)
    validation_days: int = _setting(
        "validation_days", "Last days of the training window, used to choose parameters.", ge=1
    )
    min_train_days: int = _setting("min_train_days", "Minimum days to fit on while parameters are chosen.", ge=1)
    min_frauds: int = _setting("min_frauds", "Minimum frauds in each of these windows.", ge=1)
    alerts_per_day: int = Field(100, ge=1, description="Alert budget: transactions that can be investigated per day.")
    validation_folds: int = _setting(
        "validation_folds", "Validation windows, each `validation_days` earlier than the one before.", ge=1
    )
    search_rows: int = _setting("search_rows", "Maximum rows that each candidate is fitted on.", ge=1000)
    max_train_rows: int = _setting(
        "max_train_rows", "Maximum rows that the final model is fitted on; see docs/model.md.", ge=1000
    )
    fit_threads: int = _setting("fit_threads", "Threads for the final fit.", ge=1)
    candidates: list[dict[str, Any]] = _setting(
        "candidates", "Learners (xgboost, logistic_regression), each with a parameter grid."
    )
    seed: int = _setting("seed", "Random seed.", ge=0)
    promotion: PromotionConfig = Field(default=PromotionConfig(), description="When a model becomes the champion.")

    @field_validator("candidates")
    @classmethod
    def _check_candidates(cls, candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
        check_candidates(candidates)
        return candidates

    def as_request(self) -> dict[str, Any]:
        """Settings in the format of the training job's request."""
        return self.model_dump(exclude={"train_each", "promotion", "alerts_per_day"})

    @property
    def window_days(self) -> int:
        """Number of days of data, up to the last, that training reads."""
        return self.test_days + self.delay_days + self.train_days


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
