"""Typed reports of the Spark jobs: the interface between Spark and Dagster.

A report in the lake may have been edited by hand, so it is validated when it is read. Unknown fields are kept and
written back.
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
    """Format an instant as in reports; `strftime` would not pad years before 1000."""
    return f"{instant.isoformat(timespec='seconds')}Z"


#: A naive datetime in UTC.
Instant = Annotated[datetime, BeforeValidator(_instant)]


class _Report(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


class Instants(_Report):
    """First and last instant of a partition."""

    min: Instant
    max: Instant


class Ids(_Report):
    """Lowest and highest id of a partition."""

    min: int
    max: int


def _none_if_empty(bounds: Any) -> Any:
    """Map the bounds of an empty partition, which jobs report as null, to None."""
    return None if bounds == {"min": None, "max": None} else bounds


class RawVersion(_Report):
    """Size and fingerprint of the raw file when it was cleaned."""

    size: int
    fingerprint: str


class CleanedCounts(_Report):
    """Row counts by outcome; the report also has one field per cleaning rule."""

    raw_rows: int
    clean_rows: int
    duplicate_rows: int
    rejected_rows: int
    fraud_rows: int


class PartitionReport(_Report):
    """Fields common to all partition reports."""

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
    #: None if the partition is empty, as is `transaction_id`.
    tx_datetime: Annotated[Instants | None, BeforeValidator(_none_if_empty)]
    transaction_id: Annotated[Ids | None, BeforeValidator(_none_if_empty)]

    @property
    def version(self) -> str:
        """Version of the rows: schema version, epoch and fingerprint of the raw file."""
        return f"{self.schema_version}/{self.epoch}/{self.raw.fingerprint}"


class FeatureInputs(_Report):
    """Versions of the cleaned partitions that features were built from: the partition itself and its history."""

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
    """A training, validation or test window: its days, rows and frauds."""

    first_date: str
    last_date: str
    rows: int
    frauds: int


class Candidate(_Report):
    """A learner with parameters and its average precision on the validation window."""

    learner: str
    params: dict[str, Any]
    validation_average_precision: float


class Sampling(_Report):
    """Row counts of the sample that a model was fitted on, if not on all rows."""

    rows: int
    kept_rows: int
    kept_frauds: int


class ChampionScoring(_Report):
    """Result of scoring the held-out rows with the champion; `error` says why it could not."""

    version: str
    status: Literal["scored", "unreadable", "newer_library"]
    error: str | None = None


class TrainingReport(_Report):
    """Report of a training job. Fields that describe the model are empty if none was trained."""

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
    #: Computed on the held-out rows by the platform, not by the job (see `ml_platform.model.evaluation`).
    metrics: dict[str, float | int | None] = Field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = Field(default_factory=dict)


ReportT = TypeVar("ReportT", CleanedReport, FeaturesReport)
CleanedReports = dict[str, CleanedReport]
FeaturesReports = dict[str, FeaturesReport]
