"""Gate for the alias ``champion``: inputs of the comparison, champion health, reload verification."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from datetime import date, datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from ml_platform.lake.reports import TrainingReport
from ml_platform.model.config import PromotionConfig
from ml_platform.model.mlflow import MODEL_NAME, NOT_FOUND_CODES, MlflowResource, hide_progress_bars
from ml_platform.model.packaging import read_model_file
from ml_platform.model.promotion import DECIDED_BY_FIGURES, Facts
from ml_platform.operations.messages import one_line
from spark_jobs.training.learners import LEARNERS, ModelError, Scorer, installed_version, is_newer, matrix_of

if TYPE_CHECKING:
    import pandas
    from mlflow.entities.model_registry import ModelVersion

#: Maximum difference between scores before and after reloading.
SCORE_TOLERANCE = 1e-9

#: Tag of a version that was reloaded from MLflow and reproduced its training scores.
PROOF_TAG = "reload_proof"

#: Tags with timestamps: when a version became champion, and when a challenger was last compared with it.
SINCE_TAG = "champion_since"
COMPARED_TAG = "champion_compared"
INSTANT = "%Y-%m-%dT%H:%M:%SZ"


def facts_of(report: TrainingReport, champion: ModelVersion | None) -> Facts:
    """Facts for the promotion decision, from the report and the champion's tags."""
    facts: dict[str, Any] = {
        "challenger_features": tuple(report.features),
        "challenger_train_last_date": date.fromisoformat(report.windows["train"].last_date),
        "test_first_date": date.fromisoformat(report.windows["test"].first_date),
    }
    if champion is None:
        return Facts(**facts)
    scoring = report.champion
    if scoring is None:  # it was left out of the request because of its tags
        error, newer_library = champion_problem(champion), False
    else:
        error = None if scoring.status == "scored" else scoring.error
        newer_library = scoring.status == "newer_library"
    return Facts(
        champion=champion.version,
        champion_error=error,
        champion_newer_library=newer_library,
        champion_features=tuple(features_of(champion)) or None,
        champion_train_last_date=train_last_date(champion),
        **facts,
    )


def champion_request(champion: ModelVersion | None) -> dict[str, Any] | None:
    """The champion in the format of the training job's request; None if its tags lack the model file or inputs."""
    uri = champion.tags.get("model_uri", "") if champion is not None else ""
    # Before 0.2, model_uri was the directory of a Spark ML pipeline.
    if champion is None or not uri.endswith(".json") or not features_of(champion):
        return None
    return {"version": str(champion.version), "model_uri": uri, "features": features_of(champion)}


def features_of(version: ModelVersion) -> list[str]:
    """Inputs of a version from its tag; empty if the tag is missing or malformed (anyone can edit it in MLflow)."""
    try:
        features = json.loads(version.tags["features"])
    except (KeyError, ValueError):
        return []
    return features if isinstance(features, list) and all(isinstance(name, str) for name in features) else []


def champion_problem(version: ModelVersion) -> str | None:
    """Reason why this platform cannot score with a version, by its tags; None if they show no problem."""
    name, way_out = f"version {version.version}", "choose another version, or materialize fraud_model"
    if not version.tags.get("model_uri", "").endswith(".json"):
        if "spark_version" in version.tags:
            return (
                f"{name} is a Spark ML pipeline of an earlier version of ml_platform, with which this one "
                "cannot score; the next run trains a successor"
            )
        return f"{name} has no model file in its tags: {way_out}"
    if not features_of(version):
        return f"{name} has no inputs in its tags: {way_out}"
    learner = LEARNERS.get(version.tags.get("learner", ""))
    if learner is not None and learner.library is not None:
        written_by, installed = version.tags.get("library_version", ""), installed_version(learner.library)
        with suppress(ModelError):  # anyone can edit the tag
            if is_newer(written_by, installed):
                return (
                    f"{name} was written by {learner.library} {written_by}, which version {installed} may misread: "
                    f"install {learner.library} {written_by}, or choose another version"
                )
    return None


def lost_parts(mlflow: MlflowResource, version: ModelVersion) -> str | None:
    """The part of a version that is missing, its MLflow run or its artifacts; None if nothing is."""
    from mlflow.artifacts import list_artifacts
    from mlflow.exceptions import MlflowException

    name, way_out = f"version {version.version}", "ml-platform champion rollback, or materialize fraud_model"
    client = mlflow.client()
    try:
        run = client.get_run(version.run_id)
        if run.info.lifecycle_stage == "deleted":
            return f"{name}: its MLflow run {version.run_id} is in the trash: restore it (mlflow runs restore)"
        uri = client.get_model_version_download_uri(version.name, version.version)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND_CODES:
            raise
        return f"{name}: its MLflow run {version.run_id} is gone; {way_out}"
    try:
        files = list_artifacts(artifact_uri=uri, tracking_uri=mlflow.tracking_uri)
    except FileNotFoundError:
        files = []
    except Exception as error:  # whatever the client of the store raises
        text = one_line(str(error)) or type(error).__name__
        return f"{name}: its artifacts cannot be checked in {uri}: {text}"
    return None if files else f"{name}: its artifacts are gone from {uri}; {way_out}"


