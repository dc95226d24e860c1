"""Asset ``scored_transactions``: scores of each new row by the champion in service before the run, with alerts."""

from collections.abc import Collection, Iterator, Mapping
from datetime import date, datetime
from typing import Any

import dagster as dg
from pydantic import Field

from ml_platform.assets.documentation import with_links
from ml_platform.assets.features import time_ranges, transaction_features, unusable_files
from ml_platform.assets.outcomes import (
    OWNERS,
    record_outcomes,
    record_partitions,
    rounded,
    split_verdicts,
    table_schema,
)
from ml_platform.lake.grades import valid_grades
from ml_platform.lake.partitions import raw_files
from ml_platform.lake.quality import QualityLimits, judge_files
from ml_platform.lake.reports import (
    ALERTS_TABLE,
    CLEANED_TABLE,
    FEATURES_TABLE,
    SCORED_TABLE,
    CleanedReport,
    CleanedReports,
    FeaturesReport,
    Grade,
    ScoredReport,
    ScoredReports,
)
from ml_platform.lake.resource import LakeResource
from ml_platform.lake.storage import readable_path
from ml_platform.model.config import FraudModelConfig
from ml_platform.model.live import drift_summary, grades_summary, log_grades, scoring_request
from ml_platform.model.mlflow import MlflowResource
from ml_platform.run_config import check_run_config, run_config, training_config
from ml_platform.spark.engine import SparkEngine
from spark_jobs.schema import ALERT_COLUMNS, KEY_COLUMNS, SCORED_COLUMNS
from spark_jobs.scoring.grading import ENTRY_FIELDS, entry_of
from spark_jobs.train_model import DEFAULTS

#: Run tag: version of the champion that scores all partitions of the run, and of its retries; or NO_CHAMPION.
CHAMPION_TAG = "ml_platform/scoring_champion"
NO_CHAMPION = "none"

#: Columns of the table of alerts in the metadata: as many as the page has room for.
ALERTS_SHOWN = ("score", "reason_1", "tx_amount", "transaction_id")


class ScoresConfig(dg.Config):
    """Options of one materialization."""

    rebuild: bool = Field(False, description="Score again rows that are scored, with the champion.")
    model_version: int | None = Field(
        None, ge=1, description="Score again with this version of the registered model instead of the champion."
    )


def causes_to_score(
    keys: Collection[str], cleaned: CleanedReports, scored: ScoredReports, config: ScoresConfig
) -> dict[str, str]:
    """Those of the run's `keys` that are scored, with the cause; scores stay as they were given otherwise."""
    causes = {}
    for key in keys:
        report = scored.get(key)
        if config.model_version is not None:
            causes[key] = "model_version"
        elif config.rebuild:
            causes[key] = "rebuild"
        elif report is None:
            causes[key] = "new"
        elif report.inputs.cleaned != cleaned[key].version:
            causes[key] = "new_rows"
        elif report.outcome != "scored":
            causes[key] = "no_scores"
    return causes


