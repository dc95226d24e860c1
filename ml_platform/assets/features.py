"""Asset ``transaction_features``: the inputs of the model, with history from earlier partitions."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any

import dagster as dg
from pydantic import Field

from ml_platform.assets.cleaned import cleaned_transactions
from ml_platform.assets.outcomes import OWNERS, conclude, some_of, split_verdicts, table_schema
from ml_platform.escaping import printable
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.quality import QualityLimits, problem_of_file
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
from ml_platform.model.config import check_run_config
from ml_platform.spark.engine import SparkEngine
from spark_jobs.features.registry import FEATURE_COLUMNS, HISTORY_DAYS, LABEL_DELAY_DAYS, MODEL_INPUTS
from spark_jobs.schema import CLEANED_COLUMNS


class FeaturesConfig(dg.Config):
    """Options of one materialization."""

    rebuild: bool = Field(False, description="Build again even what is up to date.")


def in_order_of_time(cleaned: CleanedReports) -> list[str]:
    """Keys of the partitions that have rows, by their first transaction, then by key."""
    times = times_of(cleaned)
    return sorted(times, key=lambda key: (times[key].min, key))


def times_of(cleaned: CleanedReports) -> dict[str, Instants]:
    """First and last transaction of the partitions that have rows."""
    return {key: report.tx_datetime for key, report in cleaned.items() if report.tx_datetime is not None}


def history_of(cleaned: CleanedReports) -> dict[str, list[str]]:
    """For each partition, the earlier ones that reach into its history, in order of time.

    Earlier means an earlier first transaction; names do not matter. An empty partition has no history.
    """
    times, ordered = times_of(cleaned), in_order_of_time(cleaned)
    ends = [times[key].max for key in ordered]
    latest_ends = list(accumulate(ends, max))
    reach = timedelta(days=HISTORY_DAYS)
    history: dict[str, list[str]] = {key: [] for key in cleaned}
    for index, key in enumerate(ordered):
        # Differences, because a date before the year 1 cannot be computed.
        first = times[key].min
        # Backwards, until none before reaches so far: a partition costs its history, not all that came before.
        earlier = index
        while earlier and first - latest_ends[earlier - 1] < reach:
            earlier -= 1
        history[key] = [ordered[n] for n in range(earlier, index) if first - ends[n] < reach]
    return history


def expected_inputs(cleaned: CleanedReports) -> dict[str, FeatureInputs]:
    """What the features of each partition are to be built from; features with other inputs are stale."""
    return {
        key: FeatureInputs(
            cleaned=cleaned[key].version, history={earlier: cleaned[earlier].version for earlier in history}
        )
        for key, history in history_of(cleaned).items()
    }


def stale_features(features: FeaturesReports, inputs: Mapping[str, FeatureInputs]) -> list[str]:
    """Keys of feature partitions that would be built from something else now."""
    return [
        key
        for key, report in features.items()
        if key in inputs and (report.inputs != inputs[key] or report.features != list(MODEL_INPUTS))
    ]


def stopped_files(
    keys: Iterable[str], built_from: Mapping[str, str], cleaned: CleanedReports, limits: QualityLimits
) -> dict[str, str]:
    """Of partitions beyond a run's own, whose checks it does not run: those that the checks would stop, and why.

    `built_from`: fingerprints of the raw files that features were built from (see `raw_files_of`). These files are not
    judged again: their run may have had other limits.
    """
    problems = {
        key: problem_of_file(key, cleaned, limits)
        for key in keys
        if built_from.get(key) != cleaned[key].raw.fingerprint
    }
    return {key: problem for key, problem in problems.items() if problem}


def raw_files_of(features: FeaturesReports, outdated: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Fingerprints of the raw files that features were built from, as far as (outdated) reports name them."""
    inputs = {key: report.get("inputs") for key, report in outdated.items()}
    named = {key: value.get("cleaned", "") for key, value in inputs.items() if isinstance(value, dict)}
    named |= {key: report.inputs.cleaned for key, report in features.items()}
    return {key: str(version).split("/", 2)[-1] for key, version in named.items()}


@dataclass(frozen=True)
class FeaturePlan:
    """What a run has to do about features.

    Attributes:
        wanted: partitions to build, oldest first.
        current: partitions of the run that are up to date.
        beyond: those of `wanted` that are not the run's own: their inputs changed, or they are gone.
        stopped: partitions that are stale, but that the checks would stop, and why.
    """

    wanted: list[str]
    current: list[str]
    beyond: list[str]
    stopped: dict[str, str]


