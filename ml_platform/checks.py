"""Asset checks of cleaned files and features, based on the jobs' reports. They block training on bad data.

The checks of `fraud_model` are defined in the asset itself.
"""

from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg

from ml_platform.assets.cleaned import cleaned_transactions
from ml_platform.assets.features import transaction_features
from ml_platform.assets.outcomes import check_partitions
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.quality import (
    QualityLimits,
    fraud_rate_of,
    high_reject_rate,
    implausible_fraud_rate,
    implausible_time_range,
    overlapping_ids,
    reject_rate_of,
    row_count_mismatch,
)
from ml_platform.lake.reports import CleanedReport, FeaturesReport
from ml_platform.lake.resource import LakeResource


def _check(
    context: dg.AssetCheckExecutionContext,
    reports: Mapping[str, Any],
    problem_of: Callable[[str], str | None],
    measure: Callable[[str], Mapping[str, Any]] = lambda key: {},
) -> dg.AssetCheckResult:
    """Check the run's partitions by their reports; a missing report is also a problem."""
    (check,) = context.op_execution_context.selected_asset_check_keys
    return check_partitions(
        context,
        check,
        lambda key: problem_of(key) if key in reports else "no report",
        lambda key: measure(key) if key in reports else {},
    )


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def rows_add_up(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> dg.AssetCheckResult:
    """Every raw row is a clean, duplicate or rejected row."""
    cleaned = lake.reports(CleanedReport)
    return _check(context, cleaned, lambda key: row_count_mismatch(cleaned[key]))


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def reject_rate(
    context: dg.AssetCheckExecutionContext, lake: LakeResource, limits: QualityLimits
) -> dg.AssetCheckResult:
    """The share of rejected rows is small."""
    cleaned = lake.reports(CleanedReport)

    def measure(key: str) -> Mapping[str, float]:
        return {"rate": reject_rate_of(cleaned[key]), "limit": limits.max_reject_rate}

    return _check(context, cleaned, lambda key: high_reject_rate(cleaned[key], limits), measure)


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def fraud_rate(
    context: dg.AssetCheckExecutionContext, lake: LakeResource, limits: QualityLimits
) -> dg.AssetCheckResult:
    """The share of frauds is plausible."""
    cleaned = lake.reports(CleanedReport)

    def measure(key: str) -> Mapping[str, float]:
        return {"rate": fraud_rate_of(cleaned[key])}

    return _check(context, cleaned, lambda key: implausible_fraud_rate(cleaned[key], limits), measure)


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def unique_ids(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> dg.AssetCheckResult:
    """The transaction_id range does not overlap that of another file."""
    cleaned = lake.reports(CleanedReport)
    return _check(context, cleaned, lambda key: overlapping_ids(key, cleaned))


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def time_range(
    context: dg.AssetCheckExecutionContext, lake: LakeResource, limits: QualityLimits
) -> dg.AssetCheckResult:
    """The time range is plausible, matches the file name, and does not overlap other files."""
    cleaned = lake.reports(CleanedReport)
    return _check(context, cleaned, lambda key: implausible_time_range(key, cleaned, limits))


@dg.asset_check(asset=transaction_features, partitions_def=raw_files, blocking=True)
def usable_features(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> dg.AssetCheckResult:
    """Every clean row has features, none of them NULL, NaN or infinite."""
    cleaned, features = lake.reports(CleanedReport), lake.reports(FeaturesReport)

    def problem_of(key: str) -> str | None:
        counts = features[key].counts
        clean_rows = cleaned[key].counts.clean_rows if key in cleaned else None
        if counts.rows != clean_rows:
            return f"{counts.rows} feature rows for {clean_rows} clean rows"
        return f"{counts.unusable_rows} rows have unusable features" if counts.unusable_rows else None

    return _check(context, features, problem_of)


ASSET_CHECKS = [rows_add_up, reject_rate, fraud_rate, unique_ids, time_range, usable_features]
