"""Asset ``transaction_features``: the model inputs, with history from earlier partitions."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any

import dagster as dg
from pydantic import Field

from ml_platform.assets.cleaned import cleaned_transactions
from ml_platform.assets.documentation import with_links
from ml_platform.assets.outcomes import (
    OWNERS,
    record_outcomes,
    record_partitions,
    split_verdicts,
    table_schema,
)
from ml_platform.escaping import printable, shorten_list
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.quality import ADVICE, QualityLimits, Verdicts, judge_files, problem_of_features
from ml_platform.lake.reports import (
    CLEANED_TABLE,
    FEATURES_TABLE,
    CleanedReport,
    CleanedReports,
    FeatureInputs,
    FeaturesReport,
    FeaturesReports,
    Instants,
    instant_text,
)
from ml_platform.lake.resource import LakeResource
from ml_platform.lake.storage import readable_path
from ml_platform.run_config import check_run_config
from ml_platform.spark.engine import SparkEngine
from spark_jobs.features.registry import FEATURE_COLUMNS, HISTORY_DAYS, LABEL_DELAY_DAYS, MODEL_INPUTS
from spark_jobs.schema import CLEANED_COLUMNS, KEY_COLUMNS

#: Columns that are never NULL.
NEVER_NULL = [name for name, *_ in (*CLEANED_COLUMNS, *FEATURE_COLUMNS) if name not in KEY_COLUMNS]


class FeaturesConfig(dg.Config):
    """Options of one materialization."""

    rebuild: bool = Field(False, description="Build features again even if they are up to date.")
    accept: bool = Field(
        False, description="Take the run's files as they are, even if checks stop them, until their rows change."
    )


def chronological_keys(cleaned: CleanedReports) -> list[str]:
    """Keys of the non-empty partitions, sorted by first transaction, then by key."""
    times = time_ranges(cleaned)
    return sorted(times, key=lambda key: (times[key].min, key))


def time_ranges(cleaned: CleanedReports) -> dict[str, Instants]:
    """First and last transaction time of each non-empty partition."""
    return {key: report.tx_datetime for key, report in cleaned.items() if report.tx_datetime is not None}


def history_of(cleaned: CleanedReports) -> dict[str, list[str]]:
    """For each partition, the earlier partitions that overlap its history window, in chronological order.

    Earlier means an earlier first transaction; names do not matter. An empty partition has no history.
    """
    times, ordered = time_ranges(cleaned), chronological_keys(cleaned)
    ends = [times[key].max for key in ordered]
    latest_ends = list(accumulate(ends, max))
    reach = timedelta(days=HISTORY_DAYS)
    history: dict[str, list[str]] = {key: [] for key in cleaned}
    for index, key in enumerate(ordered):
        # Compare differences: subtracting the window could give a date before year 1, which datetime cannot represent.
        first = times[key].min
        # Scan backwards and stop at the window, so that the cost depends on the history, not on all earlier partitions.
        earlier = index
        while earlier and first - latest_ends[earlier - 1] < reach:
            earlier -= 1
        history[key] = [ordered[n] for n in range(earlier, index) if first - ends[n] < reach]
    return history


def expected_inputs(cleaned: CleanedReports, verdicts: Verdicts) -> dict[str, FeatureInputs]:
    """Input versions that each partition's features should be built from; features with other inputs are stale.

    Files that `unique_ids` stops are no history, because their rows would count twice.
    """
    usable = {key: report for key, report in cleaned.items() if key not in verdicts.duplicates}
    return {
        key: FeatureInputs(
            cleaned=cleaned[key].version, history={earlier: cleaned[earlier].version for earlier in history}
        )
        for key, history in history_of(usable).items()
    }


def stale_features(features: FeaturesReports, inputs: Mapping[str, FeatureInputs]) -> list[str]:
    """Keys of feature partitions whose inputs or feature list have changed since they were built."""
    return [
        key
        for key, report in features.items()
        if key in inputs and (report.inputs != inputs[key] or report.features != list(MODEL_INPUTS))
    ]


@dataclass(frozen=True)
class FeaturePlan:
    """Feature partitions that a run builds, keeps or skips.

    Attributes:
        to_build: partitions to build, oldest first.
        current: partitions of the run that are up to date.
        extra: those of `to_build` outside the run: their inputs changed, or their features are missing.
        stopped: partitions that are not built because checks stop them, with the reason.
    """

    to_build: list[str]
    current: list[str]
    extra: list[str]
    stopped: dict[str, str]


def plan_features(
    keys: Sequence[str],
    cleaned: CleanedReports,
    features: FeaturesReports,
    outdated: Mapping[str, Mapping[str, Any]],
    materialized: Collection[str],
    verdicts: Verdicts,
    *,
    rebuild: bool = False,
) -> FeaturePlan:
    """Decide which features to build: missing or stale ones of the run's `keys`, and stale or lost ones outside it.

    `materialized` are the partitions that Dagster has recorded. A failed run may have deleted the reports of stale
    features, and then only Dagster still knows that they existed.
    """
    inputs = expected_inputs(cleaned, verdicts)
    stale = {*stale_features(features, inputs), *outdated, *(set(materialized) - set(features))}
    extra = sorted((stale & set(cleaned)) - set(keys))
    requested = [key for key in keys if key in cleaned]
    stopped = verdicts.stopped([*requested, *extra])
    extra = [key for key in extra if key not in stopped]
    requested = [key for key in requested if key not in stopped]
    current = [key for key in requested if key in features and key not in stale and not rebuild]
    to_build = [key for key in requested if key not in current] + extra
    position = {key: index for index, key in enumerate(chronological_keys(cleaned))}
    to_build.sort(key=lambda key: (position.get(key, -1), key))  # empty partitions first
    return FeaturePlan(to_build, current, extra, stopped)


def unusable_files(
    keys: Sequence[str], cleaned: CleanedReports, features: FeaturesReports, verdicts: Verdicts
) -> dict[str, str]:
    """Those of the run's `keys` without usable features because of the files themselves, with the reason.

    Raises dagster.Failure if `features` are missing or stale for another reason.
    """
    left_out = verdicts.stopped(key for key in keys if key in cleaned)
    left_out |= {key: "it is not cleaned" for key in keys if key not in cleaned}
    missing = [key for key in keys if key not in features and key not in left_out]
    stale = [key for key in stale_features(features, expected_inputs(cleaned, verdicts)) if not verdicts.reason(key)]
    if unusable := sorted({*missing, *stale} - set(left_out)):
        raise dg.Failure(
            f"features are missing or stale for {shorten_list(unusable)}; materialize transaction_features first",
            allow_retries=False,
        )
    for key in keys:
        if key not in left_out and (problem := problem_of_features(cleaned[key], features[key])):
            left_out[key] = problem
    return left_out


@dg.asset(
    partitions_def=raw_files,
    backfill_policy=dg.BackfillPolicy.single_run(),
    # Without a partition to build, what follows is skipped.
    output_required=False,
    deps=[cleaned_transactions],
    group_name="fraud_detection",
    kinds={"pyspark", "parquet"},
    owners=OWNERS,
    metadata={"dagster/column_schema": table_schema([*CLEANED_COLUMNS, *FEATURE_COLUMNS], never_null=NEVER_NULL)},
    description=with_links(
        f"""Cleaned transactions with the {len(MODEL_INPUTS)} model inputs.

