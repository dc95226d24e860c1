"""Typed reports of the Spark jobs: the interface between Spark and Dagster.

A report in the lake may have been edited by hand, so it is validated when it is read. Unknown fields are kept and
written back.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from spark_jobs.schema import version_of

CLEANED_TABLE = "cleaned_transactions"
REJECTED_TABLE = "rejected_transactions"
FEATURES_TABLE = "transaction_features"
SCORED_TABLE = "scored_transactions"
ALERTS_TABLE = "alerts"


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
    """First and last instant of a partition, and the days that are its 0.1 and 99.9 percentiles."""

    min: Instant
    max: Instant
    p0_1: Instant
    p99_9: Instant


class Ids(_Report):
    """Lowest and highest id of a partition, and the 0.1 and 99.9 percentiles."""

    min: int
    max: int
    p0_1: int
    p99_9: int


def _none_if_empty(bounds: Any) -> Any:
    """Map the bounds of an empty partition, which jobs report as null, to None."""
    return None if isinstance(bounds, dict) and set(bounds.values()) == {None} else bounds


class ExampleRow(_Report):
    """A row that a message names."""

    transaction_id: int
    tx_datetime: Instant


class OddRows(_Report):
    """Rows far from the usual days (see spark_jobs.cleaning.bulk), with the farthest as examples."""

    rows: int
    #: First and last; empty of an empty partition.
    usual_days: list[Instant]
    examples: list[ExampleRow]


class SharedIds(_Report):
    """Ids of a partition that another one has, too, as of `version` of that one; None if it could not be read."""

    version: str
    rows: int | None
    examples: list[int]


class RawVersion(_Report):
    """Size and fingerprint of the raw file when it was cleaned."""

    size: int
    fingerprint: str


class CleanedCounts(_Report):
    """Row counts by outcome; the report also has one field per cleaning rule."""

    __pydantic_extra__: dict[str, int]

    raw_rows: int
    clean_rows: int
    duplicate_rows: int
    rejected_rows: int
    fraud_rows: int
    unknown_customer: int
    unknown_terminal: int


class PartitionReport(_Report):
    """Fields common to all partition reports."""

    schema_version: int
    partition: str
    run_id: str
    #: None in reports of versions before 0.2.0.
    platform_version: str | None = None
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
    odd_rows: OddRows
    #: Of the days with most rows, at most 400.
    rows_per_day: dict[Instant, int]
    #: The limit of that name, see QualityLimits.
    out_of_range: float | None
    #: Size of the raw file's text, which is more than `raw.size` if it is compressed.
    text_bytes: int
    #: By partition, those whose usual ids overlap.
    shared_ids: dict[str, SharedIds]
    #: The rows were taken as they are, whatever the checks say of them (`accept` of transaction_features).
    accepted: bool
    #: A rejected line for each rule that rejected any, cut where it is long.
    reject_samples: dict[str, str]

    @property
    def version(self) -> str:
        """Version of the rows: all that they depend on."""
        raw = {"fingerprint": self.raw.fingerprint}
        fields = {"schema_version": self.schema_version, "epoch": self.epoch, "out_of_range": self.out_of_range}
        return version_of({**fields, "raw": raw})


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


class HeldOut(_Report):
    """Average precision of a version on its held-out week, with its 95 % interval."""

    average_precision: float
    lower: float
    upper: float


class Grade(_Report):
    """Figures of one version's scores in a week whose labels are known; see `spark_jobs.scoring.grading`."""

    week: int
    model_version: int
    first_date: str
    last_date: str
    #: Partition → run that gave the scores.
    scores: dict[str, str]
    graded_at: str
    held_out: HeldOut | None
    alerts_per_day: int
    rows: int
    frauds: int
    average_precision: float | None
    average_precision_lower: float | None
    average_precision_upper: float | None
    roc_auc: float | None
    card_precision_at_100: float | None
    precision_at_budget: float | None
    recall_at_budget: float | None
    calibration: float | None

    def figures(self) -> dict[str, float]:
        """The figures that are defined, by name, with the bounds of their intervals."""
        names = ("average_precision", "roc_auc", "precision_at_budget", "recall_at_budget", "calibration")
        wanted = [f"{name}{end}" for name in names for end in ("", "_lower", "_upper")]
        found = self.model_dump()
        values = {name: found.get(name) for name in (*wanted, "card_precision_at_100", "rows", "frauds")}
        return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}


class ScoredCounts(_Report):
    rows: int
    alerts: int


class ScoredInputs(_Report):
    """Version of the cleaned partition whose rows were scored."""

    cleaned: str


ScoringOutcome = Literal[
    "scored", "no_champion", "champion_unreadable", "champion_newer_library", "champion_other_features"
]


class ScoredReport(PartitionReport):
    """Report of a partition of ``scored_transactions``."""

    table: ClassVar[str] = SCORED_TABLE

    inputs: ScoredInputs
    #: Why the run scored it: new, new_rows, no_scores, rebuild, model_version.
    cause: str
    outcome: ScoringOutcome
    #: Why the champion could not score.
    error: str | None
    model_version: int | None
    #: First day that the model had not seen; None if that is not known.
    out_of_time_from: str | None
    held_out: HeldOut | None
    alerts_per_day: int
    counts: ScoredCounts
    score_sum: float
    #: Week from the epoch → rows of it that can be graded as live.
    weeks: dict[str, int]
    #: The first ten alerts.
    alerts: list[dict[str, Any]]
    drift: dict[str, Any]
    #: Grades that this run made, of any partition's weeks, and why there are none.
    grades: list[Grade]
    grading_error: str | None


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
    platform_version: str | None = None
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
    #: What the platform adds to the job's report: partitions that the rows came from; metrics and tables of the
    #: held-out rows (see `ml_platform.model.evaluation`, `spark_jobs.evaluation.metrics`).
    partitions: list[str] = Field(default_factory=list)
    metrics: dict[str, float | int | None] = Field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = Field(default_factory=dict)


class UncleanedFile(BaseModel):
    """A raw file that a run could not clean; deleted once one can.

    `refused` are those that no other try can clean: their run has to wait for another file or another version.
    """

    model_config = ConfigDict(frozen=True)

    reason: str
    refused: bool
    run_id: str
    #: Version of the platform's rules, epoch, fingerprint of the raw file.
    version: str


ReportT = TypeVar("ReportT", CleanedReport, FeaturesReport, ScoredReport)
CleanedReports = dict[str, CleanedReport]
FeaturesReports = dict[str, FeaturesReport]
ScoredReports = dict[str, ScoredReport]
