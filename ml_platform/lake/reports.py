"""What the jobs report, as types: the border between Spark and Dagster.

A report in the lake may have been edited by hand, so it is validated when it is read. Fields that a report has beyond
these are kept, and written again.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

CLEANED_TABLE = "cleaned_transactions"
REJECTED_TABLE = "rejected_transactions"
FEATURES_TABLE = "transaction_features"


def _instant(value: Any) -> Any:
    return datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ") if isinstance(value, str) else value


def instant_text(instant: datetime) -> str:
    """An instant as reports have it; `strftime` would not pad years before 1000."""
    return f"{instant.isoformat(timespec='seconds')}Z"


#: UTC, without a time zone.
Instant = Annotated[datetime, BeforeValidator(_instant)]


class _Report(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


class Instants(_Report):
    """The first and the last instant of a partition."""

    min: Instant
    max: Instant


class Ids(_Report):
    """The lowest and the highest id of a partition."""

    min: int
    max: int


def _none_if_empty(ends: Any) -> Any:
    """Jobs report null for both ends of a partition without rows."""
    return None if ends == {"min": None, "max": None} else ends


class RawVersion(_Report):
    """The raw file that was cleaned, as it was."""

    size: int
    fingerprint: str


class CleanedCounts(_Report):
    """Rows by what became of them; a field for each cleaning rule follows these."""

    raw_rows: int
    clean_rows: int
    duplicate_rows: int
    rejected_rows: int
    fraud_rows: int


class PartitionReport(_Report):
    """What every report of a partition has."""

    schema_version: int
    partition: str
    run_id: str
    spark_version: str
    seconds: float


class CleanedReport(PartitionReport):
    """Report of a partition of ``cleaned_transactions``."""

    table: ClassVar[str] = CLEANED_TABLE

    epoch: str
    raw: RawVersion
    counts: CleanedCounts
    #: None of an empty partition, as the next one.
    tx_datetime: Annotated[Instants | None, BeforeValidator(_none_if_empty)]
    transaction_id: Annotated[Ids | None, BeforeValidator(_none_if_empty)]

    @property
    def version(self) -> str:
        """What the rows depend on: version of the rules, epoch, raw file."""
        return f"{self.schema_version}/{self.epoch}/{self.raw.fingerprint}"


class FeatureInputs(_Report):
    """Versions of the cleaned partitions that features were built from: their own, and those of its history."""

    cleaned: str
    history: dict[str, str]


class FeaturesCounts(_Report):
    rows: int
    fraud_rows: int
    unusable_rows: int


class FeaturesReport(PartitionReport):
    """Report of a partition of ``transaction_features``."""

    table: ClassVar[str] = FEATURES_TABLE

    inputs: FeatureInputs
    features: list[str]
    counts: FeaturesCounts


class Window(_Report):
    """Days of the data that a training uses in one way."""

    first_date: str
    last_date: str
    rows: int
    frauds: int


class Candidate(_Report):
    """A learner with parameters, and its average precision on the validation window."""

    learner: str
    params: dict[str, Any]
    validation_average_precision: float


class Sampling(_Report):
    """How many rows a model was fitted on, where not on all."""

    rows: int
    kept_rows: int
    kept_frauds: int


class ChampionScoring(_Report):
    """Whether the champion scored the held-out rows, and if not, why."""

    version: str
    status: Literal["scored", "unreadable", "newer_library"]
    error: str | None = None


class TrainingReport(_Report):
    """Report of a training. What only a trained model has is empty otherwise."""

    schema_version: int
    run_id: str
    cutoff: str
    outcome: Literal["trained", "too_little_data"]
    reason: str = ""
    features: list[str]
    seed: int
    windows: dict[str, Window]
    spark_version: str
    seconds: dict[str, float]
    grid: list[Candidate] = Field(default_factory=list)
    best: Candidate | None = None
    sampling: Sampling | None = None
    feature_importances: dict[str, float] = Field(default_factory=dict)
    champion: ChampionScoring | None = None
    model_uri: str = ""
    #: Of the held-out rows; the platform adds them to the job's report (see `ml_platform.model.evaluation`).
    metrics: dict[str, float | int | None] = Field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = Field(default_factory=dict)


ReportT = TypeVar("ReportT", CleanedReport, FeaturesReport)
CleanedReports = dict[str, CleanedReport]
FeaturesReports = dict[str, FeaturesReport]
