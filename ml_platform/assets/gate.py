"""What stands between a registered version and the alias ``champion``: the comparison, and the proof that it loads."""

import json
import tempfile
from contextlib import suppress
from datetime import date, datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field, model_validator

from ml_platform.promotion import DECIDED_BY_FIGURES, Decision, Facts, PromotionRule, Scores, decide
from ml_platform.resources.lake import LakeResource, SchemaVersionError
from ml_platform.resources.mlflow import MODEL_NAME, MlflowResource, hide_progress_bars
from ml_platform.resources.spark import SparkEngine

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

#: Scores that a reloaded model may differ by.
SAME_SCORE = 1e-9

DECISION_FILE = "promotion.json"

#: What a run found of the champion's health.
HEALTH_FILE = "champion.json"

#: Version of what is in these two. A file that names none is of version 1: the first ones did not.
FINDINGS_VERSION = 1

#: Tag of a version that was loaded back from MLflow and scored rows as it did when it was trained.
PROOF_TAG = "reload_proof"

#: Tags that hold an instant: since when a version is champion, and when a challenger was last compared with it.
SINCE_TAG = "champion_since"
COMPARED_TAG = "champion_compared"
INSTANT = "%Y-%m-%dT%H:%M:%SZ"


class PromotionConfig(dg.Config):
    """When the new model becomes the champion; see docs/model.md."""

    mode: str = Field(default="enforce", pattern="^(enforce|dry_run)$", description="enforce; dry_run moves nothing.")
    margin: float = Field(
        default=0.0, ge=0, lt=1, description="Average precision by which it must be better, at the least."
    )
    confidence: float = Field(default=0.95, gt=0, lt=1, description="Of the interval whose lower bound decides.")
    replicates: int = Field(default=1000, ge=100, description="Bootstrap replicates.")
    min_frauds: int = Field(default=50, ge=2, description="Held-out frauds below which no models are compared.")
    min_champion_average_precision: float = Field(
        default=0.2, ge=0, le=1, description="Below this on the newest held-out week, a check warns of the champion."
    )
    max_champion_age_days: int = Field(
        default=120, ge=1, description="After so many days without a comparable challenger, a check warns."
    )

    @model_validator(mode="after")
    def _is_a_rule(self) -> "PromotionConfig":
        # What does not fit together is better known before the training than after it.
        self.rule(seed=0)
        return self

    def rule(self, seed: int) -> PromotionRule:
        """The rule that these settings are."""
        return PromotionRule(
            margin=self.margin,
            confidence=self.confidence,
            replicates=self.replicates,
            min_frauds=self.min_frauds,
            seed=seed,
            mode="dry_run" if self.mode == "dry_run" else "enforce",
        )


def judge(
    config: PromotionConfig, seed: int, lake: LakeResource, scores_name: str, report: dict[str, Any], champion: Any
) -> Decision:
    """Decide by the scores that the training job wrote to `scores_name` in the lake."""
    windows = report["windows"]
    facts = Facts(
        challenger_features=tuple(report["features"]),
        challenger_train_last_date=date.fromisoformat(windows["train"]["last_date"]),
        test_first_date=date.fromisoformat(windows["test"]["first_date"]),
    )
    if champion is not None:
        verdict = report["champion"] or {"status": "unreadable", "error": "its version does not name its model's files"}
        facts = Facts(
            champion=champion.version,
            champion_error=None if verdict["status"] == "scored" else verdict["error"],
            champion_newer_spark=verdict["status"] == "newer_spark",
            champion_features=tuple(features_of(champion)) or None,
            champion_train_last_date=_last_date_of(champion),
            challenger_features=facts.challenger_features,
            challenger_train_last_date=facts.challenger_train_last_date,
            test_first_date=facts.test_first_date,
        )
    return decide(config.rule(seed), read_scores(lake, scores_name, with_champion=facts.champion_error is None), facts)


def read_finding(lake: LakeResource, name: str) -> dict[str, Any]:
    """What DECISION_FILE or HEALTH_FILE beside a model says.

    Raises:
        FileNotFoundError: there is none.
        SchemaVersionError: it is of a version that this one does not know.
    """
    found: dict[str, Any] = lake.read_json(name)
    version = found.get("schema_version", 1)
    if version not in range(1, FINDINGS_VERSION + 1):
        raise SchemaVersionError(
            f"{name} in {lake.lake_uri} is of schema {version!r}, and this version of ml_platform knows up to "
            f"{FINDINGS_VERSION}: run the version that wrote it, or set ML_PLATFORM_LAKE_URI to another lake"
        )
    return found


def features_of(version: "ModelVersion") -> list[str]:
    """The inputs of a version, by its tag; none where that does not name them, for anybody may edit it in MLflow."""
    try:
        features = json.loads(version.tags["features"])
    except (KeyError, ValueError):
        return []
    return features if isinstance(features, list) and all(isinstance(name, str) for name in features) else []


