"""Checks of cleaned files, features and scores, from the jobs' reports.

Those of files and features stop the partitions that they name: these get no features and train no model. All others go
on in the same run, which the checks fail at its end. Those of scores warn. The checks of `fraud_model` are results of
the asset itself.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import dagster as dg

from ml_platform.assets.cleaned import WITHDRAWN, cleaned_transactions
from ml_platform.assets.documentation import with_links
from ml_platform.assets.features import transaction_features
from ml_platform.assets.outcomes import INTAKE_CHECKS, check_partitions, listed, rounded
from ml_platform.assets.scores import scored_transactions
from ml_platform.escaping import printable
from ml_platform.lake.grades import problem_of_grade, valid_grades
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.quality import (
    ADVICE,
    CHECK_NAMES,
    QualityLimits,
    commonest_reasons,
    fraud_rate_of,
    judge_files,
    problem_of_features,
    reject_rate_of,
)
from ml_platform.lake.reports import CleanedReport, FeaturesReport, ScoredReport
from ml_platform.lake.resource import LakeResource

DESCRIPTIONS = {
    "rows_add_up": "Every raw row is a clean, duplicate or rejected row.",
    "reject_rate": "The share of rejected rows is small (`limits.max_reject_rate`, 2% by default).",
    "fraud_rate": "The share of frauds is plausible (`limits.min_fraud_rate` and `max_fraud_rate`, 0.05 to 25%).",
    "known_ids": "Nearly all rows have a customer and a terminal (`limits.max_unknown_ids`, 5% may lack one).",
    "time_range": "The times of a file match its name and its place among the other files.",
    "unique_ids": "No transaction_id is in two files.",
}

#: Where the remedy is, in the description of each check that stops files.
REMEDY = "A file that fails gets no features and trains no model: docs/operations.md, “A file is bad: what do I do?”."

#: How to go on if files could not be cleaned, and none is stopped.
ADVICE_NOT_CLEANED = (
    "Correct or restore the files; a changed file is cleaned by a later run. ml-platform summary lists the raw files "
    "with their states"
)

#: Steps with a lower priority than others run last: they fail the run when all else is done.
LAST = {"dagster/priority": "-1"}


@dg.multi_asset_check(
    name=INTAKE_CHECKS,
    specs=[
        dg.AssetCheckSpec(
            name,
            asset=cleaned_transactions,
            description=with_links(f"{DESCRIPTIONS[name]} {REMEDY}"),
            partitions_def=raw_files,
        )
        for name in CHECK_NAMES
    ],
    can_subset=True,
    op_tags=LAST,
)
def intake_checks(
    context: dg.AssetCheckExecutionContext, lake: LakeResource, limits: QualityLimits
) -> Iterator[dg.AssetCheckResult]:
    """Show the verdicts on the run's files, and fail if one is stopped or could not be cleaned."""
    keys = context.partition_keys
    cleaned, features, uncleaned = lake.reports(CleanedReport), lake.reports(FeaturesReport), lake.uncleaned()
    verdicts = judge_files(cleaned, features, limits)
    not_cleaned = {
        key: uncleaned[key].reason if key in uncleaned else "no report"
        for key in keys
        if key not in cleaned or (key in uncleaned and uncleaned[key].run_id == context.run.run_id)
    }
    not_cleaned |= {key: WITHDRAWN for key in lake.withdrawn() if key in keys}

    def figures(check: str, key: str) -> Mapping[str, Any]:
        if key not in cleaned:
            return {}
        report = cleaned[key]
        if check == "fraud_rate":
            return {"rate": rounded(fraud_rate_of(report))}
        if check == "reject_rate":
            reasons = {
                rule: {"rows": rows, "for instance": report.reject_samples.get(rule, "")}
                for rule, rows in commonest_reasons(report)
            }
            return {
                "rate": rounded(reject_rate_of(report)),
                "limit": str(limits.max_reject_rate),  # Dagster would draw a plot of a number
                "commonest_reasons": dg.JsonMetadataValue(reasons),
            }
        return {}

    stopped: dict[str, str] = {}
    for check in sorted(context.selected_asset_check_keys, key=lambda check: CHECK_NAMES.index(check.name)):
        name = check.name
        yield check_partitions(
            context,
            check,
            lambda key, name=name: not_cleaned.get(key) or verdicts.problems.get(key, {}).get(name),  # type: ignore[misc]
            lambda key, name=name: figures(name, key),  # type: ignore[misc]
            warning_of=lambda key, name=name: verdicts.warnings.get(key, {}).get(name),  # type: ignore[misc]
            finding_of=lambda key, name=name: _finding(name, cleaned[key], limits) if key in cleaned else None,  # type: ignore[misc]
        )
        stopped |= {key: text for key in keys if (text := verdicts.problems.get(key, {}).get(name))}
    stopped = {key: verdicts.reason(key) or "" for key in stopped}
    if bad := not_cleaned | stopped:
        raise dg.Failure(
            f"{len(bad)} of {len(keys)} files are left out; everything else is done. "
            # Only a file that was cleaned can be accepted, or pass with another limit.
            f"{printable(listed(bad))}. {ADVICE if stopped else ADVICE_NOT_CLEANED}",
            metadata={"left_out": dg.JsonMetadataValue(bad)},
            allow_retries=False,
        )


