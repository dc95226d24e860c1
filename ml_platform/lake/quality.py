"""Quality rules that a file's cleaning report must satisfy before features and models are built from it."""

from datetime import datetime, timedelta

import dagster as dg
from pydantic import Field

from ml_platform.lake.reports import CleanedReport, CleanedReports


class QualityLimits(dg.ConfigurableResource):
    """Thresholds of the data quality checks."""

    max_reject_rate: float = Field(
        default=0.02, ge=0, le=1, description="Largest share of raw rows that may be rejected."
    )
    min_fraud_rate: float = Field(default=0.0005, ge=0, le=1, description="Smallest plausible share of frauds.")
    max_fraud_rate: float = Field(default=0.25, ge=0, le=1, description="Largest plausible share of frauds.")
    min_rows_to_judge: int = Field(
        default=10_000,
        ge=1,
        description="A file with fewer clean rows gets no fraud rate check: the rate would be mostly noise.",
    )
    max_days_per_file: int = Field(default=100, ge=1, description="Longest time span that one file may cover.")
    max_overlap_days: int = Field(default=1, ge=0, description="Days that the time ranges of two files may share.")


def row_count_mismatch(report: CleanedReport) -> str | None:
    """Every raw row must be a clean, duplicate or rejected row."""
    counts = report.counts
    total = counts.clean_rows + counts.duplicate_rows + counts.rejected_rows
    if counts.raw_rows == total:
        return None
    return f"{counts.raw_rows} raw rows, but {total} clean, duplicate and rejected rows"


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
    """The fraud rate must be plausible, if there are enough rows to estimate it."""
    if report.counts.clean_rows < limits.min_rows_to_judge:
        return None
    rate = fraud_rate_of(report)
    if limits.min_fraud_rate <= rate <= limits.max_fraud_rate:
        return None
    return f"{rate:.3%} of the rows are frauds, not between {limits.min_fraud_rate:.3%} and {limits.max_fraud_rate:.3%}"


def overlapping_ids(key: str, cleaned: CleanedReports) -> str | None:
    """Id ranges of files must not overlap, or rows could count twice; within a file ids are unique by construction."""
    ids = cleaned[key].transaction_id
    if ids is None:
        return None
    for other, report in cleaned.items():
        other_ids = report.transaction_id
        if other != key and other_ids is not None and other_ids.min <= ids.max and ids.min <= other_ids.max:
            return f"ids {ids.min} to {ids.max} overlap those of {other}, {other_ids.min} to {other_ids.max}"
    return None


def implausible_time_range(key: str, cleaned: CleanedReports, limits: QualityLimits) -> str | None:
    """A file must span a plausible period that matches the date in its name, if any, and overlaps no other file."""
    times = cleaned[key].tx_datetime
    if times is None:
        return None
    first, last = times.min, times.max
    if last - first > timedelta(days=limits.max_days_per_file):
        return f"it spans {(last - first).days} days, from {first} to {last}, more than {limits.max_days_per_file}"
    named_date = _date_of(key)
    if named_date and not timedelta(0) <= first - named_date <= timedelta(days=limits.max_days_per_file):
        return f"its first transaction, at {first}, does not match the date in its name"
    for other, report in cleaned.items():
        other_times = report.tx_datetime
        if other == key or other_times is None:
            continue
        overlap = min(last, other_times.max) - max(first, other_times.min)
        if overlap > timedelta(days=limits.max_overlap_days):
            return f"it shares {overlap.days} days with {other}"
    return None


def _date_of(key: str) -> datetime | None:
    try:
        return datetime.strptime(key, "%Y-%m-%d") if len(key) == len("2019-08-22") else None
    except ValueError:
        return None


def file_problem(key: str, cleaned: CleanedReports, limits: QualityLimits) -> str | None:
    """First problem that the blocking checks on `cleaned_transactions` would find in a file; None if they pass."""
    report = cleaned[key]
    return (
        row_count_mismatch(report)
        or high_reject_rate(report, limits)
        or implausible_fraud_rate(report, limits)
        or overlapping_ids(key, cleaned)
        or implausible_time_range(key, cleaned, limits)
    )