def _last_date_of(version: "ModelVersion") -> date | None:
    """The last day that a version was trained on, by its tag; None where that does not name it."""
    try:
        return date.fromisoformat(version.tags["train_last_date"])
    except (KeyError, ValueError):
        return None


def read_scores(lake: LakeResource, name: str, *, with_champion: bool = True) -> Scores:
    """The held-out rows of a model, from the Parquet that the training job wrote."""
    import numpy as np
    from pyarrow import parquet

    with tempfile.TemporaryDirectory(prefix="ml-platform-") as directory:
        lake.store.download(name, Path(directory))
        files = sorted(Path(directory).glob("part-*.parquet"))
        columns = ["tx_fraud", "score", "champion_score", "customer_id"]
        tables = [parquet.read_table(file, columns=columns) for file in files]
    values = {column: np.concatenate([table[column].to_numpy() for table in tables]) for column in columns}
    scored = with_champion and not np.isnan(values["champion_score"].astype("float64")).any()
    return Scores(
        label=values["tx_fraud"],
        challenger=values["score"],
        champion=values["champion_score"] if scored else None,
        customer_id=values["customer_id"].astype("float64"),
    )


def verify_reload(
    context: dg.AssetExecutionContext,
    lake: LakeResource,
    spark: SparkEngine,
    mlflow: MlflowResource,
    *,
    version: "ModelVersion",
    directory: str,
    report: dict[str, Any],
    feature_uris: list[str],
) -> None:
    """Load a registered version back from MLflow, let it score held-out rows again, and note that it did as PROOF_TAG.

    The files come from MLflow and are scored by Spark from the lake, so that it works wherever Spark runs.

    Raises:
        dagster.Failure: the version does not load, or scores differ.
    """
    import mlflow as mlflow_api

    hide_progress_bars()
    reloaded = f"{directory}/reloaded"
    with tempfile.TemporaryDirectory(prefix="ml-platform-") as target:
        mlflow_api.set_tracking_uri(mlflow.tracking_uri)
        path = mlflow_api.artifacts.download_artifacts(
            artifact_uri=f"models:/{MODEL_NAME}/{version.version}", dst_path=target
        )
        lake.store.upload(Path(path) / "sparkml", reloaded)
    proof = spark.run_job(
        context,
        lake,
        "verify_model",
        {
            "model_uri": lake.store.spark_uri(reloaded),
            "feature_uris": feature_uris,
            "features": report["features"],
            "scores_uri": report["scores_uri"],
        },
        rows=report["metrics"]["test_rows"],
        label=report["cutoff"],
    )
    if proof["rows"] == 0 or not proof["max_difference"] <= SAME_SCORE:  # nor if it is no number
        raise dg.Failure(
            f"version {version.version}, loaded back from MLflow, scores {proof['rows']} rows by up to "
            f"{proof['max_difference']} otherwise than when it was trained; the champion stays",
            allow_retries=False,
        )
    told = (
        f"{proof['rows']} rows scored by Spark {proof['spark_version']}, largest difference {proof['max_difference']}"
    )
    mlflow.tag_version(version.version, {PROOF_TAG: told})


def note_health(
    config: PromotionConfig,
    lake: LakeResource,
    mlflow: MlflowResource,
    directory: str,
    champion: "ModelVersion | None",
    *,
    outcome: str,
    reason: str,
    average_precision: float | None = None,
    replaced: bool = False,
) -> None:
    """Write to HEALTH_FILE what the check on the champion's health looks at, and note a comparison as COMPARED_TAG.

    `outcome` is the gate's, or the training's where there was no challenger; `average_precision` the champion's, on
    the held-out rows.
    """
    if champion is None:
        return
    now = datetime.now(timezone.utc)
    # One that was made the champion in MLflow itself has none of our tags.
    known = [datetime.fromtimestamp(champion.creation_timestamp / 1000, timezone.utc)]
    for tag in (SINCE_TAG, COMPARED_TAG):
        # Anybody may have edited them there.
        with suppress(KeyError, ValueError):
            known.append(datetime.strptime(champion.tags[tag], INSTANT).replace(tzinfo=timezone.utc))
    compared = outcome in DECIDED_BY_FIGURES
    lake.write_json(
        f"{directory}/{HEALTH_FILE}",
        {
            "schema_version": FINDINGS_VERSION,
            "version": champion.version,
            "outcome": outcome,
            "reason": reason,
            "replaced": replaced,
            "average_precision": average_precision,
            "min_average_precision": config.min_champion_average_precision,
            "days_without_comparison": 0 if compared else (now - max(known)).days,
            "max_age_days": config.max_champion_age_days,
        },
    )
    if compared and not replaced:
        mlflow.tag_version(champion.version, {COMPARED_TAG: now.strftime(INSTANT)})


def champion_tags(*, who: str, why: str) -> dict[str, str]:
    """Tags of a version that becomes the champion: since when, by whom and why."""
    since = datetime.now(timezone.utc).strftime(INSTANT)
    return {SINCE_TAG: since, "champion_by": who, "champion_why": why[:1000]}
