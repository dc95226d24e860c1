"""Asset checks, computed from the jobs' reports. The blocking ones stop a run before it trains on wrong data."""

from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from ml_platform.assets.cleaned import cleaned_transactions
from ml_platform.assets.features import Reports, instant, transaction_features
from ml_platform.assets.model import fraud_model
from ml_platform.partitions import raw_files
from ml_platform.resources.lake import CLEANED, FEATURES, LakeResource
from ml_platform.resources.spark import job_file


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


Problems = dict[str, str]


def rows_that_do_not_add_up(report: Mapping[str, Any]) -> str | None:
    """Raw rows must be clean, duplicate or rejected rows."""
    counts = report["counts"]
    parts = counts["clean_rows"] + counts["duplicate_rows"] + counts["rejected_rows"]
    if counts["raw_rows"] == parts:
        return None
    return f"{counts['raw_rows']} raw rows, but {parts} clean, duplicate and rejected rows"


def high_reject_rate(report: Mapping[str, Any], limits: QualityLimits) -> str | None:
    """The share of rejected rows must be small."""
    counts = report["counts"]
    rate = counts["rejected_rows"] / max(1, counts["raw_rows"])
    if rate <= limits.max_reject_rate:
        return None
    return f"{rate:.2%} of {counts['raw_rows']} rows are rejected, more than {limits.max_reject_rate:.2%}"


def implausible_fraud_rate(report: Mapping[str, Any], limits: QualityLimits) -> str | None:
    """The share of frauds must be plausible, where there are rows enough to tell."""
    counts = report["counts"]
    if counts["clean_rows"] < limits.min_rows_to_judge:
        return None
    rate = counts["fraud_rows"] / counts["clean_rows"]
    if limits.min_fraud_rate <= rate <= limits.max_fraud_rate:
        return None
    return f"{rate:.3%} of the rows are frauds, not between {limits.min_fraud_rate:.3%} and {limits.max_fraud_rate:.3%}"


def shared_ids(key: str, cleaned: Reports) -> str | None:
    """Ids are unique within a file by construction; between files they must not overlap, or rows would count twice."""
    first, last = (cleaned[key]["transaction_id"][end] for end in ("min", "max"))
    if first is None:
        return None
    for other, report in cleaned.items():
        ids = report["transaction_id"]
        if other != key and ids["min"] is not None and ids["min"] <= last and first <= ids["max"]:
            return f"ids {first} to {last} overlap those of {other}, {ids['min']} to {ids['max']}"
    return None


def misplaced_time_range(key: str, cleaned: Reports, limits: QualityLimits) -> str | None:
    """A file's times must fit its place: one stretch of time, its own, from the date that its name may give."""
    times = cleaned[key]["tx_datetime"]
    if times["min"] is None:
        return None
    first, last = instant(times["min"]), instant(times["max"])
    if last - first > timedelta(days=limits.max_days_per_file):
        return f"it spans {(last - first).days} days, from {first} to {last}, more than {limits.max_days_per_file}"
    named = _date_of(key)
    if named and not named <= first <= named + timedelta(days=limits.max_days_per_file):
        return f"its first transaction is of {first}, which does not fit its name"
    for other, report in cleaned.items():
        if other == key or report["tx_datetime"]["min"] is None:
            continue
        other_first, other_last = instant(report["tx_datetime"]["min"]), instant(report["tx_datetime"]["max"])
        overlap = min(last, other_last) - max(first, other_first)
        if overlap > timedelta(days=limits.max_overlap_days):
            return f"it shares {overlap.days} days with {other}"
    return None


def _date_of(key: str) -> datetime | None:
    try:
        day = date.fromisoformat(key)
    except ValueError:
        return None
    return datetime(day.year, day.month, day.day)


def _judge(
    context: dg.AssetCheckExecutionContext, reports: Reports, problem_of: Callable[[str], str | None]
) -> dg.AssetCheckResult:
    """Check every partition of the run; the result names those with a problem."""
    problems: Problems = {}
    for key in context.partition_keys:
        problem = problem_of(key) if key in reports else "it has no report"
        if problem:
            problems[key] = problem
    return dg.AssetCheckResult(
        passed=not problems,
        description="; ".join(f"{key}: {problem}" for key, problem in problems.items()) or None,
        metadata={
            "partitions_checked": len(context.partition_keys),
            "problems": dg.JsonMetadataValue(problems),
        },
    )


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def rows_add_up(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> dg.AssetCheckResult:
    """Every raw row is a clean, a duplicate or a rejected row."""
    cleaned = lake.reports(CLEANED)
    return _judge(context, cleaned, lambda key: rows_that_do_not_add_up(cleaned[key]))


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def reject_rate(
    context: dg.AssetCheckExecutionContext, lake: LakeResource, limits: QualityLimits
) -> dg.AssetCheckResult:
    """Few rows are rejected."""
    cleaned = lake.reports(CLEANED)
    return _judge(context, cleaned, lambda key: high_reject_rate(cleaned[key], limits))


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def fraud_rate(
    context: dg.AssetCheckExecutionContext, lake: LakeResource, limits: QualityLimits
) -> dg.AssetCheckResult:
    """The share of frauds is plausible."""
    cleaned = lake.reports(CLEANED)
    return _judge(context, cleaned, lambda key: implausible_fraud_rate(cleaned[key], limits))


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def unique_ids(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> dg.AssetCheckResult:
    """No transaction_id range overlaps that of another file."""
    cleaned = lake.reports(CLEANED)
    return _judge(context, cleaned, lambda key: shared_ids(key, cleaned))


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def time_range(
    context: dg.AssetCheckExecutionContext, lake: LakeResource, limits: QualityLimits
) -> dg.AssetCheckResult:
    """The times of a file fit its place among the others."""
    cleaned = lake.reports(CLEANED)
    return _judge(context, cleaned, lambda key: misplaced_time_range(key, cleaned, limits))


@dg.asset_check(asset=transaction_features, partitions_def=raw_files, blocking=True)
def usable_features(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> dg.AssetCheckResult:
    """Every clean row has features, none of them NULL, NaN or infinite."""
    cleaned, features = lake.reports(CLEANED), lake.reports(FEATURES)

    def problem_of(key: str) -> str | None:
        counts, clean_rows = features[key]["counts"], cleaned.get(key, {}).get("counts", {}).get("clean_rows")
        if counts["rows"] != clean_rows:
            return f"{counts['rows']} rows of features for {clean_rows} clean rows"
        return f"{counts['unusable_rows']} rows have unusable features" if counts["unusable_rows"] else None

    return _judge(context, features, problem_of)


@dg.asset_check(asset=fraud_model, partitions_def=raw_files)
def enough_data(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> dg.AssetCheckResult:
    """The models that this run was to train could be trained."""
    outcomes: dict[str, str] = {}
    problems: Problems = {}
    for key in context.partition_keys:
        try:
            report = lake.read_json(job_file(context.run.run_id, "train_model", key, "report"))
        except FileNotFoundError:  # the run's model is that of another partition
            continue
        outcomes[key] = report["outcome"]
        if report["outcome"] != "trained":
            problems[key] = report["reason"]
    return dg.AssetCheckResult(
        passed=not problems,
        severity=dg.AssetCheckSeverity.WARN,
        description="; ".join(f"{key}: {problem}" for key, problem in problems.items()) or None,
        metadata={"outcomes": dg.JsonMetadataValue(outcomes)},
    )


ASSET_CHECKS = [rows_add_up, reject_rate, fraud_rate, unique_ids, time_range, usable_features, enough_data]
