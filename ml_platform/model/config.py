"""Settings of ``fraud_model``."""

from typing import Any

import dagster as dg
from pydantic import Field, field_validator

from ml_platform.model.promotion import PromotionRule
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
