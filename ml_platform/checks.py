"""Asset checks, computed from the jobs' reports. The blocking ones stop a run before it trains on wrong data."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import dagster as dg

from ml_platform.assets.cleaned import cleaned_transactions
from ml_platform.assets.features import transaction_features
from ml_platform.assets.model import fraud_model
from ml_platform.escaping import markdown, printable
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.quality import (
    QualityLimits,
    fraud_rate_of,
    high_reject_rate,
    implausible_fraud_rate,
    misplaced_time_range,
    reject_rate_of,
    rows_that_do_not_add_up,
    shared_ids,
)
from ml_platform.lake.resource import CLEANED, FEATURES, LakeResource, Reports
from ml_platform.model.gate import DECISION_FILE, HEALTH_FILE, read_finding
from ml_platform.model.promotion import DECIDED_BY_FIGURES
from ml_platform.spark.engine import job_file

Problems = dict[str, str]


def _judge(
    context: dg.AssetCheckExecutionContext,
    problem_of: Callable[[str], str | None],
    measure: Callable[[str], Mapping[str, Any]] = lambda key: {},
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
) -> dg.AssetCheckResult:
    """Check every partition of the run.

    Dagster takes one result from a check that runs over a range. So that its UI shows each partition's own, with the
    figures of `measure`, they are logged one by one; the result, which may block the run, names those with a problem.
    """
    (check,) = context.op_execution_context.selected_asset_check_keys
    problems: Problems = {}
    for key in context.partition_keys:
        if problem := problem_of(key):
            problems[key] = problem
            context.log.warning(f"{check.name}: {printable(key)}: {printable(problem)}")
        evaluation = dg.AssetCheckEvaluation(
            asset_key=check.asset_key,
            check_name=check.name,
            passed=key not in problems,
            severity=severity,
            description=markdown(problem) if problem else None,
            metadata=dict(measure(key)),
            partition=key,
        )
        # The method takes it, its annotation does not say so.
        context.op_execution_context.log_event(evaluation)  # type: ignore[arg-type]
    return dg.AssetCheckResult(
        passed=not problems,
        severity=severity,
        description=markdown("; ".join(f"{key}: {problem}" for key, problem in problems.items())) or None,
        metadata={"partitions_checked": len(context.partition_keys), "problems": dg.JsonMetadataValue(problems)},
    )


def _with_report(reports: Reports, problem_of: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """`problem_of` for partitions that have a report; not to have one is a problem, too."""
    return lambda key: problem_of(key) if key in reports else "it has no report"


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def rows_add_up(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> dg.AssetCheckResult:
    """Every raw row is a clean, a duplicate or a rejected row."""
    cleaned = lake.reports(CLEANED)
    return _judge(context, _with_report(cleaned, lambda key: rows_that_do_not_add_up(cleaned[key])))


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def reject_rate(
    context: dg.AssetCheckExecutionContext, lake: LakeResource, limits: QualityLimits
) -> dg.AssetCheckResult:
    """Few rows are rejected."""
    cleaned = lake.reports(CLEANED)

    def measure(key: str) -> Mapping[str, float]:
        return {"rate": reject_rate_of(cleaned[key]), "limit": limits.max_reject_rate} if key in cleaned else {}

    return _judge(context, _with_report(cleaned, lambda key: high_reject_rate(cleaned[key], limits)), measure)


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def fraud_rate(
    context: dg.AssetCheckExecutionContext, lake: LakeResource, limits: QualityLimits
) -> dg.AssetCheckResult:
    """The share of frauds is plausible."""
    cleaned = lake.reports(CLEANED)

    def measure(key: str) -> Mapping[str, float]:
        return {"rate": fraud_rate_of(cleaned[key])} if key in cleaned else {}

    return _judge(context, _with_report(cleaned, lambda key: implausible_fraud_rate(cleaned[key], limits)), measure)


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def unique_ids(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> dg.AssetCheckResult:
    """No transaction_id range overlaps that of another file."""
    cleaned = lake.reports(CLEANED)
    return _judge(context, _with_report(cleaned, lambda key: shared_ids(key, cleaned)))


@dg.asset_check(asset=cleaned_transactions, partitions_def=raw_files, blocking=True)
def time_range(
    context: dg.AssetCheckExecutionContext, lake: LakeResource, limits: QualityLimits
) -> dg.AssetCheckResult:
    """The times of a file fit its place among the others."""
    cleaned = lake.reports(CLEANED)
    return _judge(context, _with_report(cleaned, lambda key: misplaced_time_range(key, cleaned, limits)))


@dg.asset_check(asset=transaction_features, partitions_def=raw_files, blocking=True)
def usable_features(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> dg.AssetCheckResult:
    """Every clean row has features, none of them NULL, NaN or infinite."""
    cleaned, features = lake.reports(CLEANED), lake.reports(FEATURES)

    def problem_of(key: str) -> str | None:
        counts, clean_rows = features[key]["counts"], cleaned.get(key, {}).get("counts", {}).get("clean_rows")
        if counts["rows"] != clean_rows:
            return f"{counts['rows']} rows of features for {clean_rows} clean rows"
        return f"{counts['unusable_rows']} rows have unusable features" if counts["unusable_rows"] else None

    return _judge(context, _with_report(features, problem_of))


@dg.asset_check(asset=fraud_model, partitions_def=raw_files)
def enough_data(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> dg.AssetCheckResult:
    """The models that this run was to train could be trained."""
    reports: dict[str, Any] = {}
    for key in context.partition_keys:
        # Where there is none, the run's model is that of another partition.
        with suppress(FileNotFoundError):
            reports[key] = lake.read_json(job_file(context.run.run_id, "train_model", key, "report.json"))

    def problem_of(key: str) -> str | None:
        trained = key not in reports or reports[key]["outcome"] == "trained"
        return None if trained else reports[key]["reason"]

    return _judge(context, problem_of, severity=dg.AssetCheckSeverity.WARN)


def _of_this_run(context: dg.AssetCheckExecutionContext, lake: LakeResource, name: str) -> dict[str, Any]:
    """What a file beside this run's models says, by cut-off."""
    found: dict[str, Any] = {}
    for key in context.partition_keys:
        with suppress(FileNotFoundError):
            found[key] = read_finding(lake, f"models/{key}/{context.run.run_id}/{name}")
    return found