History comes only from earlier partitions, and labels younger than {LABEL_DELAY_DAYS} days are not
used. Features whose history changed (a late file, a file cleaned again) are rebuilt in the next run. Files that the
checks on `cleaned_transactions` stop get none, unless they are accepted.

**How to read its metadata:** `history_partitions` are the earlier files that went into the windows; `built_by_run` is
the run that wrote the partition. The columns and their windows are under "Columns"; docs/model.md, “Add or change a
feature”, says how to add one.

**If the check `usable_features` fails:** it names the partition and what is wrong. Materialize the partition again with
`rebuild: true`."""
    ),
)
def transaction_features(
    context: dg.AssetExecutionContext,
    config: FeaturesConfig,
    lake: LakeResource,
    spark: SparkEngine,
    limits: QualityLimits,
) -> Iterator[dg.MaterializeResult]:
    """Build the planned features in one Spark job."""
    check_run_config(context.run.run_config)
    keys = record_partitions(context)
    cleaned, (features, outdated) = lake.reports(CleanedReport), lake.split_reports(FeaturesReport)
    if config.accept:
        cleaned |= lake.accept([cleaned[key] for key in keys if key in cleaned])
    verdicts = judge_files(cleaned, features, limits)
    if config.accept:
        # Their neighbours, too, may have stopped them: with features of their own they stand.
        verdicts = verdicts.without(keys)
    plan = plan_features(
        keys,
        cleaned,
        features,
        outdated,
        context.instance.get_materialized_partitions(context.asset_key),
        verdicts,
        rebuild=config.rebuild,
    )
    for key, problem in plan.stopped.items():
        context.log.warning(
            f"{printable(key)}: features are not rebuilt and not used for training: {printable(problem)}. {ADVICE}"
        )
    if plan.extra:
        context.log.info(
            f"also rebuilding {shorten_list(plan.extra)}: the history or the way of building features changed, or the "
            "features are missing"
        )
    left_out = {key: problem for key, problem in plan.stopped.items() if key in keys} | {
        key: "no cleaned data; materialize cleaned_transactions first" for key in keys if key not in cleaned
    }
    failed: dict[str, str] = {}
    built: FeaturesReports = {}
    if plan.to_build:
        inputs = expected_inputs(cleaned, verdicts)
        items = [_request(lake, cleaned, key, inputs[key]) for key in plan.to_build]
        report = spark.run_job(
            context,
            lake,
            "build_features",
            {"partitions": items},
            rows=sum(cleaned[part].counts.clean_rows for key in plan.to_build for part in [key, *inputs[key].history]),
        )
        built, failed = split_verdicts(report["partitions"], FeaturesReport)
    reports = {key: features[key] for key in plan.current} | built
    metadata = {key: _metadata(lake, report, key in built) for key, report in reports.items()}
    yield from record_outcomes(context, succeeded=metadata, failed=failed, left_out=left_out)


def _request(lake: LakeResource, cleaned: CleanedReports, key: str, inputs: FeatureInputs) -> dict[str, Any]:
    """Request item of the job build_features for one partition."""
    times = cleaned[key].tx_datetime
    return {
        "partition": key,
        "cleaned_uri": lake.partition_uri(CLEANED_TABLE, key),
        "tx_datetime_min": instant_text(times.min) if times else None,
        "history": [lake.partition_uri(CLEANED_TABLE, earlier) for earlier in inputs.history],
        "cleaned_bytes": sum(cleaned[part].text_bytes for part in [key, *inputs.history]),
        "inputs": inputs.model_dump(),
        "output_uri": lake.partition_uri(FEATURES_TABLE, key),
    }


def _metadata(lake: LakeResource, report: FeaturesReport, was_built: bool) -> dict[str, Any]:
    return {
        "outcome": "built" if was_built else "already up to date",
        "dagster/row_count": report.counts.rows,
        "path": readable_path(lake.partition_uri(FEATURES_TABLE, report.partition)),
        "fraud_rows": report.counts.fraud_rows,
        "history_partitions": dg.MetadataValue.json(sorted(report.inputs.history)),
        "built_by_run": dg.MetadataValue.dagster_run(report.run_id),
        "spark_version": report.spark_version,
        "seconds": report.seconds,
    }
