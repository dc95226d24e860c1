"""Asset ``fraud_model``: trains, evaluates and registers one model per run."""

from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import dagster as dg

from ml_platform.assets.documentation import with_links
from ml_platform.assets.features import (
    chronological_keys,
    time_ranges,
    transaction_features,
    unusable_files,
)
from ml_platform.assets.outcomes import (
    INTAKE_CHECKS,
    OWNERS,
    check_partitions,
    listed,
    materialize_only,
    record_partitions,
    rounded,
)
from ml_platform.assets.scores import scored_transactions
from ml_platform.escaping import printable, shorten_list
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.quality import QualityLimits, judge_files, problem_of_features
from ml_platform.lake.reports import (
    FEATURES_TABLE,
    CleanedReport,
    CleanedReports,
    FeaturesReport,
    FeaturesReports,
    TrainingReport,
)
from ml_platform.lake.resource import LakeResource
from ml_platform.lake.storage import readable_path
from ml_platform.model.card import quality_in_words
from ml_platform.model.config import FraudModelConfig
from ml_platform.model.mlflow import MlflowResource
from ml_platform.model.promotion import DECIDED_BY_FIGURES
from ml_platform.model.training import Training, TrainingPartition, TrainingResult
from ml_platform.spark.engine import SparkEngine
from ml_platform.version import PLATFORM_VERSION

#: Asset checks whose results come from the asset's own step.
CHECKS = {
    "enough_data": "There was enough data to train the run's models.",
    "promotion": "The promotion decision with its reasons; passes if the metrics could decide it: docs/model.md, "
    "“Promotion rule”.",
    "champion_health": "The champion is still fit for use: accurate enough, readable, and compared recently. If not: "
    "docs/model.md, “How do I change or roll back the champion?”.",
}

Results = Mapping[str, TrainingResult]


@dg.asset(
    partitions_def=raw_files,
    backfill_policy=dg.BackfillPolicy.single_run(),
    # On features, too, or a run without scores would train before it builds features.
    deps=[transaction_features, scored_transactions],
    group_name="fraud_detection",
    kinds={"pyspark", "mlflow"},
    owners=OWNERS,
    check_specs=[
        dg.AssetCheckSpec(name, asset="fraud_model", description=with_links(text), partitions_def=raw_files)
        for name, text in CHECKS.items()
    ],
    description=with_links(
        """A fraud classifier, trained on data up to its partition, the cut-off.

A run over several partitions trains one model, at the latest of them; with `train_each` one per partition.
Parameters are chosen on days after those used for fitting, and the model is evaluated on the last week of the data,
after a week of label delay. It is logged and registered in MLflow, and becomes the `champion` if it is significantly
better than the current champion on the same rows.

**How to read its metadata:** `promotion_reasons` says whether the model became the champion, and why. `report` has the
figures of the held-out week with intervals, and the curves. `mlflow_run` opens the run in MLflow, with parameters,
candidates, environment and the model.

**If a check warns:** `enough_data` says which window lacks days or frauds. `promotion` warns if the figures could not
decide, for instance without a champion that can be read. `champion_health` says why the champion should be replaced:
docs/model.md, “How do I change or roll back the champion?”. `ml-platform champion rollback` goes back to the one
before."""
    ),
)
def fraud_model(
    context: dg.AssetExecutionContext,
    config: FraudModelConfig,
    lake: LakeResource,
    spark: SparkEngine,
    mlflow: MlflowResource,
    limits: QualityLimits,
) -> dg.MaterializeResult:
    """Train at the run's cut-offs and record the outcome in each partition's metadata."""
    of_run = record_partitions(context)
    cleaned, features = lake.reports(CleanedReport), lake.reports(FeaturesReport)
    verdicts = judge_files(cleaned, features, limits)
    left_out = unusable_files(of_run, cleaned, features, verdicts)
    keys = [key for key in of_run if key not in left_out]
    if left_out and not (keys and context.job_def.has_node_named(INTAKE_CHECKS)):
        raise dg.Failure(
            f"the run includes files that no model can be trained for: {printable(listed(left_out))}",
            allow_retries=False,
        )
    features = {
        key: report
        for key, report in features.items()
        if key in cleaned and not verdicts.reason(key) and not problem_of_features(cleaned[key], report)
    }
    cutoffs = [key for key in chronological_keys(cleaned) if key in keys]
    if not config.train_each:
        cutoffs = cutoffs[-1:]
    results: dict[str, TrainingResult] = {}
    metadata: dict[str, dict[str, Any]] = {}
    tags = {
        "dagster.run_id": context.run.run_id,
        "platform_version": PLATFORM_VERSION,
        "partitions": _partitions_tag(keys),
    }
    if cutoffs:
        with mlflow.run(tags) as run:
            for cutoff in cutoffs:
                used, missing = training_partitions(cleaned, features, cutoff, config.window_days)
                if missing:
                    context.log.warning(f"left out of training (features missing or stale): {shorten_list(missing)}")
                partitions = {
                    key: TrainingPartition(
                        cleaned[key].raw.fingerprint,
                        features[key].counts.rows,
                        lake.partition_uri(FEATURES_TABLE, key),
                    )
                    for key in used
                }
                last_date = time_ranges(cleaned)[cutoff].p99_9.date()
                training = Training(context, config, lake, spark, mlflow, run, cutoff, last_date, partitions)
                with run.start_run(run_name=cutoff, nested=True, tags=tags) if config.train_each else nullcontext():
                    results[cutoff] = training.execute()
                metadata[cutoff] = _metadata(training, results[cutoff]) | {"left_out": dg.MetadataValue.json(missing)}
    for key in keys:
        context.add_asset_metadata(metadata=_partition_metadata(key, metadata), partition_key=key)
    if left_out:
        materialize_only(context, keys)
    return dg.MaterializeResult(check_results=_check_results(context, results))