def plan_features(
    keys: Sequence[str],
    cleaned: CleanedReports,
    features: FeaturesReports,
    outdated: Mapping[str, Mapping[str, Any]],
    materialized: Collection[str],
    limits: QualityLimits,
    *,
    rebuild: bool = False,
) -> FeaturePlan:
    """Decide which features to build: missing or stale ones of the run's `keys`, and stale or lost ones beyond them.

    `materialized` are the partitions that Dagster knows: a run that failed has deleted the reports of stale features,
    and nothing in the lake tells that they are wanted.
    """
    stale = {*stale_features(features, expected_inputs(cleaned)), *outdated, *(set(materialized) - set(features))}
    beyond = sorted((stale & set(cleaned)) - set(keys))
    stopped = stopped_files(beyond, raw_files_of(features, outdated), cleaned, limits)
    beyond = [key for key in beyond if key not in stopped]
    own = [key for key in keys if key in cleaned]
    current = [key for key in own if key in features and key not in stale and not rebuild]
    wanted = [key for key in own if key not in current] + beyond
    ordered = {key: place for place, key in enumerate(in_order_of_time(cleaned))}
    wanted.sort(key=lambda key: (ordered.get(key, -1), key))  # empty partitions first
    return FeaturePlan(wanted, current, beyond, stopped)


@dg.asset(
    partitions_def=raw_files,
    backfill_policy=dg.BackfillPolicy.single_run(),
    deps=[cleaned_transactions],
    group_name="fraud_detection",
    kinds={"pyspark", "parquet"},
    owners=OWNERS,
    metadata={"dagster/column_schema": table_schema([*CLEANED_COLUMNS, *FEATURE_COLUMNS], never_null=MODEL_INPUTS)},
    description=f"""Cleaned transactions with the {len(MODEL_INPUTS)} inputs of the model.

History comes from earlier partitions alone, and no label younger than {LABEL_DELAY_DAYS} days is
used. Features whose history changed (a late file, a file cleaned again) are built again in the next run, unless
their own file was replaced by one that the checks on `cleaned_transactions` stop.""",
)
def transaction_features(
    context: dg.AssetExecutionContext,
    config: FeaturesConfig,
    lake: LakeResource,
    spark: SparkEngine,
    limits: QualityLimits,
) -> dg.MaterializeResult:
    """Build the planned features in one job."""
    check_run_config(context.run.run_config)
    cleaned, (features, outdated) = lake.reports(CleanedReport), lake.split_reports(FeaturesReport)
    plan = plan_features(
        context.partition_keys,
        cleaned,
        features,
        outdated,
        context.instance.get_materialized_partitions(context.asset_key),
        limits,
        rebuild=config.rebuild,
    )
    for key, problem in plan.stopped.items():
        context.log.warning(
            f"{printable(key)} gets no new features, and is not trained on: {printable(problem)}. Mend the file, or "
            "materialize transaction_features for it to take it as it is"
        )
    if plan.beyond:
        context.log.info(
            f"{some_of(plan.beyond)}: the history changed, or the version of the platform, or the features are gone; "
            "they are built again"
        )
    failed = {
        key: "it has no cleaned data; materialize cleaned_transactions first"
        for key in context.partition_keys
        if key not in cleaned
    }
    built: FeaturesReports = {}
    if plan.wanted:
        history, inputs = history_of(cleaned), expected_inputs(cleaned)
        report = spark.run_job(
            context,
            lake,
            "build_features",
            {"partitions": [_request(lake, cleaned, key, history[key], inputs[key]) for key in plan.wanted]},
            rows=sum(cleaned[part].counts.clean_rows for key in plan.wanted for part in [key, *history[key]]),
        )
        built, errors = split_verdicts(report["partitions"], FeaturesReport)
        failed |= errors
    done = {key: features[key] for key in plan.current} | built
    metadata = {key: _metadata(lake, report, key in built) for key, report in done.items()}
    return conclude(context, succeeded=metadata, failed=failed)


def _request(
    lake: LakeResource, cleaned: CleanedReports, key: str, history: list[str], inputs: FeatureInputs
) -> dict[str, Any]:
    """A partition as the job build_features takes it."""
    times = cleaned[key].tx_datetime
    return {
        "partition": key,
        "cleaned_uri": lake.partition_uri(CLEANED_TABLE, key),
        "tx_datetime_min": instant_text(times.min) if times else None,
        "history": [lake.partition_uri(CLEANED_TABLE, earlier) for earlier in history],
        "cleaned_bytes": sum(cleaned[part].raw.size for part in [key, *history]),
        "inputs": inputs.model_dump(),
        "output_uri": lake.partition_uri(FEATURES_TABLE, key),
    }


def _metadata(lake: LakeResource, report: FeaturesReport, was_built: bool) -> dict[str, Any]:
    return {
        "outcome": "built" if was_built else "already up to date",
        "dagster/row_count": report.counts.rows,
        "path": dg.MetadataValue.path(lake.partition_uri(FEATURES_TABLE, report.partition)),
        "fraud_rows": report.counts.fraud_rows,
        "history_partitions": dg.MetadataValue.json(sorted(report.inputs.history)),
        "built_by_run": dg.MetadataValue.dagster_run(report.run_id),
        "spark_version": report.spark_version,
        "seconds": report.seconds,
    }