@dg.asset(
    partitions_def=raw_files,
    backfill_policy=dg.BackfillPolicy.single_run(),
    # Of a run without usable features, nothing is scored, and what follows is skipped.
    output_required=False,
    deps=[transaction_features],
    group_name="fraud_detection",
    kinds={"pyspark", "parquet"},
    owners=OWNERS,
    metadata={
        "dagster/column_schema": table_schema(
            SCORED_COLUMNS,
            never_null=[name for name, *_ in SCORED_COLUMNS if name not in KEY_COLUMNS],
        )
    },
    description=with_links(
        """Scores and alerts: the probability of fraud of each clean row, by the model that was the champion when
scoring started.

The rows of each day with the highest scores are alerts: `alerts.csv` and `alerts.parquet` name, for each alert, up to
three inputs that raised its score most. Scores stay as they were given when the champion or the history changes. They
are graded week by week as soon as their labels are known. Without a champion that can score, a partition has a report
that says so, and no rows.

**How to read its metadata:** `first_alerts` are the first ten; `ml-platform alerts KEY` lists more, and `alerts_path`
holds all. `expected_frauds` is the sum of the scores. `live_quality` shows all graded weeks, `drift` this file against
the champion's training window.

**If a check warns:** `champion_scores` says why the champion could not score; the run trains its successor anyway.
`live_quality` (docs/scores.md, “Grades”) and the drift checks (docs/scores.md, “Drift”) say that the model may be out
of date, or the data unusual. All of them warn; none stops a file."""
    ),
)
def scored_transactions(
    context: dg.AssetExecutionContext,
    config: ScoresConfig,
    lake: LakeResource,
    spark: SparkEngine,
    mlflow: MlflowResource,
    limits: QualityLimits,
) -> Iterator[dg.MaterializeResult]:
    """Score the run's new or changed rows in one Spark job, and grade the weeks whose labels are known by now."""
    check_run_config(context.run.run_config)
    keys = record_partitions(context)
    cleaned, features, scored = lake.reports(CleanedReport), lake.reports(FeaturesReport), lake.reports(ScoredReport)
    verdicts = judge_files(cleaned, features, limits)
    of_run = {key: features[key] for key in keys if key in features}
    left_out = unusable_files(keys, cleaned, of_run, verdicts)
    usable = [key for key in keys if key not in left_out]
    causes = causes_to_score(usable, cleaned, scored, config)
    reports = {key: scored[key] for key in usable if key not in causes}
    failed: dict[str, str] = {}
    made: list[Grade] = []
    context.log.info(f"{len(causes)} partitions to score, {len(reports)} already scored, {len(left_out)} left out")
    if causes:
        good = {key: report for key, report in cleaned.items() if not verdicts.reason(key)}
        kept = {key: report for key, report in scored.items() if key not in causes}
        request = {
            "champion": _scoring_model(context, config, mlflow),
            **_request(lake, good, kept, causes, _training_settings(context)),
        }
        rows = sum(cleaned[key].counts.clean_rows for key in causes)
        answer = spark.run_job(context, lake, "score_transactions", request, rows=rows)
        done, failed = split_verdicts(answer["partitions"], ScoredReport)
        reports |= done
        scored = kept | done
        made = [grade for report in done.values() for grade in report.grades]
    grades = valid_grades(scored)
    log_grades(mlflow, made, grades, context.log)
    summary = grades_summary(grades) if grades else None
    metadata = {key: _metadata(lake, report, key in causes, summary) for key, report in reports.items()}
    yield from record_outcomes(context, succeeded=metadata, failed=failed, left_out=left_out)


def _training_settings(context: dg.AssetExecutionContext) -> FraudModelConfig:
    """Settings of the model, of the run or, if it does not train, of the deployment."""
    trains = context.job_def.has_node_named("fraud_model")
    return training_config(context.run.run_config if trains else run_config())


def _scoring_model(
    context: dg.AssetExecutionContext, config: ScoresConfig, mlflow: MlflowResource
) -> dict[str, Any] | None:
    """The version that scores, as the job takes it; None if there is no champion.

    The champion is read once per run and recorded in a tag, which a retry inherits.
    """
    if config.model_version is not None:
        version = mlflow.version(str(config.model_version))
        if version is None:
            raise dg.Failure(f"there is no version {config.model_version} of the model", allow_retries=False)
        return scoring_request(mlflow, version)
    run = context.instance.get_run_by_id(context.run.run_id)
    tag = run.tags.get(CHAMPION_TAG) if run is not None else None
    if tag is None:
        champion = mlflow.champion()
        tag = NO_CHAMPION if champion is None else str(champion.version)
        context.instance.add_run_tags(context.run.run_id, {CHAMPION_TAG: tag})
    elif tag == NO_CHAMPION:
        champion = None
    else:
        champion = mlflow.version(tag)
        if champion is None:
            gone = f"version {tag} is gone from MLflow"
            return {"version": int(tag), "error": gone, "out_of_time_from": None, "held_out": None}
    context.log.info("no champion: no scores" if champion is None else f"scoring with the champion, version {tag}")
    return None if champion is None else scoring_request(mlflow, champion)