def train_last_date(version: ModelVersion) -> date | None:
    """Last day that a version was trained on, from its tag; None if the tag is missing or malformed."""
    try:
        return date.fromisoformat(version.tags["train_last_date"])
    except (KeyError, ValueError):
        return None


def verify_reload(mlflow: MlflowResource, version: ModelVersion, sample: pandas.DataFrame) -> None:
    """Reload a registered version from MLflow, score held-out rows again, and record the result in PROOF_TAG.

    `sample` has the inputs and the ``score`` from training. Only the model file is read, because other files in MLflow
    are not trusted.

    Raises:
        dagster.Failure: the version does not load, or its scores differ.
    """
    import mlflow as mlflow_api
    import numpy as np

    hide_progress_bars()
    with tempfile.TemporaryDirectory(prefix="ml-platform-") as target:
        mlflow_api.set_tracking_uri(mlflow.tracking_uri)
        mlflow_api.set_registry_uri(mlflow.tracking_uri)
        path = mlflow_api.artifacts.download_artifacts(
            artifact_uri=f"models:/{MODEL_NAME}/{version.version}", dst_path=target
        )
        try:
            scorer = Scorer.from_json(read_model_file(Path(path)))
        except (OSError, ModelError) as error:
            raise dg.Failure(
                f"version {version.version} cannot be reloaded from MLflow: {error}; the champion stays",
                allow_retries=False,
            ) from None
    differences = np.abs(scorer.score(matrix_of(sample, scorer.features)) - sample["score"].to_numpy())
    if len(differences) == 0 or not differences.max() <= SCORE_TOLERANCE:  # also fails for NaN
        raise dg.Failure(
            f"version {version.version}, reloaded from MLflow, scores {len(differences)} rows with a difference of up "
            f"to {differences.max(initial=0)} from training; the champion stays",
            allow_retries=False,
        )
    proof = f"{len(differences)} rows scored again, largest difference {differences.max()}"
    mlflow.tag_version(version.version, {PROOF_TAG: proof})


def champion_health(
    config: PromotionConfig,
    champion: ModelVersion,
    *,
    outcome: str,
    reason: str,
    average_precision: float | None = None,
) -> str | None:
    """Problem with a champion that stays: weak, unreadable or not compared for too long; None if it is healthy.

    `outcome` and `reason` come from the decision, or from the training if there was no challenger; `average_precision`
    is the champion's in its last graded week in service or, until there is one, on the held-out rows.
    """
    name, floor = f"the champion, version {champion.version}", config.min_champion_average_precision
    if average_precision is not None and average_precision < floor:
        return f"{name}, has an average precision of {average_precision:.3f}, below {floor}"
    if outcome == "champion_newer_library":
        return reason
    days = 0 if outcome in DECIDED_BY_FIGURES else _days_without_comparison(champion)
    if days > config.max_champion_age_days:
        return f"no challenger could be compared with {name}, for {days} days; this time: {outcome}. {reason}"
    return None


def _days_without_comparison(champion: ModelVersion) -> int:
    # A version promoted in MLflow's UI has none of these tags.
    instants = [datetime.fromtimestamp(champion.creation_timestamp / 1000, timezone.utc)]
    for tag in (SINCE_TAG, COMPARED_TAG):
        with suppress(KeyError, ValueError):  # anyone can edit them
            instants.append(datetime.strptime(champion.tags[tag], INSTANT).replace(tzinfo=timezone.utc))
    return (datetime.now(timezone.utc) - max(instants)).days


def compared_tags(outcome: str) -> dict[str, str]:
    """Tags of a champion after a decision: the time of the comparison, if there was one."""
    return {COMPARED_TAG: _now()} if outcome in DECIDED_BY_FIGURES else {}


def champion_tags(*, who: str, why: str) -> dict[str, str]:
    """Tags of a version that becomes the champion: when, by whom and why."""
    return {SINCE_TAG: _now(), "champion_by": who, "champion_why": why[:1000]}


def _now() -> str:
    return datetime.now(timezone.utc).strftime(INSTANT)
