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

    #: Number of such rows.
    rows: int
    #: First and last; empty of an empty partition.
    usual_days: list[Instant]
    examples: list[ExampleRow]


class SharedIds(_Report):
    """Ids of a partition that another one has, too, as of `version` of that one; None if it could not be read."""

    #: Version of the other partition's rows.
    version: str
    #: Rows of this partition whose id the other one has.
    rows: int | None
    #: Some of these ids.
    examples: list[int]


class RawVersion(_Report):
    """Size and fingerprint of the raw file when it was cleaned."""

    #: Bytes.
    size: int
    #: Size and modification time, or the ETag of an object.
    fingerprint: str


class CleanedCounts(_Report):
    """Row counts by outcome; the report also has one field per cleaning rule."""

    __pydantic_extra__: dict[str, int]

    #: Lines of the file, without empty ones and the header: clean + duplicate + rejected rows.
    raw_rows: int
    #: Rows of the table.
    clean_rows: int
    #: Copies of rows, of which one is kept.
    duplicate_rows: int
    #: Rows that a rule rejected.
    rejected_rows: int
    #: Clean rows with tx_fraud = 1.
    fraud_rows: int
    #: Clean rows without a customer.
    unknown_customer: int
    #: Clean rows without a terminal.
    unknown_terminal: int


class PartitionReport(_Report):
    """Fields common to all partition reports."""

    #: Version of reports, tables and cleaning rules (spark_jobs/schema.py).
    schema_version: int
    #: Key of the raw file: its name without .txt.
    partition: str
    #: Dagster run that wrote the partition.
    run_id: str
    #: Version of the platform that wrote it; None before 0.2.0.
    platform_version: str | None = None
    #: Version of Spark that wrote it.
    spark_version: str
    #: Duration of the work on this partition.
    seconds: float


class CleanedReport(PartitionReport):
    """Report of a partition of ``cleaned_transactions``."""

    table: ClassVar[str] = CLEANED_TABLE

    #: First day of the data set, from which tx_time_seconds and tx_time_days count.
    epoch: str
    #: The raw file as it was read.
    raw: RawVersion
    #: Rows by outcome and by rule.
    counts: CleanedCounts
    #: None if the partition is empty.
    tx_datetime: Annotated[Instants | None, BeforeValidator(_none_if_empty)]
    #: None if the partition is empty.
    transaction_id: Annotated[Ids | None, BeforeValidator(_none_if_empty)]
    #: Rows far from the others in time.
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

    #: Version of the cleaned partition itself.
    cleaned: str
    #: Partition → version, of the earlier partitions whose rows were read.
    history: dict[str, str]


class FeaturesCounts(_Report):
    #: Rows of the table.
    rows: int
    #: Rows with tx_fraud = 1.
    fraud_rows: int
    #: Rows with an input that is not a finite number; a check fails if there are any.
    unusable_rows: int


class FeaturesReport(PartitionReport):
    """Report of a partition of ``transaction_features``."""

    table: ClassVar[str] = FEATURES_TABLE

    #: What the features were built from: they are stale if it changes.
    inputs: FeatureInputs
    #: Names of the model's inputs, in their order.
    features: list[str]
    #: Rows.
    counts: FeaturesCounts


class HeldOut(_Report):
    """Average precision of a version on its held-out week, with its 95% interval."""

    average_precision: float
    lower: float
    upper: float


class Grade(_Report):
    """Figures of one version's scores in a week whose labels are known; see `spark_jobs.scoring.grading`."""

    #: Number of the week, from the epoch.
    week: int
    #: Version whose scores are graded.
    model_version: int
    #: First day of the week.
    first_date: str
    #: Last day of the week.
    last_date: str
    #: Partition → run that gave the scores.
    scores: dict[str, str]
    #: When it was graded.
    graded_at: str
    #: Figures of the version's held-out week, to compare with.
    held_out: HeldOut | None
    #: Alert budget of the figures.
    alerts_per_day: int
    #: Graded rows.
    rows: int
    #: Frauds among them.
    frauds: int
    #: None if it is not defined for these rows, for instance without frauds, as all figures below.
    average_precision: float | None
    average_precision_lower: float | None
    average_precision_upper: float | None
    roc_auc: float | None
    #: Daily mean of the share of compromised cards among the 100 highest-scored.
    card_precision_at_100: float | None
    #: Share of frauds among the alerts.
    precision_at_budget: float | None
    #: Share of the frauds that are alerts.
    recall_at_budget: float | None
    #: Frauds over the sum of the scores: 1 is ideal.
    calibration: float | None

    def figures(self) -> dict[str, float]:
        """The figures that are defined, by name, with the bounds of their intervals."""
        names = ("average_precision", "roc_auc", "precision_at_budget", "recall_at_budget", "calibration")
        wanted = [f"{name}{end}" for name in names for end in ("", "_lower", "_upper")]
        found = self.model_dump()
        values = {name: found.get(name) for name in (*wanted, "card_precision_at_100", "rows", "frauds")}
        return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}