def _request(
    lake: LakeResource,
    cleaned: CleanedReports,
    scored: ScoredReports,
    causes: Mapping[str, str],
    settings: FraudModelConfig,
) -> dict[str, Any]:
    """Request of the job score_transactions but for its model. `scored` are the partitions that keep their scores."""
    epoch = date.fromisoformat(lake.epoch)

    def day(instant: datetime) -> int:
        return (instant.date() - epoch).days

    times = time_ranges(cleaned)
    graded = {
        key: report
        for key, report in scored.items()
        if report.outcome == "scored" and key in cleaned and report.inputs.cleaned == cleaned[key].version
    }
    return {
        "epoch": lake.epoch,
        "alerts_per_day": settings.alerts_per_day,
        "data_first_day": min((day(found.p0_1) for found in times.values()), default=0),
        "partitions": [
            {
                "partition": key,
                "cause": cause,
                "inputs": {"cleaned": cleaned[key].version},
                "rows": cleaned[key].counts.clean_rows,
                "rows_per_day": {str(day(of)): rows for of, rows in cleaned[key].rows_per_day.items()},
                "usual_days": [day(times[key].p0_1), day(times[key].p99_9)] if key in times else [0, -1],
                "features_uri": lake.partition_uri(FEATURES_TABLE, key),
                "output_uri": lake.partition_uri(SCORED_TABLE, key),
                "alerts_uri": lake.partition_uri(ALERTS_TABLE, key),
            }
            for key, cause in causes.items()
        ],
        "grading": {
            "last_day": max((day(found.p99_9) for found in times.values()), default=-1),
            "delay_days": settings.delay_days,
            "compromised_lookback_days": DEFAULTS["compromised_lookback_days"],
            "scored": {
                key: entry_of(lake.partition_uri(SCORED_TABLE, key), report.model_dump(include=set(ENTRY_FIELDS)))
                for key, report in graded.items()
            },
            "cleaned": {
                key: {
                    "uri": lake.partition_uri(CLEANED_TABLE, key),
                    "first_day": day(found.min),
                    "last_day": day(found.max),
                }
                for key, found in times.items()
            },
            "grades": [grade.model_dump(include={"week", "model_version", "scores"}) for grade in valid_grades(scored)],
        },
    }


def _metadata(lake: LakeResource, report: ScoredReport, is_new: bool, live_quality: str | None) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "outcome": report.outcome if is_new else "already scored",
        "cause": report.cause,
        "dagster/row_count": report.counts.rows,
        "scored_by_run": dg.MetadataValue.dagster_run(report.run_id),
        "spark_version": report.spark_version,
        "seconds": report.seconds,
    }
    if report.outcome != "scored":
        return metadata | ({"reason": report.error} if report.error else {})
    metadata |= {
        "path": readable_path(lake.partition_uri(SCORED_TABLE, report.partition)),
        "alerts_path": readable_path(lake.partition_uri(ALERTS_TABLE, report.partition)),
        "model_version": report.model_version,
        "alerts": report.counts.alerts,
        "alerts_per_day": report.alerts_per_day,
        "expected_frauds": round(report.score_sum, 1),
        "first_alerts": alerts_table(report.alerts),
    }
    if report.out_of_time_from is not None:
        metadata["out_of_time_from"] = report.out_of_time_from
    if any(found.get("inputs") for found in report.drift.values()):
        metadata["drift"] = dg.MetadataValue.md(drift_summary(report.drift))  # noqa: TID251 - its text is escaped
    if live_quality is not None:
        metadata["live_quality"] = dg.MetadataValue.md(live_quality)  # noqa: TID251 - figures only
    return metadata


def alerts_table(alerts: list[dict[str, Any]]) -> dg.TableMetadataValue:
    """Alerts of a report as a table in Dagster's UI."""
    kinds = {"bigint": "int", "double": "float", "int": "int"}
    types = {name: kinds.get(kind, "string") for name, kind, _ in ALERT_COLUMNS}
    return dg.MetadataValue.table(
        [dg.TableRecord({name: rounded(alert.get(name)) for name in ALERTS_SHOWN}) for alert in alerts],
        schema=dg.TableSchema([dg.TableColumn(name, types[name]) for name in ALERTS_SHOWN]),
    )
