"""Asset ``transaction_features``: the inputs of the model, with history from earlier partitions."""

from collections.abc import Iterable
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
from ml_platform.lake.resource import CLEANED, FEATURES, LakeResource, Reports, instant
from ml_platform.model.config import check_run_config
from ml_platform.spark.engine import SparkEngine
from spark_jobs.features.registry import FEATURE_COLUMNS, HISTORY_DAYS, LABEL_DELAY_DAYS, MODEL_INPUTS
from spark_jobs.schema import CLEANED_COLUMNS


class FeaturesConfig(dg.Config):
    """Options of one materialization."""

    rebuild: bool = Field(False, description="Build again even what is up to date.")


def in_order_of_time(cleaned: Reports) -> list[str]:
    """Keys of the partitions that have rows, by their first transaction, then by key."""
    filled = {key: report["tx_datetime"]["min"] for key, report in cleaned.items() if report["tx_datetime"]["min"]}
    return sorted(filled, key=lambda key: (filled[key], key))


def history_of(cleaned: Reports) -> dict[str, list[str]]:
    """For each partition, the earlier ones that reach into its history, in order of time.

    Earlier means an earlier first transaction; names mean nothing. An empty partition has no history.
    """
    ordered = in_order_of_time(cleaned)
    ends = [instant(cleaned[key]["tx_datetime"]["max"]) for key in ordered]
    latest_ends = list(accumulate(ends, max))
    reach = timedelta(days=HISTORY_DAYS)
    history: dict[str, list[str]] = {key: [] for key in cleaned}
    for index, key in enumerate(ordered):
        # By differences, which exist for all instants: no date is before the year 1.
        first = instant(cleaned[key]["tx_datetime"]["min"])
        # Backwards, until none before reaches so far: a partition costs its history, not all that came before.
        earlier = index
        while earlier and first - latest_ends[earlier - 1] < reach:
            earlier -= 1
        history[key] = [ordered[n] for n in range(earlier, index) if first - ends[n] < reach]
    return history


def expected_inputs(cleaned: Reports) -> dict[str, dict[str, Any]]:
    """What the features of each partition are to be built from; features with other inputs are stale."""
    version = {
        key: f"{report['schema_version']}/{report['epoch']}/{report['raw']['fingerprint']}"
        for key, report in cleaned.items()
    }
    return {
        key: {"cleaned": version[key], "history": {earlier: version[earlier] for earlier in history}}
        for key, history in history_of(cleaned).items()
    }


def stale_features(features: Reports, inputs: dict[str, dict[str, Any]]) -> list[str]:
    """Keys of feature partitions that were built from something else than they would be now."""
    return [
        key
        for key, report in features.items()
        if key in inputs and (report.get("inputs") != inputs[key] or report.get("features") != list(MODEL_INPUTS))
    ]


def stopped_files(keys: Iterable[str], features: Reports, cleaned: Reports, limits: QualityLimits) -> dict[str, str]:
    """Of partitions beyond a run's own, whose checks it does not run: those that the checks would stop, and why.

    Raw files that `features` were built from before are not judged again: their run may have had other limits.
    """
    problems = {
        key: problem_of_file(key, cleaned, limits)
        for key in keys
        if key not in features or _raw_file(features[key]) != cleaned[key]["raw"]["fingerprint"]
    }
    return {key: problem for key, problem in problems.items() if problem}


def _raw_file(report: dict[str, Any]) -> str | None:
    """The fingerprint of the file that features were built from; None if the report, maybe an old one, lacks it."""
    inputs = report.get("inputs")
    return str(inputs["cleaned"]).split("/", 2)[-1] if isinstance(inputs, dict) and "cleaned" in inputs else None


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
    """Build, in one job, what is missing or stale among the run's partitions, and what is stale or lost beyond them
    unless the checks would stop it.
    """
    check_run_config(context.run.run_config)
    cleaned, (features, outdated) = lake.reports(CLEANED), lake.split_reports(FEATURES)
    inputs, history = expected_inputs(cleaned), history_of(cleaned)
    failed = {
        key: "it has no cleaned data; materialize cleaned_transactions first"
        for key in context.partition_keys
        if key not in cleaned
    }
    stale = stale_features(features, inputs)
    stale += [key for key in outdated if key in inputs]
    # A run that failed at stale features has deleted their reports; nothing in the lake tells that they are wanted.
    made_before = context.instance.get_materialized_partitions(context.asset_key)
    stale += sorted(key for key in made_before if key in inputs and key not in features and key not in stale)
    beyond = [key for key in stale if key not in context.partition_keys]
    stopped = stopped_files(beyond, outdated | features, cleaned, limits)
    for key, problem in stopped.items():
        context.log.warning(
            f"{printable(key)} gets no new features, and is not trained on: {printable(problem)}. Mend the file, or "
            "materialize transaction_features for it to take it as it is"
        )
    beyond = [key for key in beyond if key not in stopped]
    if beyond:
        context.log.info(
            f"{some_of(beyond)}: the history changed, or the version of the platform, or the features are gone; they "
            "are built again"
        )
    current = [
        key
        for key in context.partition_keys
        if key in features and key in cleaned and key not in stale and not config.rebuild
    ]
    wanted = [key for key in [*context.partition_keys, *beyond] if key in cleaned and key not in current]
    # Oldest first: progress is easier to follow.
    wanted.sort(key=lambda key: (cleaned[key]["tx_datetime"]["min"] or "", key))
    built: Reports = {}
    if wanted:
        report = spark.run_job(
            context,
            lake,
            "build_features",
            {
                "partitions": [
                    {
                        "partition": key,
                        "cleaned_uri": lake.store.spark_uri(lake.partition_path(CLEANED, key)),
                        "tx_datetime_min": cleaned[key]["tx_datetime"]["min"],
                        "history": [
                            lake.store.spark_uri(lake.partition_path(CLEANED, earlier)) for earlier in history[key]
                        ],
                        "cleaned_bytes": sum(cleaned[part]["raw"]["size"] for part in [key, *history[key]]),
                        "inputs": inputs[key],
                        "output_uri": lake.store.spark_uri(lake.partition_path(FEATURES, key)),
                    }
                    for key in wanted
                ]
            },
            rows=sum(cleaned[part]["counts"]["clean_rows"] for key in wanted for part in [key, *history[key]]),
        )
        built, errors = split_verdicts(report["partitions"])
        failed |= errors
    done = {key: features[key] for key in current} | built
    metadata = {key: _metadata(lake, report, key in built) for key, report in done.items()}
    return conclude(context, succeeded=metadata, failed=failed)


def _metadata(lake: LakeResource, report: dict[str, Any], was_built: bool) -> dict[str, Any]:
    return {
        "outcome": "built" if was_built else "already up to date",
        "dagster/row_count": report["counts"]["rows"],
        "path": dg.MetadataValue.path(lake.store.spark_uri(lake.partition_path(FEATURES, report["partition"]))),
        "fraud_rows": report["counts"]["fraud_rows"],
        "history_partitions": dg.MetadataValue.json(sorted(report["inputs"]["history"])),
        "built_by_run": dg.MetadataValue.dagster_run(report["run_id"]),
        "spark_version": report["spark_version"],
        "seconds": report["seconds"],
    }
