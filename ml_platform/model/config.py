"""Run configuration of ``fraud_model``, and its check before anything else of a run is done."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
from pydantic import Field, ValidationError, field_validator

from ml_platform.model.promotion import PromotionRule
from spark_jobs.train_model import DEFAULTS
from spark_jobs.training.learners import check_candidates


class PromotionConfig(PromotionRule):
    """When the new model becomes the champion, and when a check warns of the champion; see docs/model.md."""

    min_champion_average_precision: float = Field(
        default=0.2, ge=0, le=1, description="Below this on the newest held-out week, a check warns of the champion."
    )
    max_champion_age_days: int = Field(
        default=120, ge=1, description="After so many days without a comparable challenger, a check warns."
    )


def _setting(name: str, description: str, ge: int | None = None) -> Any:
    """A setting of the training job, which declares the default."""
    return Field(DEFAULTS[name], description=description, ge=ge)


class FraudModelConfig(dg.Config):
    """How a model is trained and judged. Days are whole days."""

    train_each: bool = Field(False, description="Train a model per partition, oldest first (a walk-forward test).")
    test_days: int = _setting("test_days", "Held-out days at the end of the data.", ge=1)
    delay_days: int = _setting("delay_days", "Days until a label is known.", ge=0)
    train_days: int = _setting("train_days", "Longest training window.", ge=1)
    validation_days: int = _setting(
        "validation_days", "Last days of the training window, where parameters are chosen.", ge=1
    )
    min_train_days: int = _setting("min_train_days", "Fewest days to fit on while parameters are chosen.", ge=1)
    min_frauds: int = _setting("min_frauds", "Fewest frauds in each of these windows.", ge=1)
    alerts_per_day: int = Field(100, ge=1, description="Transactions that can be investigated a day.")
    validation_folds: int = _setting("validation_folds", "Weeks to choose parameters on, each a week earlier.", ge=1)
    search_rows: int = _setting("search_rows", "Rows that each candidate is fitted on, at most.", ge=1000)
    max_train_rows: int = _setting(
        "max_train_rows", "Rows that the model is fitted on, at most; see docs/model.md.", ge=1000
    )
    fit_threads: int = _setting("fit_threads", "Threads of the model's own fit.", ge=1)
    candidates: list[dict[str, Any]] = _setting(
        "candidates", "Learners (xgboost, logistic_regression), each with a grid of its parameters."
    )
    seed: int = _setting("seed", "Seed of whatever is drawn.", ge=0)
    promotion: PromotionConfig = Field(default=PromotionConfig(), description="When the model becomes the champion.")

    @field_validator("candidates")
    @classmethod
    def _are_known(cls, candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
        check_candidates(candidates)
        return candidates

    def as_request(self) -> dict[str, Any]:
        """The settings as the training job takes them."""
        return self.model_dump(exclude={"train_each", "promotion", "alerts_per_day"})

    @property
    def window_days(self) -> int:
        """Days of data, back from the last, that training looks at."""
        return self.test_days + self.delay_days + self.train_days


def check_run_config(run_config: Mapping[str, Any]) -> None:
    """Look at what a run's configuration says about training, which Dagster itself does only when it comes to that.

    Raises dagster.Failure: it names an unknown learner, parameter or setting, or an impossible value.
    """
    problem = problem_of_run_config(run_config)
    if problem:
        raise dg.Failure(f"the run configuration of fraud_model cannot be used: {problem}", allow_retries=False)


def problem_of_run_config(run_config: Mapping[str, Any]) -> str | None:
    """What is wrong with the part of a run configuration that is about training; None if nothing is."""
    config: Any = run_config
    for part in ("ops", "fraud_model", "config"):
        config = config.get(part) if isinstance(config, Mapping) else None
    if not config:
        return None
    if not isinstance(config, Mapping):
        return f"ops.fraud_model.config is {config!r}: it takes settings"
    try:
        FraudModelConfig(**config)
    except ValidationError as error:
        problems = [
            (".".join(str(part) for part in problem["loc"]), problem["msg"].removeprefix("Value error, "))
            for problem in error.errors()
        ]
        return "; ".join(f"{where}: {text}" if where else text for where, text in problems)
    return None