@dg.asset_check(asset=fraud_model, partitions_def=raw_files)
def promotion(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> dg.AssetCheckResult:
    """The gate's decision, with its reasons; passed if it could be made by figures."""
    decisions = _of_this_run(context, lake, DECISION_FILE)

    def problem_of(key: str) -> str | None:
        by_figures = key not in decisions or decisions[key]["outcome"] in DECIDED_BY_FIGURES
        return None if by_figures else " ".join(decisions[key]["reasons"])

    def measure(key: str) -> Mapping[str, Any]:
        if key not in decisions:
            return {}
        decision = decisions[key]
        return {
            "outcome": decision["outcome"],
            "promoted": decision["apply"],
            "reasons": dg.MetadataValue.text(" ".join(decision["reasons"])),
            "figures": dg.JsonMetadataValue(decision["figures"]),
        }

    return _judge(context, problem_of, measure, severity=dg.AssetCheckSeverity.WARN)


def ailing_champion(health: Mapping[str, Any]) -> str | None:
    """A champion must not stay for ever by accident: too weak, not to be read, or not compared for too long."""
    if health["replaced"]:
        return None
    version, precision, floor = health["version"], health["average_precision"], health["min_average_precision"]
    if precision is not None and precision < floor:
        return f"the champion, version {version}, has an average precision of {precision:.3f}, below {floor}"
    if health["outcome"] == "champion_newer_library":
        return str(health["reason"])
    days = health["days_without_comparison"]
    if days > health["max_age_days"]:
        return (
            f"no challenger could be compared with the champion, version {version}, for {days} days; "
            f"this time: {health['outcome']}. {health['reason']}"
        )
    return None


@dg.asset_check(asset=fraud_model, partitions_def=raw_files)
def champion_health(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> dg.AssetCheckResult:
    """The champion still serves."""
    found = _of_this_run(context, lake, HEALTH_FILE)
    return _judge(
        context,
        lambda key: ailing_champion(found[key]) if key in found else None,
        severity=dg.AssetCheckSeverity.WARN,
    )


ASSET_CHECKS = [
    rows_add_up,
    reject_rate,
    fraud_rate,
    unique_ids,
    time_range,
    usable_features,
    enough_data,
    promotion,
    champion_health,
]