class ScoredCounts(_Report):
    #: Scored rows.
    rows: int
    #: Rows that are alerts.
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

    #: What was scored.
    inputs: ScoredInputs
    #: Why the run scored it: new, new_rows, no_scores, rebuild, model_version.
    cause: str
    #: scored, or why there are no scores (docs/scores.md).
    outcome: ScoringOutcome
    #: Why the champion could not score.
    error: str | None
    #: Version that gave the scores.
    model_version: int | None
    #: First day that the model had not seen; None if that is not known.
    out_of_time_from: str | None
    #: Figures of the version's held-out week.
    held_out: HeldOut | None
    #: Rows of a day that become alerts.
    alerts_per_day: int
    #: Rows and alerts.
    counts: ScoredCounts
    #: Sum of the scores: the frauds that the model expects.
    score_sum: float
    #: Week from the epoch → rows of it that can be graded as live.
    weeks: dict[str, int]
    #: The first ten alerts.
    alerts: list[dict[str, Any]]
    #: Measures of drift against the champion's training window (spark_jobs/scoring/drift.py).
    drift: dict[str, Any]
    #: Grades made by this run, for weeks of any partition.
    grades: list[Grade]
    #: Why a week could not be graded; None if all could.
    grading_error: str | None


class Window(_Report):
    """A training, validation or test window: its days, rows and frauds."""

    first_date: str
    last_date: str
    rows: int
    frauds: int


class Candidate(_Report):
    """A learner with parameters and its average precision on the validation window."""

    #: xgboost or logistic_regression.
    learner: str
    #: Parameters of the learner.
    params: dict[str, Any]
    #: Mean over the validation folds.
    validation_average_precision: float


class Sampling(_Report):
    """Row counts of the sample that a model was fitted on, if not on all rows."""

    #: Rows of the training window.
    rows: int
    #: Rows that were fitted on.
    kept_rows: int
    #: Frauds among them.
    kept_frauds: int


class ChampionScoring(_Report):
    """Result of scoring the held-out rows with the champion; `error` says why it could not."""

    #: Version of the champion.
    version: str
    status: Literal["scored", "unreadable", "newer_library"]
    error: str | None = None


class TrainingReport(_Report):
    """Report of a training job. Fields that describe the model are empty if none was trained."""

    #: Version of reports, tables and cleaning rules.
    schema_version: int
    #: Dagster run that trained the model.
    run_id: str
    #: Version of the platform that trained it; None before 0.2.0.
    platform_version: str | None = None
    #: Last partition that the model may use.
    cutoff: str
    #: trained, or too_little_data.
    outcome: Literal["trained", "too_little_data"]
    #: Why nothing was trained.
    reason: str = ""
    #: Names of the inputs, in the order of the model.
    features: list[str]
    #: Seed of the learners and of sampling.
    seed: int
    #: train, validation_train, validation, test → its days.
    windows: dict[str, Window]
    #: Version of Spark.
    spark_version: str
    #: Phase → duration.
    seconds: dict[str, float]
    #: All candidates.
    grid: list[Candidate] = Field(default_factory=list)
    #: The candidate that was fitted on the whole window.
    best: Candidate | None = None
    #: None if the model was fitted on all rows.
    sampling: Sampling | None = None
    #: Input → mean absolute contribution to the log-odds, over held-out rows.
    feature_importances: dict[str, float] = Field(default_factory=dict)
    #: None without a champion.
    champion: ChampionScoring | None = None
    #: The model file.
    model_uri: str = ""
    # The job's report lacks the following, which the platform adds: see ml_platform.model.evaluation.
    #: Partitions the rows came from.
    partitions: list[str] = Field(default_factory=list)
    #: Metrics of the held-out rows.
    metrics: dict[str, float | int | None] = Field(default_factory=dict)
    #: Tables of the held-out rows.
    tables: dict[str, list[dict[str, Any]]] = Field(default_factory=dict)


class UncleanedFile(BaseModel):
    """A raw file that a run could not clean; deleted once one can.

    A refused file fails however often it is tried, until the file or the platform's version changes.
    """

    model_config = ConfigDict(frozen=True)

    #: Why it could not be cleaned.
    reason: str
    #: No other try can clean this version of the file.
    refused: bool
    #: Run that tried.
    run_id: str
    #: Version of the platform's rules, epoch, fingerprint of the raw file.
    version: str


ReportT = TypeVar("ReportT", CleanedReport, FeaturesReport, ScoredReport)
CleanedReports = dict[str, CleanedReport]
FeaturesReports = dict[str, FeaturesReport]
ScoredReports = dict[str, ScoredReport]
