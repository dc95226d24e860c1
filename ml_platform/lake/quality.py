"""What a file must fulfil before features and models are made of it, by the report of its cleaning."""

from datetime import datetime, timedelta

import dagster as dg
from pydantic import Field

from ml_platform.lake.reports import CleanedReport, CleanedReports


class QualityLimits(dg.ConfigurableResource):
    """Where the checks draw their lines."""

    max_reject_rate: float = Field(
        default=0.02, ge=0, le=1, description="Largest share of raw rows that may be rejected."
    )
    min_fraud_rate: float = Field(default=0.0005, ge=0, le=1, description="Smallest plausible share of frauds.")
    max_fraud_rate: float = Field(default=0.25, ge=0, le=1, description="Largest plausible share of frauds.")
    min_rows_to_judge: int = Field(
        default=10_000,
        ge=1,
        description="Clean rows below which a file's fraud rate is not judged: chance decides it.",
    )
    max_days_per_file: int = Field(default=100, ge=1, description="Longest span of time that one file may cover.")
    max_overlap_days: int = Field(default=1, ge=0, description="Days that the time ranges of two files may share.")


def rows_that_do_not_add_up(report: CleanedReport) -> str | None:
    """Raw rows must be clean, duplicate or rejected rows."""
    counts = report.counts
    parts = counts.clean_rows + counts.duplicate_rows + counts.rejected_rows
    if counts.raw_rows == parts:
        return None
    return f"{counts.raw_rows} raw rows, but {parts} clean, duplicate and rejected rows"


def reject_rate_of(report: CleanedReport) -> float:
    """Share of the raw rows that are rejected."""
    return report.counts.rejected_rows / max(1, report.counts.raw_rows)


def fraud_rate_of(report: CleanedReport) -> float:
    """Share of the clean rows that are frauds."""
    return report.counts.fraud_rows / max(1, report.counts.clean_rows)


def high_reject_rate(report: CleanedReport, limits: QualityLimits) -> str | None:
    """The share of rejected rows must be small."""
    rate = reject_rate_of(report)
    if rate <= limits.max_reject_rate:
        return None
    return f"{rate:.2%} of {report.counts.raw_rows} rows are rejected, more than {limits.max_reject_rate:.2%}"


def implausible_fraud_rate(report: CleanedReport, limits: QualityLimits) -> str | None:
    """The share of frauds must be plausible, where there are enough rows to tell."""
    if report.counts.clean_rows < limits.min_rows_to_judge:
        return None
    rate = fraud_rate_of(report)
    if limits.min_fraud_rate <= rate <= limits.max_fraud_rate:
        return None
    return f"{rate:.3%} of the rows are frauds, not between {limits.min_fraud_rate:.3%} and {limits.max_fraud_rate:.3%}"


def shared_ids(key: str, cleaned: CleanedReports) -> str | None:
    """Ids are unique within a file by construction; ranges of two files must not overlap, or rows could count twice."""
    own = cleaned[key].transaction_id
    if own is None:
        return None
    for other, report in cleaned.items():
        ids = report.transaction_id
        if other != key and ids is not None and ids.min <= own.max and own.min <= ids.max:
            return f"ids {own.min} to {own.max} overlap those of {other}, {ids.min} to {ids.max}"
    return None


def misplaced_time_range(key: str, cleaned: CleanedReports, limits: QualityLimits) -> str | None:
    """A file's times must fit its place: one stretch of time, its own, from the date that its name may give."""
    own = cleaned[key].tx_datetime
    if own is None:
        return None
    first, last = own.min, own.max
    if last - first > timedelta(days=limits.max_days_per_file):
        return f"it spans {(last - first).days} days, from {first} to {last}, more than {limits.max_days_per_file}"
    named = _date_of(key)
    if named and not timedelta(0) <= first - named <= timedelta(days=limits.max_days_per_file):
        return f"its first transaction is of {first}, which does not fit its name"
    for other, report in cleaned.items():
        times = report.tx_datetime
        if other == key or times is None:
            continue
        overlap = min(last, times.max) - max(first, times.min)
        if overlap > timedelta(days=limits.max_overlap_days):
            return f"it shares {overlap.days} days with {other}"
    return None


def _date_of(key: str) -> datetime | None:
    try:
        return datetime.strptime(key, "%Y-%m-%d") if len(key) == len("2019-08-22") else None
    except ValueError:
        return None


def problem_of_file(key: str, cleaned: CleanedReports, limits: QualityLimits) -> str | None:
    """What the blocking checks on `cleaned_transactions` would say of a file among the others; None if nothing."""
    report = cleaned[key]
    return (
        rows_that_do_not_add_up(report)
        or high_reject_rate(report, limits)
        or implausible_fraud_rate(report, limits)
        or shared_ids(key, cleaned)
        or misplaced_time_range(key, cleaned, limits)
    )