def _finding(check: str, report: CleanedReport, limits: QualityLimits) -> str | None:
    """The figures behind a check that passes, in words."""
    counts, times = report.counts, report.tx_datetime
    if check == "rows_add_up":
        return (
            f"{counts.raw_rows:,} raw = {counts.clean_rows:,} clean + {counts.duplicate_rows:,} duplicate + "
            f"{counts.rejected_rows:,} rejected rows"
        )
    if check == "reject_rate":
        rate = f"{reject_rate_of(report):.2%}, at most {limits.max_reject_rate:.2%}"
        return f"{counts.rejected_rows:,} of {counts.raw_rows:,} rows are rejected ({rate})"
    if check == "fraud_rate":
        return f"{counts.fraud_rows:,} of {counts.clean_rows:,} rows are frauds ({fraud_rate_of(report):.2%})"
    if check == "known_ids":
        return f"{counts.unknown_customer:,} rows lack a customer, {counts.unknown_terminal:,} a terminal"
    return f"{times.min:%Y-%m-%d} to {times.max:%Y-%m-%d}" if check == "time_range" and times else None


@dg.multi_asset_check(
    name="feature_checks",
    specs=[
        dg.AssetCheckSpec(
            "usable_features",
            asset=transaction_features,
            description="Every clean row has features, none of them NULL, NaN or infinite.",
            partitions_def=raw_files,
        )
    ],
    op_tags=LAST,
)
def feature_checks(
    context: dg.AssetCheckExecutionContext, lake: LakeResource, limits: QualityLimits
) -> Iterator[dg.AssetCheckResult]:
    """Check the features of the run's files that are not stopped, and fail if some are not usable."""
    cleaned, features = lake.reports(CleanedReport), lake.reports(FeaturesReport)
    verdicts = judge_files(cleaned, features, limits)
    (check,) = context.selected_asset_check_keys

    def problem_of(key: str) -> str | None:
        if key not in cleaned:
            return None if context.op_execution_context.job_def.has_node_named(INTAKE_CHECKS) else "no cleaned data"
        if verdicts.reason(key):
            return None
        return problem_of_features(cleaned[key], features[key]) if key in features else "no report"

    yield check_partitions(context, check, problem_of)
    if bad := {key: problem for key in context.partition_keys if (problem := problem_of(key))}:
        raise dg.Failure(printable(listed(bad)), allow_retries=False)


#: Where a warning about distributions is explained.
DRIFT = "It warns and stops nothing: docs/scores.md, “Drift”."

SCORE_CHECKS = {
    "champion_scores": "The champion before the run could score the rows, or there was none. It warns and stops "
    "nothing: docs/scores.md, “Which model scores what”.",
    "live_quality": "No week's average precision is certainly below that of the version's held-out week. It warns and "
    "stops nothing: docs/scores.md, “Grades”.",
    "feature_drift": f"The model's inputs are distributed as in its training window. {DRIFT}",
    "score_drift": f"The scores are distributed as in the training window. {DRIFT}",
    "label_drift": f"The share of frauds is as in the training window. {DRIFT}",
}


@dg.multi_asset_check(
    name="score_checks",
    specs=[
        dg.AssetCheckSpec(name, asset=scored_transactions, description=with_links(text), partitions_def=raw_files)
        for name, text in SCORE_CHECKS.items()
    ],
    can_subset=True,
)
def score_checks(context: dg.AssetCheckExecutionContext, lake: LakeResource) -> Iterator[dg.AssetCheckResult]:
    """Warn of scores that are missing, or worse than expected, and of rows unlike those of the training window."""
    scored = lake.reports(ScoredReport)
    grades = valid_grades(scored)
    last = list(context.partition_keys)[-1]

    def problem_of(check: str, key: str) -> str | None:
        report = scored.get(key)
        if report is None:
            return None
        if check == "champion_scores":
            return report.error
        if check == "live_quality":
            # The run's own grades, or the newest that there are.
            newest = [grade for grade in grades if grade.week == grades[-1].week] if key == last else []
            problems = [problem for grade in report.grades or newest if (problem := problem_of_grade(grade))]
            return "; ".join(filter(None, [report.grading_error, *problems])) or None
        found = report.drift.get(check, {})
        return found.get("reason") if found.get("outcome") == "drift" else None

    def finding_of(check: str, key: str) -> str | None:
        if key not in scored:
            return None
        report = scored[key]
        if check == "champion_scores":
            return f"{report.counts.rows:,} rows by version {report.model_version}" if report.counts.rows else None
        if check == "live_quality":
            return f"{len(report.grades)} weeks graded by this run, {len(grades)} in all"
        return report.drift.get(check, {}).get("reason")

    def figures(check: str, key: str) -> Mapping[str, Any]:
        if key not in scored:
            return {}
        report = scored[key]
        if check == "champion_scores":
            return {"outcome": report.outcome}
        if check == "live_quality":
            return {"weeks_graded": dg.JsonMetadataValue([grade.model_dump(mode="json") for grade in report.grades])}
        return drift_metadata(report, check)

    for check in sorted(context.selected_asset_check_keys, key=lambda check: list(SCORE_CHECKS).index(check.name)):
        yield check_partitions(
            context,
            check,
            partial(problem_of, check.name),
            partial(figures, check.name),
            dg.AssetCheckSeverity.WARN,
            finding_of=partial(finding_of, check.name),
        )


def drift_metadata(report: ScoredReport, check: str) -> Mapping[str, Any]:
    """Figures of a drift check."""
    found = report.drift.get(check, {"outcome": "not_calibrated"})
    return {"outcome": found["outcome"]} | {
        name: found[name] for name in ("reason", "exceedance", "threshold") if found.get(name) is not None
    }


ASSET_CHECKS = [intake_checks, feature_checks, score_checks]
