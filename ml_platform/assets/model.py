"""Asset ``fraud_model``: a trained, evaluated and registered model per run."""

import json
import tempfile
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg

from ml_platform.assets.features import (
    expected_inputs,
    in_order_of_time,
    stale_features,
    stopped_files,
    transaction_features,
)
from ml_platform.assets.outcomes import OWNERS, some_of
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.quality import QualityLimits
from ml_platform.lake.resource import CLEANED, FEATURES, LakeResource, Reports, instant
from ml_platform.model.card import model_card
from ml_platform.model.config import FraudModelConfig
from ml_platform.model.gate import (
    DECISION_FILE,
    FINDINGS_VERSION,
    champion_tags,
    features_of,
    judge,
    note_health,
    read_sample,
    verify_reload,
)
from ml_platform.model.mlflow import MODEL_NAME, MlflowResource
from ml_platform.model.packaging import partition_datasets, save_model
from ml_platform.model.plots import draw_figures, markdown_summary
from ml_platform.model.promotion import Decision
from ml_platform.spark.engine import SparkEngine
from spark_jobs.features.registry import MODEL_INPUTS
from spark_jobs.schema import REPORT_NAME
from spark_jobs.train_model import MODEL_FILE, SAMPLE_FILE
from spark_jobs.training.learners import LEARNERS, installed_version


