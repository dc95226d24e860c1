"""Asset ``fraud_model``: a trained, evaluated and registered model per run."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import dagster as dg

from ml_platform.assets.features import (
    expected_inputs,
    in_order_of_time,
    raw_files_of,
    stale_features,
    stopped_files,
    times_of,
    transaction_features,
)
from ml_platform.assets.outcomes import OWNERS, check_partitions, some_of
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.quality import QualityLimits
from ml_platform.lake.reports import FEATURES_TABLE, CleanedReport, CleanedReports, FeaturesReport, FeaturesReports
from ml_platform.lake.resource import LakeResource
from ml_platform.model.config import FraudModelConfig
from ml_platform.model.mlflow import MlflowResource
from ml_platform.model.promotion import DECIDED_BY_FIGURES
from ml_platform.model.training import Training, TrainingPartition, TrainingResult
from ml_platform.spark.engine import SparkEngine

#: Checks of the asset, which its own step makes.
CHECKS = {
    "enough_data": "The models that this run was to train could be trained.",
    "promotion": "The decision about the champion, with its reasons; passed if figures could decide it.",
    "champion_health": "The champion still serves: it is good enough, readable, and was compared lately.",
}

Results = Mapping[str, TrainingResult]


@dg.asset(
    partitions_def=raw_files,
    backfill_policy=dg.BackfillPolicy.single_run(),
    deps=[transaction_features],
    group_name="fraud_detection",
    kinds={"pyspark", "mlflow"},
    owners=OWNERS,
    check_specs=[
        dg.AssetCheckSpec(name, asset="fraud_model", description=text, partitions_def=raw_files)
        for name, text in CHECKS.items()
    ],
    description="""A classifier of frauds, trained up to the cut-off that the partition names.