def training_partitions(
    cleaned: CleanedReports, features: FeaturesReports, cutoff: str, days: int
) -> tuple[list[str], list[str]]:
    """Partitions in the `days` before the end of `cutoff`: those with features, and those without."""
    times, ordered = time_ranges(cleaned), chronological_keys(cleaned)
    reach = timedelta(days=days + 1)
    window = [key for key in ordered[: ordered.index(cutoff) + 1] if times[cutoff].p99_9 - times[key].max <= reach]
    return [key for key in window if key in features], [key for key in window if key not in features]


def _metadata(training: Training, result: TrainingResult) -> dict[str, Any]:
    report, decision = result.report, result.decision
    # In the order in which people ask.
    of_run: dict[str, Any] = {"cutoff": report.cutoff, "mlflow_run_id": result.mlflow_run.info.run_id}
    if url := training.mlflow.run_url(result.mlflow_run):
        of_run["mlflow_run"] = dg.MetadataValue.url(url)
    data = {
        "windows": dg.MetadataValue.json(report.model_dump(mode="json")["windows"]),
        "trained_on": dg.MetadataValue.json({key: vars(part) for key, part in training.partitions.items()}),
    }
    if decision is None or result.version is None or report.best is None:
        return {"outcome": report.outcome, "reason": report.reason, **of_run, **data}
    return {
        "outcome": report.outcome,
        "promotion": decision.outcome,
        "promotion_reasons": dg.MetadataValue.text(" ".join(decision.reasons)),
        "quality": f"{quality_in_words(report, training.config.alerts_per_day)}.",
        "report": dg.MetadataValue.md(result.summary),  # noqa: TID251 - its text is escaped
        "is_champion": result.promoted,
        "model_version": int(result.version.version),
        "champion_version": int(result.champion_version or 0),
        "learner": report.best.learner,
        **of_run,
        **{name: rounded(value) for name, value in report.metrics.items() if value is not None},
        "path": readable_path(training.lake.store.spark_uri(training.directory)),
        "spark_version": report.spark_version,
        "seconds": report.seconds["total"],
        "best_parameters": dg.MetadataValue.json(report.best.params),
        "feature_importances": dg.MetadataValue.json(report.feature_importances),
        "promotion_figures": dg.MetadataValue.json(decision.figures),
        **data,
    }


def _partition_metadata(key: str, metadata: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Metadata of a partition. Those without a model of their own show the run's last one, so the UI always has it."""
    if not metadata:
        return {"outcome": "no model", "reason": "no partition of this run has any rows"}
    cutoff = list(metadata)[-1]
    other = {**metadata[cutoff], "outcome": f"the model of this run is that of partition {cutoff}"}
    return metadata.get(key, other)


def _check_results(context: dg.AssetExecutionContext, results: Results) -> list[dg.AssetCheckResult]:
    """Results of CHECKS; a partition without a model of its own passes them."""
    decisions = {key: result.decision for key, result in results.items() if result.decision is not None}

    def data_problem(key: str) -> str | None:
        return results[key].report.reason or None if key in results else None

    def promotion_problem(key: str) -> str | None:
        decided = key not in decisions or decisions[key].outcome in DECIDED_BY_FIGURES
        return None if decided else " ".join(decisions[key].reasons)

    def promotion_metadata(key: str) -> Mapping[str, Any]:
        if key not in decisions:
            return {}
        decision = decisions[key]
        return {
            "outcome": decision.outcome,
            "promoted": results[key].promoted,
            "reasons": dg.MetadataValue.text(" ".join(decision.reasons)),
            "figures": dg.JsonMetadataValue(decision.figures),
        }

    def champion_problem(key: str) -> str | None:
        return results[key].champion_problem if key in results else None

    checks = {
        "enough_data": (data_problem, lambda key: {}),
        "promotion": (promotion_problem, promotion_metadata),
        "champion_health": (champion_problem, lambda key: {}),
    }
    findings = {
        "enough_data": lambda key: _trained_on(results[key].report) if key in results else None,
        "promotion": lambda key: " ".join(decisions[key].reasons) if key in decisions else None,
        "champion_health": lambda key: _in_service(results[key].champion_version) if key in results else None,
    }
    return [
        check_partitions(
            context,
            dg.AssetCheckKey(context.asset_key, name),
            problem_of,
            measure,
            dg.AssetCheckSeverity.WARN,
            finding_of=findings[name],
        )
        for name, (problem_of, measure) in checks.items()
    ]


def _in_service(version: str | None) -> str:
    return f"version {version} is in service" if version else "no model is in service"


def _trained_on(report: TrainingReport) -> str | None:
    window = report.windows.get("train")
    if window is None:
        return None
    return f"{window.rows:,} rows of {window.first_date} to {window.last_date}, {window.frauds:,} frauds"


def _partitions_tag(keys: list[str]) -> str:
    """The run's partitions as an MLflow tag, whose length is limited to 5,000 characters."""
    text = ",".join(keys)
    return text if len(text) <= 4000 else f"{keys[0]}...{keys[-1]} ({len(keys)} partitions)"