@dg.asset(
    partitions_def=raw_files,
    backfill_policy=dg.BackfillPolicy.single_run(),
    deps=[transaction_features],
    group_name="fraud_detection",
    kinds={"pyspark", "mlflow"},
    owners=OWNERS,
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
    """Train, log and register; then name the outcome in each partition's metadata."""
    cleaned, features = lake.reports(CLEANED), lake.reports(FEATURES)
    missing = [key for key in context.partition_keys if key not in features or key not in cleaned]
    stale = stale_features(features, expected_inputs(cleaned))
    beyond = [key for key in stale if key not in context.partition_keys]
    for key in stopped_files(beyond, features, cleaned, limits):
        stale.remove(key)
        del features[key]  # built from what the file was before
    if missing or stale:
        raise dg.Failure(
            f"features are missing or stale for {some_of(sorted({*missing, *stale}))}; "
            "materialize transaction_features first",
            allow_retries=False,
        )
    ordered = [key for key in in_order_of_time(cleaned) if key in context.partition_keys]
    if not ordered:
        return _describe_all(context, {}, "no partition of this run has any rows")
    cutoffs = ordered if config.train_each else ordered[-1:]
    outcomes: dict[str, dict[str, Any]] = {}
    tags = {"dagster.run_id": context.run.run_id, "partitions": _partitions_tag(context.partition_keys)}
    with mlflow.run(tags) as run:
        for cutoff in cutoffs:
            if config.train_each:
                with run.start_run(run_name=cutoff, nested=True):
                    run.set_tags(tags)
                    outcomes[cutoff] = _train(context, config, lake, spark, mlflow, run, cutoff, cleaned, features)
            else:
                outcomes[cutoff] = _train(context, config, lake, spark, mlflow, run, cutoff, cleaned, features)
    return _describe_all(context, outcomes, "")


def training_partitions(cleaned: Reports, features: Reports, cutoff: str, days: int) -> tuple[list[str], list[str]]:
    """Partitions within `days` before the end of `cutoff`: those with features, and those without."""
    ordered = in_order_of_time(cleaned)
    end = instant(cleaned[cutoff]["tx_datetime"]["max"])
    window = [
        key
        for key in ordered[: ordered.index(cutoff) + 1]
        if end - instant(cleaned[key]["tx_datetime"]["max"]) <= timedelta(days=days + 1)
    ]
    return [key for key in window if key in features], [key for key in window if key not in features]


def _train(
    context: dg.AssetExecutionContext,
    config: FraudModelConfig,
    lake: LakeResource,
    spark: SparkEngine,
    mlflow: MlflowResource,
    run: Any,
    cutoff: str,
    cleaned: Reports,
    features: Reports,
) -> dict[str, Any]:
    """Train at one cut-off within the active MLflow run; returns the partition's metadata."""
    used, without = training_partitions(cleaned, features, cutoff, config.window_days)
    if without:
        context.log.warning(f"no features of their present data, so not trained on: {some_of(without)}")
    champion = mlflow.champion()
    directory = f"models/{cutoff}/{context.run.run_id}"
    report = spark.run_job(
        context,
        lake,
        "train_model",
        {
            **config.as_request(),
            "cutoff": cutoff,
            "cutoff_uri": lake.store.spark_uri(lake.partition_path(FEATURES, cutoff)),
            "feature_uris": [lake.store.spark_uri(lake.partition_path(FEATURES, key)) for key in used],
            "features": list(MODEL_INPUTS),
            "output_uri": lake.store.spark_uri(directory),
            "champion": _champion_request(champion),
        },
        rows=sum(features[key]["counts"]["rows"] for key in used),
        label=cutoff,
    )
    active = run.active_run()
    data_set = {
        key: {
            "fingerprint": cleaned[key]["raw"]["fingerprint"],
            "rows": features[key]["counts"]["rows"],
            "uri": lake.store.spark_uri(lake.partition_path(FEATURES, key)),
        }
        for key in used
    }
    datasets, dataset_tags = partition_datasets(data_set)
    run.log_inputs(datasets, ["training"] * len(datasets), dataset_tags)
    run.log_dict({"cutoff": cutoff, "partitions": data_set}, "data_set.json")
    run.log_dict(report, "report.json")
    run.log_params(
        config.as_request()
        | {"candidates": json.dumps(config.candidates), "cutoff": cutoff}
        | {"data_set_partitions": len(used), "data_set_rows": sum(part["rows"] for part in data_set.values())}
    )
    run.set_tag("outcome", report["outcome"])
    run.set_tag("mlflow.runName", f"{MODEL_NAME} {cutoff}")
    metadata: dict[str, Any] = {"outcome": report["outcome"], "cutoff": cutoff, "mlflow_run_id": active.info.run_id}
    if url := mlflow.run_url(active):
        metadata["mlflow_run"] = dg.MetadataValue.url(url)
    details = {
        "windows": dg.MetadataValue.json(report["windows"]),
        "trained_on": dg.MetadataValue.json(data_set),
        "left_out": dg.MetadataValue.json(without),
    }
    if report["outcome"] != "trained":
        context.log.warning(f"no model for {cutoff}: {report['reason']}")
        run.set_tag("reason", report["reason"])
        note_health(
            config.promotion, lake, mlflow, directory, champion, outcome=report["outcome"], reason=report["reason"]
        )
        return metadata | {"reason": report["reason"]} | details

    lake.write_json(f"{directory}/{REPORT_NAME}", report)
    _log_training(run, report)
    decision = judge(config.promotion, config.seed, lake, f"{directory}/test_scores", report, champion)
    summary = _log_decision(run, report, decision)
    version = _register(context, lake, mlflow, run, directory, report, decision, data_set)
    # Every version, for each can be made the champion by hand later.
    verify_reload(lake, mlflow, version=version, sample_name=f"{directory}/{SAMPLE_FILE}")
    found = {"schema_version": FINDINGS_VERSION, **asdict(decision)}
    lake.write_json(f"{directory}/{DECISION_FILE}", {**found, "cutoff": cutoff, "version": version.version})
    note_health(
        config.promotion, lake, mlflow, directory, champion,
        outcome=decision.outcome, reason=decision.reasons[0], replaced=decision.apply,
        average_precision=report["metrics"].get("champion_test_average_precision"),
    )  # fmt: skip
    if decision.apply:
        # The alias moves last: whatever fails before leaves the champion as it is.
        mlflow.set_champion(version.version, champion_tags(who="fraud_model", why=decision.reasons[0]))
    else:
        mlflow.set_challenger(version.version)
    context.log.info(f"model version {version.version}: {decision.outcome}. {decision.reasons[0]}")
    return {
        "outcome": report["outcome"],
        "is_champion": decision.apply,
        "promotion": decision.outcome,
        "promotion_reasons": dg.MetadataValue.text(" ".join(decision.reasons)),
        "model_version": int(version.version),
        "champion_version": int(version.version if decision.apply or champion is None else champion.version),
        **metadata,
        "learner": report["best"]["learner"],
        **{name: value for name, value in report["metrics"].items() if value is not None},
        "report": dg.MetadataValue.md(summary),
        "path": dg.MetadataValue.path(lake.store.spark_uri(directory)),
        "spark_version": report["spark_version"],
        "seconds": report["seconds"]["total"],
        "best_parameters": dg.MetadataValue.json(report["best"]["params"]),
        "feature_importances": dg.MetadataValue.json(report["feature_importances"]),
        "promotion_figures": dg.MetadataValue.json(decision.figures),
        **details,
    }


def _register(
    context: dg.AssetExecutionContext,
    lake: LakeResource,
    mlflow: MlflowResource,
    run: Any,
    directory: str,
    report: dict[str, Any],
    decision: Decision,
    data_set: dict[str, Any],
) -> Any:
    """Log the model file as an MLflow model and register it, with a description that people read."""
    learner = report["best"]["learner"]
    library = LEARNERS[learner].library
    with tempfile.TemporaryDirectory(prefix="ml-platform-") as temporary:
        target = Path(temporary) / "model"
        save_model(
            target, lake.store.read(f"{directory}/{MODEL_FILE}"), read_sample(lake, f"{directory}/{SAMPLE_FILE}")
        )
        run.log_artifacts(str(target), "model")
    tags = {
        "cutoff": report["cutoff"],
        "dagster.run_id": context.run.run_id,
        "model_uri": report["model_uri"],
        "features": json.dumps(report["features"]),
        "train_last_date": report["windows"]["train"]["last_date"],
        "learner": learner,
    }
    if library is not None:
        tags["library_version"] = installed_version(library)
    return mlflow.register(run, tags, model_card(report, decision, data_set))


def _log_decision(run: Any, report: dict[str, Any], decision: Decision) -> str:
    """Log the decision and the pictures of the report to MLflow; returns the report as Markdown."""
    figures = decision.figures
    intervals = {
        f"test_{name}": (float(figures[f"{name}_lower"]), float(figures[f"{name}_upper"]))
        for name in ("average_precision", "roc_auc")
        if f"{name}_lower" in figures
    }
    pictures = draw_figures(report, intervals=intervals)
    with tempfile.TemporaryDirectory(prefix="ml-platform-") as directory:
        for name, content in pictures.items():
            (Path(directory) / f"{name}.png").write_bytes(content)
        run.log_artifacts(directory, "figures")
    run.log_dict({"schema_version": FINDINGS_VERSION, **asdict(decision)}, DECISION_FILE)
    run.set_tags({"promotion": decision.outcome, "promotion.reason": " ".join(decision.reasons)[:4000]})
    run.log_metrics({f"promotion.{name}": float(value) for name, value in figures.items()})
    return markdown_summary(report, pictures, intervals=intervals, limit=100_000)


def _log_training(run: Any, report: dict[str, Any]) -> None:
    """Log the winner, its metrics, and every grid point: a parameter names it, a metric scores it."""
    run.log_params({f"best.{name}": value for name, value in report["best"]["params"].items()})
    run.log_param("best.learner", report["best"]["learner"])
    points = [json.dumps({"learner": point["learner"], **point["params"]}) for point in report["grid"]]
    run.log_params({f"grid.{number}": point for number, point in enumerate(points)})
    scores = {
        f"grid.{number}.validation_average_precision": point["validation_average_precision"]
        for number, point in enumerate(report["grid"])
    }
    metrics = {**report["metrics"], **scores}
    metrics["validation_average_precision"] = report["best"]["validation_average_precision"]
    run.log_metrics({name: value for name, value in metrics.items() if value is not None})


def _champion_request(champion: Any) -> dict[str, Any] | None:
    """The champion as the training job takes it; None if its tags do not name its model."""
    uri = champion.tags.get("model_uri", "") if champion is not None else ""
    # Before 0.2 it was the directory of a Spark ML pipeline.
    if not uri.endswith(".json") or not features_of(champion):
        return None
    return {"version": champion.version, "model_uri": uri, "features": features_of(champion)}


def _partitions_tag(keys: list[str] | Any) -> str:
    """The run's partitions as a tag, which MLflow limits to 5,000 characters."""
    text = ",".join(keys)
    return text if len(text) <= 4000 else f"{keys[0]}...{keys[-1]} ({len(keys)} partitions)"


def _describe_all(
    context: dg.AssetExecutionContext, outcomes: dict[str, dict[str, Any]], reason: str
) -> dg.MaterializeResult:
    """Every partition of the run shows the run's last model: any of them may be the one that the UI shows."""
    for key in context.partition_keys:
        if key in outcomes or not outcomes:
            metadata = outcomes.get(key, {"outcome": "no model", "reason": reason})
        else:
            cutoff, last = list(outcomes.items())[-1]
            metadata = {**last, "outcome": f"the model of this run is that of partition {cutoff}"}
        context.add_asset_metadata(metadata=metadata, partition_key=key)
    return dg.MaterializeResult()