A run over several partitions trains one model, at the last of them in time; with `train_each` one per partition.
Parameters are chosen on later days than were fitted on, and the model is judged on the last week of the data, after
a week of delay. It is logged and registered in MLflow, and becomes the `champion` if it is provably better than the
champion on the same rows.""",
)
def fraud_model(
    context: dg.AssetExecutionContext,
    config: FraudModelConfig,
    lake: LakeResource,
    spark: SparkEngine,
    mlflow: MlflowResource,
    limits: QualityLimits,
) -> dg.MaterializeResult:
    """Train at the run's cut-offs; then name the outcome in each partition's metadata."""
    cleaned, features = lake.reports(CleanedReport), lake.reports(FeaturesReport)
    features = usable_features(context.partition_keys, cleaned, features, limits)
    cutoffs = [key for key in in_order_of_time(cleaned) if key in context.partition_keys]
    if not config.train_each:
        cutoffs = cutoffs[-1:]
    results: dict[str, TrainingResult] = {}
    metadata: dict[str, dict[str, Any]] = {}
    tags = {"dagster.run_id": context.run.run_id, "partitions": _partitions_tag(context.partition_keys)}
    if cutoffs:
        with mlflow.run(tags) as run:
            for cutoff in cutoffs:
                used, without = training_partitions(cleaned, features, cutoff, config.window_days)
                if without:
                    context.log.warning(f"no features of their present data, so not trained on: {some_of(without)}")
                partitions = {
                    key: TrainingPartition(
                        cleaned[key].raw.fingerprint,
                        features[key].counts.rows,
                        lake.partition_uri(FEATURES_TABLE, key),
                    )
                    for key in used
                }
                training = Training(context, config, lake, spark, mlflow, run, cutoff, partitions)
                if config.train_each:
                    with run.start_run(run_name=cutoff, nested=True):
                        run.set_tags(tags)
                        results[cutoff] = training.execute()
                else:
                    results[cutoff] = training.execute()
                metadata[cutoff] = _metadata(training, results[cutoff]) | {"left_out": dg.MetadataValue.json(without)}
    for key in context.partition_keys:
        context.add_asset_metadata(metadata=_metadata_of(key, metadata), partition_key=key)
    return dg.MaterializeResult(check_results=_check_results(context, results))


def usable_features(
    keys: list[str], cleaned: CleanedReports, features: FeaturesReports, limits: QualityLimits
) -> FeaturesReports:
    """The features that may be trained on: all but those of files beyond `keys` that the checks would stop.

    Raises dagster.Failure: features of `keys` are missing, or others are stale.
    """
    missing = [key for key in keys if key not in features or key not in cleaned]
    stale = stale_features(features, expected_inputs(cleaned))
    stopped = stopped_files(set(stale) - set(keys), raw_files_of(features, {}), cleaned, limits)
    if unusable := sorted({*missing, *stale} - set(stopped)):
        raise dg.Failure(
            f"features are missing or stale for {some_of(unusable)}; materialize transaction_features first",
            allow_retries=False,
        )
    return {key: report for key, report in features.items() if key not in stopped}


def training_partitions(
    cleaned: CleanedReports, features: FeaturesReports, cutoff: str, days: int
) -> tuple[list[str], list[str]]:
    """Partitions within `days` before the end of `cutoff`: those with features, and those without."""
    times, ordered = times_of(cleaned), in_order_of_time(cleaned)
    reach = timedelta(days=days + 1)
    window = [key for key in ordered[: ordered.index(cutoff) + 1] if times[cutoff].max - times[key].max <= reach]
    return [key for key in window if key in features], [key for key in window if key not in features]


def _metadata(training: Training, result: TrainingResult) -> dict[str, Any]:
    report, decision = result.report, result.decision
    metadata: dict[str, Any] = {
        "outcome": report.outcome,
        "cutoff": report.cutoff,
        "mlflow_run_id": result.mlflow_run.info.run_id,
        "windows": dg.MetadataValue.json(report.model_dump(mode="json")["windows"]),
        "trained_on": dg.MetadataValue.json({key: vars(part) for key, part in training.partitions.items()}),
    }
    if url := training.mlflow.run_url(result.mlflow_run):
        metadata["mlflow_run"] = dg.MetadataValue.url(url)
    if decision is None or result.version is None or report.best is None:
        return metadata | {"reason": report.reason}
    return metadata | {
        "is_champion": decision.apply,
        "promotion": decision.outcome,
        "promotion_reasons": dg.MetadataValue.text(" ".join(decision.reasons)),
        "model_version": int(result.version.version),
        "champion_version": int(result.champion_version or 0),
        "learner": report.best.learner,
        **{name: value for name, value in report.metrics.items() if value is not None},
        "report": dg.MetadataValue.md(result.summary),
        "path": dg.MetadataValue.path(training.lake.store.spark_uri(training.directory)),
        "spark_version": report.spark_version,
        "seconds": report.seconds["total"],
        "best_parameters": dg.MetadataValue.json(report.best.params),
        "feature_importances": dg.MetadataValue.json(report.feature_importances),
        "promotion_figures": dg.MetadataValue.json(decision.figures),
    }


def _metadata_of(key: str, metadata: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Every partition of the run shows the run's last model: any of them may be the one that the UI shows."""
    if not metadata:
        return {"outcome": "no model", "reason": "no partition of this run has any rows"}
    cutoff = list(metadata)[-1]
    other = {**metadata[cutoff], "outcome": f"the model of this run is that of partition {cutoff}"}
    return metadata.get(key, other)


def _check_results(context: dg.AssetExecutionContext, results: Results) -> list[dg.AssetCheckResult]:
    """The results of CHECKS; a partition whose model is that of another one passes them."""
    decisions = {key: result.decision for key, result in results.items() if result.decision is not None}

    def lacks_data(key: str) -> str | None:
        return results[key].report.reason or None if key in results else None

    def undecided(key: str) -> str | None:
        decided = key not in decisions or decisions[key].outcome in DECIDED_BY_FIGURES
        return None if decided else " ".join(decisions[key].reasons)

    def decision_of(key: str) -> Mapping[str, Any]:
        if key not in decisions:
            return {}
        decision = decisions[key]
        return {
            "outcome": decision.outcome,
            "promoted": decision.apply,
            "reasons": dg.MetadataValue.text(" ".join(decision.reasons)),
            "figures": dg.JsonMetadataValue(decision.figures),
        }

    def ails(key: str) -> str | None:
        return results[key].champion_problem if key in results else None

    problems = {
        "enough_data": (lacks_data, lambda key: {}),
        "promotion": (undecided, decision_of),
        "champion_health": (ails, lambda key: {}),
    }
    return [
        check_partitions(
            context, dg.AssetCheckKey(context.asset_key, name), problem_of, measure, dg.AssetCheckSeverity.WARN
        )
        for name, (problem_of, measure) in problems.items()
    ]


def _partitions_tag(keys: list[str]) -> str:
    """The run's partitions as a tag, which MLflow limits to 5,000 characters."""
    text = ",".join(keys)
    return text if len(text) <= 4000 else f"{keys[0]}...{keys[-1]} ({len(keys)} partitions)"
